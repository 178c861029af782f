"""The kinds of request that are sums and means of p, or of scores: each a function (arguments, place) → `Measure`.

A measure observes one sample in one call of a kernel. A call may hold some of the queries only (programs with groups
of queries make several), so whatever is handed to `add` adds up over calls.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fluxlab.model.attention import Attended
from fluxlab.model.rope import frequencies
from fluxlab.probes.outputs import (
    ALL,
    Add,
    Axes,
    Measure,
    Place,
    chosen,
    means,
    named_axis,
    span,
    spelt_words,
    token_axes,
    union,
    word_axis,
)
from fluxlab.probes.stream import Tokens, present, probabilities, take
from fluxlab.select.arguments import AXES
from fluxlab.select.layout import IMAGE, TEXT


def words(arguments: Mapping[str, Any], place: Place) -> Measure:
    """Word heatmaps. image_to_word: how much each image token looks at a word, all its tokens together; word_to_image:
    where a word looks, the mean of its tokens.
    """
    found = spelt_words(arguments["words"], place)
    axis = word_axis([[name for name, _ in one] for one in found])
    count = axis.shape[0]
    groups = [[torch.tensor(group) for _, group in one] for one in found]
    spelt = [union([*one, *[torch.tensor([], dtype=torch.long)] * (count - len(one))], place) for one in groups]
    weights = [means(member) for _, member in spelt]
    image, asked = span(place, IMAGE), arguments["direction"]
    directions = ["image_to_word", "word_to_image"] if asked == "both" else [asked]

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        text, member = spelt[b]
        for d, direction in enumerate(directions):
            here = slice(d, d + 1)
            if direction == "image_to_word":
                for p, which in probabilities(seen, b, heads, image, text):
                    add("", (here, ALL, which), (p @ member.to(p)).mT[:, None])
            else:
                for p, which in probabilities(seen, b, heads, text, image):
                    add("", (here,), (take(weights[b], 1, which).to(p) @ p)[:, None])

    axes = named_axis("direction", directions) + axis + token_axes([image], place, "")
    blank = tuple((b, (ALL, slice(len(one), None))) for b, one in enumerate(found) if len(one) < count)
    return Measure({"": axes}, observe, "probability", blank)


def regions(arguments: Mapping[str, Any], place: Place) -> Measure:
    """From region to region: what share of its attention a token of the one pays to the other, mean over the one."""
    named = {name: chosen(one, place, f"regions.{name}") for name, one in arguments["regions"].items()}
    members = [union([one[b].index for one in named.values()], place) for b in range(place.samples)]
    weights = [means(member) for _, member in members]

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        both, member = members[b]
        for p, which in probabilities(seen, b, heads, both, both):
            add("", (), take(weights[b], 1, which).to(p) @ (p @ member.to(p)))

    return Measure({"": named_axis("from", list(named)) + named_axis("to", list(named))}, observe, "probability")


def quadrants(arguments: Mapping[str, Any], place: Place) -> Measure:
    """Text and image (and each reference), from and to: what share of its attention a token pays, mean over tokens.

    The largest kind gets what the others leave, so that most keys need not be looked at.
    """
    layout = place.context.layout
    kinds = [span(place, kind) for kind in range(TEXT, IMAGE + len(layout.grids))]
    names = ["text", "image", *(f"reference {i}" for i in range(len(layout.references)))]
    largest = max(range(len(kinds)), key=lambda kind: len(kinds[kind]))
    others = [kind.index for i, kind in enumerate(kinds) if i != largest]
    rest, member = union(others, place)
    everything, average = span(place), means(union([kind.index for kind in kinds], place)[1])

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in probabilities(seen, b, heads, everything, rest):
            mass = p @ member.to(p)
            whole = 1 - mass.sum(-1, keepdim=True)
            mass = torch.cat((mass[..., :largest], whole, mass[..., largest:]), -1)
            add("", (), take(average, 1, which).to(p) @ mass)

    return Measure({"": named_axis("from", names) + named_axis("to", names)}, observe, "probability")


def every_pair(arguments: Mapping[str, Any], place: Place) -> Measure:
    """p itself, of every token of `from` over every token of `to`: a point's full map."""
    queries, keys = chosen(arguments["from"], place, "from"), chosen(arguments["to"], place, "to")

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        for p, which in probabilities(seen, b, heads, queries[b], keys[b]):
            add("", (which,), p)

    axes = token_axes(queries, place, "from", "from") + token_axes(keys, place, "to", "to")
    return Measure({"": axes}, observe, "probability")


def logits(arguments: Mapping[str, Any], place: Place) -> Measure:
    """The scores q·k/√d between two regions, mean over pairs of tokens, as the sum that they are over rotary pairs.

    Each pair of channels turns with one axis at one wavelength: which of them made this token look there? `against`
    takes the mean score with other keys away, for what is common to all keys changes no probability. Scores are before
    a mask; a temperature is in them. Turned queries and keys are used, so that edits of positions show.
    """
    named = {key: chosen(arguments[key], place, key) for key in ("from", "to", "against") if arguments[key]}
    p = place.context
    names = AXES if len(p.axes_dim) == len(AXES) else tuple(map(str, range(len(p.axes_dim))))
    axis = [name for name, dim in zip(names, p.axes_dim, strict=True) for _ in range(dim // 2)]
    turns = torch.cat([frequencies(dim, p.theta) for dim in p.axes_dim])
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

    def observe(seen: Attended, b: int, heads: Tensor | None, add: Add) -> None:
        wide = torch.promote_types(seen.q.dtype, torch.float32)

        def total(x: Tensor, where: Any) -> Tensor:
            return take(take(x[b], 0, heads), 1, where).to(wide).sum(1)

        def mean_key(keys: Tokens) -> Tensor:
            return total(seen.k, keys.places) / len(keys)

        here, _ = present(named["from"][b], seen.queries)
        q = total(seen.q, here) / len(named["from"][b])
        k = mean_key(named["to"][b])
        if "against" in named:
            k = k - mean_key(named["against"][b])
        add("", (), (q * k).unflatten(-1, (-1, 2)).sum(-1) / seen.q.shape[-1] ** 0.5)

    return Measure({"": pairs}, observe, "score")
