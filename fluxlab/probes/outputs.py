"""What a kind of request computes (`Measure`). Its tokens, shapes and labels are known before the run starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, wrong
from fluxlab.model.sites import OF_HEADS
from fluxlab.probes.arrays import Coords
from fluxlab.probes.stream import Tokens, tokens
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT, Context, Layout
from fluxlab.select.tokens import resolve_tokens
from fluxlab.select.words import Prompt, find_word, named_words

ALL = slice(None)
_GROUPS = {TEXT: "text", IMAGE: "image"}

Add = Callable[[str, tuple, Tensor], None]
"""(output, index into its axes, values `(heads, …)`) → adds the values there. A grid of tokens counts as one axis."""

Observe = Callable[[Any, int, Tensor | None, Add], None]
"""(what one kernel call computed with (`Attended`), sample, heads or None for all, add). With `Measure.site`, the first
is the sample's activations `(heads or 1, N, C)` instead."""


class ProbeContext(NamedTuple):
    """The run that a request is resolved against.

    run: tokens, model sizes, schedule and prompts. samples: batch size. path: of the request in its config, for error
    messages. average: the axes that the request averages over. blocks: the requested ones.
    """

    run: Context
    samples: int
    path: str
    average: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:
        return self.run.layout

    @property
    def device(self) -> torch.device:
        """The device of the model. Requests are resolved on the host, and what `observe` needs is moved there once."""
        return self.run.device or self.run.ids.device

    @property
    def averages_tokens(self) -> bool:
        """Whether the results of the queries are to be averaged."""
        return "tokens" in self.average


class Axes(NamedTuple):
    """Axes of an output. `flat` is the shape that `Add` indexes, in which a grid is one axis."""

    names: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    flat: tuple[int, ...] = ()
    coords: Coords = {}  # noqa: RUF012 (never modified)

    def __add__(self, other: "Axes") -> "Axes":
        coords = {**self.coords, **other.coords}
        return Axes(self.names + other.names, self.shape + other.shape, self.flat + other.flat, coords)


@dataclass(frozen=True, eq=False)
class Measure:
    """A request that was resolved against a run.

    outputs: the axes of each output by name; the only output of a request has the name "". observe: computes a part of
    them from one kernel call. blank: (sample, index) of entries that a sample does not have; they are NaN. scratch:
    bytes that `observe` allocates in addition to one chunk of attention weights. site: of the block, for a request of
    activations instead of attention; unrotated: whether queries or keys are to be unrotated. concepts: words whose maps
    the model is to compute (`fluxlab.concepts`).
    """

    outputs: Mapping[str, Axes]
    observe: Observe
    unit: str
    blank: tuple[tuple[int, tuple], ...] = ()
    scratch: int = 0
    site: str = ""
    unrotated: bool = False
    concepts: tuple[str, ...] = ()

    @property
    def has_heads(self) -> bool:
        return not self.site or self.site in OF_HEADS


def select_tokens(selection: Any, context: ProbeContext, key: str) -> list[Tokens]:
    """Return the selected tokens of each sample. Raises `UserError` with the path of `key` for an empty selection."""
    path = join(context.path, key)
    selected = [resolve_tokens(selection, context.run, b, path).cpu() for b in range(context.samples)]
    return [tokens(index, context.device) for index in selected]


def select_image_tokens(selection: Any, context: ProbeContext, key: str) -> list[Tokens]:
    """Like `select_tokens`. Raises `UserError` for tokens that are not image tokens."""
    selected = select_tokens(selection, context, key)
    start, stop = context.layout.range(IMAGE)
    if any(one.index[0] < start or one.index[-1] >= stop for one in selected):
        raise wrong(join(context.path, key), selection, "image tokens only")
    return selected


def token_range(context: ProbeContext, kind: int | None = None) -> Tokens:
    """Return all tokens of a kind (`TEXT`, `IMAGE`, …), or of the whole sequence."""
    ends = (0, context.layout.tokens) if kind is None else context.layout.range(kind)
    return tokens(torch.arange(*ends), context.device)


def grid_positions(context: ProbeContext) -> tuple[Tensor, Tensor]:
    """Return row and column of each image token, `(N,)` in fp32, in main memory."""
    rows, cols = context.layout.grid
    index = torch.arange(rows * cols)
    return (index // cols).float(), (index % cols).float()


def union(groups: Sequence[Tensor], context: ProbeContext) -> tuple[Tokens, Tensor]:
    """Return the n tokens that are in any of m groups, and their membership: 0 or 1, `(n, m)`, in main memory."""
    member = torch.zeros(context.layout.tokens, len(groups), dtype=torch.float32)
    for g, group in enumerate(groups):
        member[group, g] = 1
    index = member.any(1).nonzero()[:, 0]
    return tokens(index, context.device), member[index]


def averaging_weights(member: Tensor) -> Tensor:
    """Return weights `(groups, tokens)` that average over the tokens of each group."""
    return (member / member.sum(0).clamp(min=1)).T


def named_axis(name: str, labels: Sequence) -> Axes:
    return Axes((name,), (len(labels),), (len(labels),), {name: ((name,), list(labels))})


def token_axes(selections: Sequence[Tokens], context: ProbeContext, key: str, prefix: str = "") -> Axes:
    """Return axes for tokens: `row` and `col` for a rectangle of a grid, else `token` with indices into the sequence.

    prefix: "from" gives `from_row` and `from_col`, or `from`. Where samples select different tokens, the coordinate
    `token_place` has the indices of each. With tokens of reference images the coordinate `token_group` names what each
    token (of a rectangle: each row) belongs to: "text", "image", "reference 0", …. Raises `UserError` if samples select
    different numbers of tokens.
    """
    first = selections[0].index
    counts = [len(selection) for selection in selections]
    if len(set(counts)) > 1:
        raise UserError(
            f"{join(context.path, key)}: selects {counts} tokens of the samples, expected the same number for each"
        )
    name = prefix or "token"
    if any(not torch.equal(selection.index, first) for selection in selections):
        labels = {f"{name}_place": (("sample", name), [selection.index.tolist() for selection in selections])}
        return Axes((name,), (len(first),), (len(first),), labels)
    scope = context.layout.scope(first)
    rectangle = scope.rectangle()
    groups = [_GROUPS[kind] if kind < REFERENCE else f"reference {kind - REFERENCE}" for kind in scope.kind.tolist()]
    with_references = any(kind >= REFERENCE for kind in scope.kind.tolist())
    if rectangle is None:
        axes = named_axis(name, first.tolist())
        return axes._replace(coords={**axes.coords, f"{name}_group": ((name,), groups)}) if with_references else axes
    names = tuple(f"{prefix}_{part}".strip("_") for part in ("row", "col"))
    rows, cols = (scope.index // scope.cols).tolist(), (scope.index % scope.cols).tolist()
    coords = {names[0]: (names[:1], rows[:: rectangle[1]]), names[1]: (names[1:], cols[: rectangle[1]])}
    if with_references:
        coords[f"{name}_group"] = (names[:1], groups[: rectangle[0]])
    return Axes(names, rectangle, (len(first),), coords)


def words_of_prompts(requested: str | list[str], context: ProbeContext) -> list[list[tuple[str, list[int]]]]:
    """Return (word, its text tokens) for each sample: the requested words, or for "all" every word of its prompt.

    Raises `UserError` for a word that a prompt does not have, and if there are no prompts.
    """
    path, prompts = join(context.path, "words"), context.run.prompts
    if prompts is None or any(prompt is None for prompt in prompts):
        raise UserError(f"{path}: {requested}, but the run has no prompts to find words in")
    if requested == "all":
        return [_all_words(prompt, path) for prompt in prompts]
    return [[(word, find_word(prompt, word, path)) for word in requested] for prompt in prompts]


def _all_words(prompt: Prompt, path: str) -> list[tuple[str, list[int]]]:
    """Return every word of a prompt in order, without those that were truncated. Repeated words are cat#1, cat#2."""
    words = named_words(prompt)
    if not words:
        raise UserError(f"{path}: all, but the prompt {prompt.text!r} has no words")
    return words


def word_axis(names: Sequence[Sequence[str]]) -> Axes:
    """Return the axis `word`. Where samples have different words, the coordinate `text` has those of each, or ""."""
    most = max(len(words) for words in names)
    if all(list(words) == list(names[0]) for words in names):
        return named_axis("word", names[0])
    padded = [[*words, *[""] * (most - len(words))] for words in names]
    return Axes(("word",), (most,), (most,), {"text": (("sample", "word"), padded)})
