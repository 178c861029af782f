"""Kinds of request that sum or average attention weights or scores over groups of tokens.

Each function resolves a request against a run and returns a `Measure`. Its `observe` is called once per sample and
kernel call. A program with groups of queries makes several calls, each with some of the queries: what `observe` passes
to `add` must therefore add up over calls.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import join, wrong
from fluxlab.model.attention import Attended
from fluxlab.model.rope import frequencies
from fluxlab.probes.outputs import (
    ALL,
    Add,
    Axes,
    Measure,
    ProbeContext,
    averaging_weights,
    named_axis,
    select_tokens,
    token_axes,
    token_range,
    union,
    word_axis,
    words_of_prompts,
)
from fluxlab.probes.registry import probe
from fluxlab.probes.stream import Tokens, attention_weights, locate, take
from fluxlab.select.arguments import EVERY_AXIS, choice
from fluxlab.select.layout import IMAGE, TEXT
from fluxlab.select.tokens import parse_tokens


def parse_words(value: Any, path: str) -> str | list[str]:
    """Parse "all", or words and phrases as in a program's `tokens: {words: …}`."""
    return "all" if value == "all" else parse_tokens({"words": value}, path.rpartition(".")[0])["words"]


def parse_regions(value: Any, path: str) -> dict[str, Any]:
    """Parse a mapping of names to token selections."""
    if not isinstance(value, Mapping) or not value:
        raise wrong(path, value, "a mapping of names to tokens, such as {sky: {box: [0, 0, 4, 16]}, ground: text}")
    return {str(name): parse_tokens(tokens, join(path, name)) for name, tokens in value.items()}


@probe("words", {"words": parse_words, "direction": choice("image_to_word", "word_to_image", "both")})
def words(context: ProbeContext, words: str | list[str] = "all", direction: str = "both") -> Measure:
    """Attention between image tokens and words: a map per word.

    image_to_word: the attention of each image query to a word, the sum over its tokens. word_to_image: the attention of
    a word to each image key, the mean over its tokens.
    """
    prompt_words = words_of_prompts(words, context)
    axis = word_axis([[name for name, _ in sample] for sample in prompt_words])
    count = axis.shape[0]
    groups = [[torch.tensor(group) for _, group in sample] for sample in prompt_words]
    empty = torch.tensor([], dtype=torch.long)
    members = [union([*sample, *[empty] * (count - len(sample))], context) for sample in groups]
    weights = [averaging_weights(member).to(context.device) for _, member in members]
    members = [(text, member.to(context.device)) for text, member in members]
    image = token_range(context, IMAGE)
    directions = ["image_to_word", "word_to_image"] if direction == "both" else [direction]

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        text, member = members[b]
        for d, name in enumerate(directions):
            output = slice(d, d + 1)
            if name == "image_to_word":
                for p, which in attention_weights(attended, b, heads, image, text):
                    add("", (output, ALL, which), (p @ member.to(p)).mT[:, None])
            else:
                for p, which in attention_weights(attended, b, heads, text, image):
                    add("", (output,), (take(weights[b], 1, which).to(p) @ p)[:, None])

    axes = named_axis("direction", directions) + axis + token_axes([image], context, "")
    blank = tuple((b, (ALL, slice(len(sample), None))) for b, sample in enumerate(prompt_words) if len(sample) < count)
    return Measure({"": axes}, observe, "probability", blank)


@probe("regions", {"regions": parse_regions})
def regions(context: ProbeContext, regions: Mapping[str, Any]) -> Measure:
    """Attention from each region to each region: summed over keys, averaged over queries."""
    selected = {name: select_tokens(part, context, f"regions.{name}") for name, part in regions.items()}
    members = [union([part[b].index for part in selected.values()], context) for b in range(context.samples)]
    weights = [averaging_weights(member).to(context.device) for _, member in members]
    members = [(both, member.to(context.device)) for both, member in members]

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        both, member = members[b]
        for p, which in attention_weights(attended, b, heads, both, both):
            add("", (), take(weights[b], 1, which).to(p) @ (p @ member.to(p)))

    axes = named_axis("from", list(selected)) + named_axis("to", list(selected))
    return Measure({"": axes}, observe, "probability")


@probe("map", {"from": parse_tokens, "to": parse_tokens})
def every_pair(context: ProbeContext, from_: Any, to: Any) -> Measure:
    """The attention weight itself, from each query to each key."""
    queries, keys = select_tokens(from_, context, "from"), select_tokens(to, context, "to")

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in attention_weights(attended, b, heads, queries[b], keys[b]):
            add("", (which,), p)

    axes = token_axes(queries, context, "from", "from") + token_axes(keys, context, "to", "to")
    return Measure({"": axes}, observe, "probability")


@probe("incoming", {"tokens": parse_tokens, "from": parse_tokens})
def incoming(context: ProbeContext, tokens: Any = "image", from_: Any = "all") -> Measure:
    """Attention that each token receives as a key: the mean over queries `from`. Over all keys it sums to 1."""
    keys, queries = select_tokens(tokens, context, "tokens"), select_tokens(from_, context, "from")

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, _ in attention_weights(attended, b, heads, queries[b], keys[b]):
            add("", (), p.sum(1) / len(queries[b]))

    return Measure({"": token_axes(keys, context, "tokens")}, observe, "probability")


@probe("quadrants")
def quadrants(context: ProbeContext) -> Measure:
    """Attention within and between text and image (and each reference): summed over keys, averaged over queries.

    The largest group of keys is computed as 1 minus the others, so that most keys need not be read.
    """
    layout = context.layout
    kinds = [token_range(context, kind) for kind in range(TEXT, IMAGE + len(layout.grids))]
    names = ["text", "image", *(f"reference {i}" for i in range(len(layout.references)))]
    largest = max(range(len(kinds)), key=lambda kind: len(kinds[kind]))
    others = [kind.index for i, kind in enumerate(kinds) if i != largest]
    rest, member = union(others, context)
    sequence = token_range(context)
    average = averaging_weights(union([kind.index for kind in kinds], context)[1]).to(context.device)
    member = member.to(context.device)

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in attention_weights(attended, b, heads, sequence, rest):
            mass = p @ member.to(p)
            remainder = 1 - mass.sum(-1, keepdim=True)
            mass = torch.cat((mass[..., :largest], remainder, mass[..., largest:]), -1)
            add("", (), take(average, 1, which).to(p) @ mass)

    return Measure({"": named_axis("from", names) + named_axis("to", names)}, observe, "probability")


@probe("logits", {"from": parse_tokens, "to": parse_tokens, "against": parse_tokens})
def logits(context: ProbeContext, from_: Any, to: Any, against: Any = None) -> Measure:
    """Scores q·k/√d between two regions, split into their rotary pairs, each with its axis and wavelength.

    A score is a sum over pairs of channels. Each pair is rotated along one axis at one wavelength, so that the split
    shows which positions raise a score. Results are means over queries and keys. `against` subtracts the mean score to
    other keys, because a constant that all keys share does not change attention. Scores are computed before a mask is
    added, from rotated queries and keys, so that edits of positions show. A temperature is included.
    """
    selected = {"from": select_tokens(from_, context, "from"), "to": select_tokens(to, context, "to")}
    if against:
        selected["against"] = select_tokens(against, context, "against")
    dims = context.run.axes_dim
    names = EVERY_AXIS[: len(dims)]
    axis = [name for name, dim in zip(names, dims, strict=True) for _ in range(dim // 2)]
    turns = torch.cat([frequencies(dim, context.run.theta) for dim in dims])
    pairs = Axes(
        ("pair",),
        (len(axis),),
        (len(axis),),
        {
            "pair": (("pair",), list(range(len(axis)))),
            "axis": (("pair",), axis),
            "wavelength": (("pair",), (2 * torch.pi / turns).tolist()),
        },
    )

    def observe(attended: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        exact = torch.promote_types(attended.q.dtype, torch.float32)

        def total(x: Tensor, indexer: Any) -> Tensor:
            return take(take(x[b], 0, heads), 1, indexer).to(exact).sum(1)

        def mean_key(keys: Tokens) -> Tensor:
            return total(attended.k, keys.indexer) / len(keys)

        rows, _ = locate(selected["from"][b], attended.queries)
        q = total(attended.q, rows) / len(selected["from"][b])
        k = mean_key(selected["to"][b])
        if "against" in selected:
            k = k - mean_key(selected["against"][b])
        add("", (), (q * k).unflatten(-1, (-1, 2)).sum(-1) / attended.q.shape[-1] ** 0.5)

    return Measure({"": pairs}, observe, "score")
