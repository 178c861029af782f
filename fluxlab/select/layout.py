"""What a program is compiled for: tokens, the model's sizes, the schedule. And what an op sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlab.select.words import Prompt

TEXT, IMAGE, REFERENCE = 0, 1, 2
"""Kinds of tokens; a second reference is REFERENCE + 1, and so on."""


@dataclass(frozen=True)
class Layout:
    """The token sequence: text, then the image's grid in raster order, then each reference's.

    `grid` and `references` are (rows, cols) in tokens.
    """

    text: int
    grid: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()
    pixels_per_token: int = 16

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return (self.grid, *self.references)

    @property
    def tokens(self) -> int:
        return self.text + sum(rows * cols for rows, cols in self.grids)

    def range(self, kind: int) -> tuple[int, int]:
        """First token of a kind, and one past its last."""
        if kind == TEXT:
            return 0, self.text
        sizes = [rows * cols for rows, cols in self.grids]
        start = self.text + sum(sizes[: kind - IMAGE])
        return start, start + sizes[kind - IMAGE]

    def scope(self, tokens: Tensor, axes: Sequence[str] | None = None) -> "Scope":
        """What an op sees of the tokens with these indices `(n,)`."""
        starts = torch.tensor([self.range(k)[0] for k in range(IMAGE + len(self.grids))], device=tokens.device)
        kind = (tokens[:, None] >= starts).sum(1) - 1
        sizes = torch.tensor([(0, 0), *self.grids], device=tokens.device)[kind]
        return Scope(self, kind, tokens - starts[kind], sizes[:, 0], sizes[:, 1], axes and tuple(axes))


@dataclass(frozen=True)
class Scope:
    """What an op may know of the n tokens it is given. Tensors are `(n,)`, whole numbers.

    kind: TEXT, IMAGE or REFERENCE (+ 1, …). index: place within its kind, the text's order or a grid's raster order.
    rows, cols: size of the token's own grid, 0 for text. axes: those named in the edit, None for all.
    """

    layout: Layout
    kind: Tensor
    index: Tensor
    rows: Tensor
    cols: Tensor
    axes: tuple[str, ...] | None = None

    def rectangle(self) -> tuple[int, int] | None:
        """(rows, cols) if the tokens are a full rectangle of one grid in raster order, else None."""
        if not len(self.kind) or self.kind[0] == TEXT or (self.kind != self.kind[0]).any():
            return None
        row, col = self.index // self.cols, self.index % self.cols
        rows, cols = int(row.max() - row.min()) + 1, int(col.max() - col.min()) + 1
        return (rows, cols) if rows * cols == len(self.kind) else None


@dataclass(frozen=True)
class Context:
    """All that a program needs to become rotary tables.

    ids: the untouched ids `(B or 1, N, A)`, fp32 (fp64 for an fp64 model), text first. axes_dim, theta, double, single,
    heads: of the model; double and single count blocks. sigmas: the schedule, 1 → 0, steps + 1 values. prompts: one a
    sample, for edits that name words; a None among them is a text without those words (a negative prompt), on which
    such an edit does nothing.
    """

    ids: Tensor
    layout: Layout
    axes_dim: Sequence[int]
    theta: float
    double: int
    single: int
    heads: int
    sigmas: Sequence[float] = (1.0, 0.0)
    prompts: Sequence[Prompt | None] | None = None

    @property
    def blocks(self) -> int:
        return self.double + self.single

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1
