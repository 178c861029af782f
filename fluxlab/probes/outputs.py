"""The shapes and labels of what is captured, known before anything runs; and which tokens a request names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, wrong
from fluxlab.model.attention import Attended
from fluxlab.probes.arrays import Coords
from fluxlab.probes.stream import Tokens, tokens
from fluxlab.select.layout import IMAGE, Context
from fluxlab.select.tokens import resolve_tokens
from fluxlab.select.words import Prompt, find_word, named_words

ALL = slice(None)

Add = Callable[[str, tuple, Tensor], None]
"""(output, index into its own axes, values `(heads, …)`): adds them up there. A grid of tokens is one axis to it."""

Observe = Callable[[Attended, int, Tensor | None, Add], None]
"""(what a kernel worked with, sample, heads or None for all, where results go)."""


class Place(NamedTuple):
    """Where a request is made: the run, how many samples its batch has, the request's path in its config."""

    context: Context
    samples: int
    path: str


class Axes(NamedTuple):
    """Axes of an output. `flat` is the shape that `Add` sees: a grid as one axis."""

    names: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    flat: tuple[int, ...] = ()
    coords: Coords = {}  # noqa: RUF012 (never changed)

    def __add__(self, other: "Axes") -> "Axes":
        coords = {**self.coords, **other.coords}
        return Axes(self.names + other.names, self.shape + other.shape, self.flat + other.flat, coords)


@dataclass(frozen=True, eq=False)
class Measure:
    """What a request comes down to. outputs: by name, "" for one that takes the request's own.

    blank: (sample, index) of what a sample does not have and is NaN. scratch: bytes that `observe` holds besides one
    stretch of p.
    """

    outputs: Mapping[str, Axes]
    observe: Observe
    unit: str
    blank: tuple[tuple[int, tuple], ...] = ()
    scratch: int = 0


def chosen(selection: Any, place: Place, key: str) -> list[Tokens]:
    """A token selection's places, for each sample. `UserError` naming the path where nothing is selected."""
    where = join(place.path, key)
    return [tokens(resolve_tokens(selection, place.context, b, where)) for b in range(place.samples)]


def chosen_image(selection: Any, place: Place, key: str) -> list[Tokens]:
    """As `chosen`, of the image only: the kind of request is about places in it."""
    found = chosen(selection, place, key)
    start, stop = place.context.layout.range(IMAGE)
    if any(one.index[0] < start or one.index[-1] >= stop for one in found):
        raise wrong(join(place.path, key), selection, "tokens of the image only")
    return found


def span(place: Place, kind: int | None = None) -> Tokens:
    """All tokens of a kind, or of the sequence."""
    layout = place.context.layout
    ends = (0, layout.tokens) if kind is None else layout.range(kind)
    return tokens(torch.arange(*ends, device=place.context.ids.device))


def grid(place: Place) -> tuple[Tensor, Tensor]:
    """Row and column of each image token, `(N,)` fp32."""
    rows, cols = place.context.layout.grid
    at = torch.arange(rows * cols, device=place.context.ids.device)
    return (at // cols).float(), (at % cols).float()


def union(groups: Sequence[Tensor], place: Place) -> tuple[Tokens, Tensor]:
    """The tokens of several groups together, and which are whose: 0 or 1, `(tokens, groups)`."""
    member = torch.zeros(place.context.layout.tokens, len(groups), dtype=torch.float32, device=place.context.ids.device)
    for g, group in enumerate(groups):
        member[group, g] = 1
    index = member.any(1).nonzero()[:, 0]
    return tokens(index), member[index]


def means(member: Tensor) -> Tensor:
    """Weights `(groups, tokens)` that average over each group's tokens."""
    return (member / member.sum(0).clamp(min=1)).T


def named_axis(name: str, labels: Sequence) -> Axes:
    return Axes((name,), (len(labels),), (len(labels),), {name: ((name,), list(labels))})


def token_axes(selections: Sequence[Tokens], place: Place, key: str, prefix: str = "") -> Axes:
    """Axes `row`, `col` for a rectangle of a grid, else `token`, labelled by places in the sequence; `from_row` or
    `from` with a prefix. `UserError` where samples select different numbers of tokens.
    """
    first = selections[0].index
    counts = [len(one) for one in selections]
    if len(set(counts)) > 1:
        raise UserError(f"{join(place.path, key)}: selects {counts} tokens of the samples, expected equal numbers")
    name = prefix or "token"
    if any(not torch.equal(one.index, first) for one in selections):
        labels = {f"{name}_place": (("sample", name), [one.index.tolist() for one in selections])}
        return Axes((name,), (len(first),), (len(first),), labels)
    scope = place.context.layout.scope(first)
    rectangle = scope.rectangle()
    if rectangle is None:
        return named_axis(name, first.tolist())
    names = tuple(f"{prefix}_{part}".strip("_") for part in ("row", "col"))
    rows, cols = (scope.index // scope.cols).tolist(), (scope.index % scope.cols).tolist()
    coords = {names[0]: (names[:1], rows[:: rectangle[1]]), names[1]: (names[1:], cols[: rectangle[1]])}
    return Axes(names, rectangle, (len(first),), coords)


def spelt_words(asked: str | list[str], place: Place) -> list[list[tuple[str, list[int]]]]:
    """For each sample, words with the text tokens that spell them: those asked for, or "all" of its prompt."""
    path, prompts = join(place.path, "words"), place.context.prompts
    if prompts is None or any(prompt is None for prompt in prompts):
        raise UserError(f"{path}: {asked}, but no prompt was given to find them in")
    if asked == "all":
        return [_all_words(prompt, path) for prompt in prompts]
    return [[(word, find_word(prompt, word, path)) for word in asked] for prompt in prompts]


def _all_words(prompt: Prompt, path: str) -> list[tuple[str, list[int]]]:
    """Every word of a prompt in order; repeated ones are cat#1, cat#2. Those cut off are left out."""
    words = named_words(prompt)
    if not words:
        raise UserError(f"{path}: all, but the prompt {prompt.text!r} has no words")
    return words


def word_axis(names: Sequence[Sequence[str]]) -> Axes:
    """Axis `word`; where samples have words of their own, `text` tells them, "" for none."""
    most = max(len(one) for one in names)
    if all(list(one) == list(names[0]) for one in names):
        return named_axis("word", names[0])
    padded = [[*one, *[""] * (most - len(one))] for one in names]
    return Axes(("word",), (most,), (most,), {"text": (("sample", "word"), padded)})
