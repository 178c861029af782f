"""What a program is compiled for: the token layout, the sizes of the model, the schedule. And what an op sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlab.select.words import Prompt

TEXT, IMAGE, REFERENCE = 0, 1, 2
"""Kinds of tokens. The second reference image is REFERENCE + 1, and so on."""


@dataclass(frozen=True)
class Layout:
    """The token layout of a sequence: text, then the image grid row by row, then the grid of each reference image.

    `grid` and `references` are (rows, cols) in tokens. further: tokens of the texts of regions, behind those of the
    prompt, which are no part of the kind TEXT.
    """

    text: int
    grid: tuple[int, int]
    references: tuple[tuple[int, int], ...] = ()
    further: int = 0
    pixels_per_token: int = 16

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return (self.grid, *self.references)

    @property
    def tokens(self) -> int:
        return self.text + self.further + sum(rows * cols for rows, cols in self.grids)

    def range(self, kind: int) -> tuple[int, int]:
        """Return the first token of a kind and one past its last."""
        if kind == TEXT:
            return 0, self.text
        sizes = [rows * cols for rows, cols in self.grids]
        start = self.text + self.further + sum(sizes[: kind - IMAGE])
        return start, start + sizes[kind - IMAGE]

    def span(self, group: str) -> tuple[int, int]:
        """Return the first token of `text`, `image`, `all` or `reference` (all of them), and one past its last."""
        if group == "reference":
            return self.range(IMAGE)[1], self.tokens
        ends = {"text": (TEXT, TEXT), "image": (IMAGE, IMAGE), "all": (TEXT, IMAGE + len(self.references))}
        first, last = ends[group]
        return self.range(first)[0], self.range(last)[1]

    def scope(self, tokens: Tensor, axes: Sequence[str] | None = None) -> "Scope":
        """Return what an op sees of the tokens with these indices `(n,)`."""
        starts = torch.tensor([self.range(k)[0] for k in range(IMAGE + len(self.grids))], device=tokens.device)
        kind = (tokens[:, None] >= starts).sum(1) - 1
        sizes = torch.tensor([(0, 0), *self.grids], device=tokens.device)[kind]
        return Scope(self, kind, tokens - starts[kind], sizes[:, 0], sizes[:, 1], axes and tuple(axes))


@dataclass(frozen=True)
class Scope:
    """What an op sees of its n tokens. Tensors have shape `(n,)` and hold whole numbers.

    kind: TEXT, IMAGE or REFERENCE (+ 1, …). index: number of the token within its kind, row by row in a grid. rows,
    cols: size of the grid that the token belongs to, 0 for text. axes: those named in the edit, None for all.
    """

    layout: Layout
    kind: Tensor
    index: Tensor
    rows: Tensor
    cols: Tensor
    axes: tuple[str, ...] | None = None

    def rectangle(self) -> tuple[int, int] | None:
        """Return (rows, cols) if the tokens fill a rectangle of one grid, else None."""
        if not len(self.kind) or self.kind[0] == TEXT or (self.kind != self.kind[0]).any():
            return None
        row, col = self.index // self.cols, self.index % self.cols
        rows, cols = int(row.max() - row.min()) + 1, int(col.max() - col.min()) + 1
        return (rows, cols) if rows * cols == len(self.kind) else None


def token_name(scope: Scope, n: int) -> str:
    """Return the name of the n-th token of a scope, such as `image token 17 (row 1, col 1)`."""
    kind, index = int(scope.kind[n]), int(scope.index[n])
    if kind == TEXT:
        return f"text token {index}"
    row, col = divmod(index, int(scope.cols[n]))
    name = "image" if kind == IMAGE else f"reference {kind - REFERENCE}"
    return f"{name} token {index} (row {row}, col {col})"


@dataclass(frozen=True)
class Context:
    """Everything needed to turn a program into rotary tables.

    ids: the unchanged ids `(B or 1, N, A)`, fp32 (fp64 for an fp64 model), text first.
    axes_dim, theta, heads: of the model. double, single: its numbers of blocks.
    mlp_ratio: width of the MLP by that of the hidden states.
    sigmas: the schedule from 1 to 0, one value more than steps.
    prompts: one for each sample, for edits that name words. None stands for a negative prompt, on which such an edit
    does nothing.
    trained, trained_text: the grid (rows, cols) and the number of text tokens that the model was trained on. The
    defaults are FLUX.1's.
    device: of the model, where probes compute. None: that of `ids`. Programs are resolved where `ids` are.
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
    trained: tuple[int, int] = (64, 64)
    trained_text: int = 512
    mlp_ratio: float = 4.0
    device: torch.device | None = None

    @property
    def blocks(self) -> int:
        return self.double + self.single

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1
