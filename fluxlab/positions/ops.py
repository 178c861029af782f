"""Ops on ids: pure functions `(n, A)` → `(n, A)` of the positions of the tokens that an edit selects.

Each is registered under the word that a config uses. Arguments one an axis are a number (all axes), [index, row, col],
[row, col] or a mapping; called from Python, tensors too, and every op but quantize and shuffle's order is
differentiable in ids and arguments. Positions are in tokens: FLUX.1's image token in row r, column c has (0, r, c).
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import op
from fluxlab.positions.targets import grid_field, place, targets
from fluxlab.select import arguments as kind
from fluxlab.select.layout import TEXT, Scope

ROW, COL = 1, 2

PerAxis = float | Sequence[float | None] | Mapping[str, float] | Tensor
Origin = str | PerAxis

ORIGIN = kind.word_or(kind.per_axis, "corner", "centre")


def per_axis(value: PerAxis, ids: Tensor, otherwise: float | Tensor = 0.0) -> Tensor:
    """A per-axis argument as `(A,)` in the dtype of ids; axes that it leaves out get `otherwise`."""
    if isinstance(value, Tensor):
        return value.to(ids)
    numbers = kind.per_axis(value, "argument")
    if isinstance(otherwise, Tensor):  # `(n, A)`: what is left out keeps its positions
        filled = [
            otherwise[..., a] if x is None else torch.full_like(otherwise[..., a], x) for a, x in enumerate(numbers)
        ]
        return torch.stack(filled, -1)
    return torch.tensor([otherwise if x is None else x for x in numbers], dtype=ids.dtype, device=ids.device)


def origin_of(origin: Origin, ids: Tensor) -> Tensor:
    """`(A,)`. corner: position 0, where FLUX.1 has the top left token; centre: the middle of the selection."""
    if isinstance(origin, str) and origin == "corner":
        return torch.zeros_like(ids[0])
    if isinstance(origin, str):
        return (ids.amin(0) + ids.amax(0)) / 2
    return per_axis(origin, ids)


@op("zero")
def zero(ids: Tensor, scope: Scope) -> Tensor:
    """Every position 0."""
    return torch.zeros_like(ids)


@op("scale", {"factor": kind.per_axis, "origin": ORIGIN})
def scale(ids: Tensor, scope: Scope, factor: PerAxis, origin: Origin = "corner") -> Tensor:
    """Distances from `origin` × `factor`. OminiControl's s·p + (s-1)/2 has origin -0.5 (arXiv 2411.15098)."""
    if isinstance(origin, str) and origin == "corner":
        return ids * per_axis(factor, ids, 1.0)  # ×1.2 to the last bit what a user writes by hand
    at = origin_of(origin, ids)
    return at + (ids - at) * per_axis(factor, ids, 1.0)


@op("offset", {"by": kind.per_axis})
def offset(ids: Tensor, scope: Scope, by: PerAxis) -> Tensor:
    """Positions + `by`."""
    return ids + per_axis(by, ids)


@op("set", {"value": kind.per_axis})
def set_to(ids: Tensor, scope: Scope, value: PerAxis) -> Tensor:
    """Every position `value`, on the axes that it gives."""
    return per_axis(value, ids, ids).expand_as(ids)


@op("relocate", {"to": place, "spread": kind.choice("point", "line", "grid")})
def relocate(ids: Tensor, scope: Scope, to: Sequence | Mapping, spread: str | None = None) -> Tensor:
    """Rows and columns to a point, box, line or mask of the image, the tokens spread over it in their order.

    spread: point (all in its middle), line (evenly from left to right, or along the line), grid (evenly over the area;
    a rectangle of tokens keeps its arrangement). Left out: point for a point, line for a line, grid otherwise. A point
    may give the index too.
    """
    return targets(ids, scope, place(to, "to"), spread)


@op("shuffle", {"seed": kind.seed})
def shuffle(ids: Tensor, scope: Scope, seed: int = 0) -> Tensor:
    """The selected tokens exchange their positions at random."""
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).to(ids.device)]


@op("mirror", {"axis": kind.axis})
def mirror(ids: Tensor, scope: Scope, axis: str | int | None = None) -> Tensor:
    """Reflected about the middle of the selection: left and right, or along `axis`, or the axes that the edit names."""
    names = [kind.axis(axis, "axis")] if axis is not None else scope.axes or ("col",)
    chosen = torch.tensor([name in names for name in kind.AXES], device=ids.device)
    return torch.where(chosen, ids.amin(0) + ids.amax(0) - ids, ids)


@op("transpose")
def transpose(ids: Tensor, scope: Scope) -> Tensor:
    """Row and column exchanged."""
    return ids[:, [0, COL, ROW]]


@op("rotate", {"degrees": kind.number, "about": ORIGIN})
def rotate(ids: Tensor, scope: Scope, degrees: float | Tensor, about: Origin = "centre") -> Tensor:
    """Rows and columns turned by `degrees`, counter-clockwise as one sees the picture."""
    # fp64 on the host: fp32 cos and sin differ between processors, and some devices have no fp64
    angle = torch.as_tensor(degrees, dtype=torch.float64, device="cpu") * (math.pi / 180)
    c, s = angle.cos(), angle.sin()
    if not isinstance(degrees, Tensor) and degrees % 90 == 0:  # quarter turns exactly
        c, s = c.round(), s.round()
    c, s = (part.to(ids.dtype).to(ids.device) for part in (c, s))
    at = origin_of(about, ids)
    row, col = (ids - at)[:, ROW], (ids - at)[:, COL]
    turned = torch.stack((c * row - s * col, s * row + c * col), -1) + at[ROW:]
    return torch.cat((ids[:, :ROW], turned), -1)


@op("warp", {"field": grid_field})
def warp(ids: Tensor, scope: Scope, field: Sequence | Tensor) -> Tensor:
    """Rows and columns moved by a displacement field `(h, w, 2)` of (row, col) in tokens.

    Its corners lie on the image's corner tokens, whatever h and w; between its points it is bilinear, outside the image
    constant.
    """
    field = torch.as_tensor(field, dtype=ids.dtype, device=ids.device).permute(2, 0, 1)[None]
    rows, cols = (max(n - 1, 1) for n in scope.layout.grid)
    at = torch.stack((2 * ids[:, COL] / cols - 1, 2 * ids[:, ROW] / rows - 1), -1)[None, None]
    moved = F.grid_sample(field, at, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0]
    return torch.cat((ids[:, :ROW], ids[:, ROW:] + moved.T), -1)


@op("jitter", {"std": kind.per_axis, "seed": kind.seed})
def jitter(ids: Tensor, scope: Scope, std: PerAxis, seed: int = 0) -> Tensor:
    """Normal noise of `std` tokens added, drawn on the CPU for (token, axis) in order."""
    drawn = torch.randn(ids.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    return ids + drawn.to(ids) * per_axis(std, ids)


@op("quantize", {"to": kind.word_or(kind.positive, "bfloat16")})
def quantize(ids: Tensor, scope: Scope, to: str | float) -> Tensor:
    """Rounded to bfloat16, as some implementations do unasked, or to multiples of a step."""
    return ids.to(torch.bfloat16).to(ids.dtype) if to == "bfloat16" else (ids / to).round() * to


@op("centre")
def centre(ids: Tensor, scope: Scope) -> Tensor:
    """Qwen-Image's layout: rows and columns from -⌈H/2⌉ and -⌈W/2⌉; selected text runs diagonally from max(H, W)//2."""
    half = torch.stack((torch.zeros_like(scope.rows), (scope.rows + 1) // 2, (scope.cols + 1) // 2), -1)
    diagonal = (max(scope.layout.grid) // 2 + scope.index)[:, None].expand_as(ids).to(ids)
    return torch.where((scope.kind == TEXT)[:, None], diagonal, ids - half)


@op("text_line", {"axis": kind.axis, "start": kind.number}, tokens="text")
def text_line(ids: Tensor, scope: Scope, axis: str | int, start: float = 0.0) -> Tensor:
    """Text tokens in a row: token l at `start` + l on `axis` (FLUX.2; Lumina 2: index from 0; Z-Image: from 1)."""
    if (scope.kind != TEXT).any():
        raise UserError("tokens: text_line lays out text, select text tokens only")
    chosen = torch.tensor([name == kind.axis(axis, "axis") for name in kind.AXES], device=ids.device)
    return torch.where(chosen, (start + scope.index)[:, None].to(ids), ids)
