"""Ops on ids: pure functions that map the positions `(n, A)` of the selected tokens to new ones.

Each is registered under its name in a config. An argument per axis is a number (all axes), [index, row, col],
[row, col], [index, row, col, order] or a mapping; in Python also a tensor. All ops are differentiable in ids and
arguments, except `quantize` and the order that `shuffle` draws. Positions are in tokens: FLUX.1's image token in row r
and column c has (0, r, c). On FLUX.2's fourth axis, the order of text, an op of rows and columns changes nothing.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import op
from fluxlab.positions.targets import parse_field, parse_target, spread_over
from fluxlab.positions.tensors import as_tensor, has_tensor
from fluxlab.select import arguments as types
from fluxlab.select.layout import IMAGE, TEXT, Scope

ROW, COL = 1, 2
PLANE = slice(ROW, COL + 1)

PerAxis = float | Sequence[float | None] | Mapping[str, float] | Tensor
Origin = str | PerAxis

LAYOUTS = ("flux", "flux2", "qwen", "lumina2", "z_image")
"""Models whose ids `layout` reproduces."""

SPELLINGS = {"flux1": "flux", "lumina": "lumina2", "zimage": "z_image"}
"""Other names of these models. A program has the same digest with them."""

ORIGIN = types.word_or(types.per_axis, "corner", "centre")


def axis_values(value: PerAxis, ids: Tensor, otherwise: float | Tensor = 0.0) -> Tensor:
    """Return an argument per axis as `(A,)` in the dtype of ids. Axes that it leaves out are set to `otherwise`."""
    if isinstance(value, Tensor):
        return value.to(ids)
    numbers = types.across(value if has_tensor(value) else types.per_axis(value, "argument"), ids.shape[-1])
    if isinstance(otherwise, Tensor):  # `(n, A)`: an axis that is left out keeps its positions
        filled = [
            otherwise[..., a] if x is None else as_tensor(x, ids).expand_as(otherwise[..., a])
            for a, x in enumerate(numbers)
        ]
        return torch.stack(filled, -1)
    return as_tensor([otherwise if x is None else x for x in numbers], ids)


def origin_of(origin: Origin, ids: Tensor) -> Tensor:
    """Return an origin `(A,)`. corner: position 0, FLUX.1's top left token. centre: the middle of the selection."""
    if isinstance(origin, str) and origin == "corner":
        return torch.zeros_like(ids[0])
    if isinstance(origin, str):
        return (ids.amin(0) + ids.amax(0)) / 2
    return axis_values(origin, ids)


@op("zero")
def zero(ids: Tensor, scope: Scope) -> Tensor:
    """Set every position to 0."""
    return torch.zeros_like(ids)


@op("scale", {"factor": types.per_axis, "origin": ORIGIN})
def scale(ids: Tensor, scope: Scope, factor: PerAxis, origin: Origin = "corner") -> Tensor:
    """Multiply distances from `origin` by `factor`.

    OminiControl's s·p + (s-1)/2 has origin -0.5 (arXiv 2411.15098).
    """
    if isinstance(origin, str) and origin == "corner":
        return ids * axis_values(factor, ids, 1.0)  # the same bits as ids * 1.2 written by hand
    at = origin_of(origin, ids)
    return at + (ids - at) * axis_values(factor, ids, 1.0)


@op("offset", {"by": types.per_axis})
def offset(ids: Tensor, scope: Scope, by: PerAxis) -> Tensor:
    """Add `by` to the positions."""
    return ids + axis_values(by, ids)


@op("set", {"value": types.per_axis})
def set_to(ids: Tensor, scope: Scope, value: PerAxis) -> Tensor:
    """Set every position to `value`, on the axes that it gives."""
    return axis_values(value, ids, ids).expand_as(ids)


@op("relocate", {"to": parse_target, "spread": types.choice("point", "line", "grid")})
def relocate(ids: Tensor, scope: Scope, to: Sequence | Mapping, spread: str | None = None) -> Tensor:
    """Move rows and columns to a target: a point, box, line or mask of the image.

    The tokens are spread over the target in their order. spread: point (all in its middle), line (evenly from left to
    right, or along the line), grid (evenly over the area; a rectangle of tokens keeps its arrangement). The default is
    point for a point, line for a line, else grid. A point may give the index too.
    """
    return spread_over(ids, scope, to if has_tensor(to) else parse_target(to, "to"), spread)


@op("shuffle", {"seed": types.seed})
def shuffle(ids: Tensor, scope: Scope, seed: int = 0) -> Tensor:
    """Exchange the positions of the selected tokens at random."""
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).to(ids.device)]


@op("mirror", {"axis": types.axis})
def mirror(ids: Tensor, scope: Scope, axis: str | int | None = None) -> Tensor:
    """Reflect about the middle of the selection, left to right or along `axis`.

    Without `axis`, the axes that the edit names are reflected.
    """
    names = [types.axis(axis, "axis")] if axis is not None else scope.axes or ("col",)
    reflected = torch.tensor(types.axis_mask(names, ids.shape[-1]), device=ids.device)
    return torch.where(reflected, ids.amin(0) + ids.amax(0) - ids, ids)


@op("transpose")
def transpose(ids: Tensor, scope: Scope) -> Tensor:
    """Exchange row and column."""
    return ids[:, [0, COL, ROW, *range(COL + 1, ids.shape[-1])]]


@op("rotate", {"degrees": types.number, "about": ORIGIN})
def rotate(ids: Tensor, scope: Scope, degrees: float | Tensor, about: Origin = "centre") -> Tensor:
    """Rotate rows and columns by `degrees`, counter-clockwise in the image, about the middle of the selection."""
    # fp64 on the host: fp32 cos and sin differ between processors, and some devices have no fp64
    angle = torch.as_tensor(degrees, dtype=torch.float64, device="cpu") * (math.pi / 180)
    c, s = angle.cos(), angle.sin()
    if not isinstance(degrees, Tensor) and degrees % 90 == 0:  # quarter turns are exact
        c, s = c.round(), s.round()
    c, s = (part.to(ids.dtype).to(ids.device) for part in (c, s))
    at = origin_of(about, ids)
    row, col = (ids - at)[:, ROW], (ids - at)[:, COL]
    rotated = torch.stack((c * row - s * col, s * row + c * col), -1) + at[PLANE]
    return torch.cat((ids[:, :ROW], rotated, ids[:, COL + 1 :]), -1)


@op("warp", {"field": parse_field})
def warp(ids: Tensor, scope: Scope, field: Sequence | Tensor) -> Tensor:
    """Add a displacement field to rows and columns.

    field: `(h, w, 2)` displacements (row, col) in tokens. Its corners lie on the corner tokens of the image, whatever h
    and w. It is bilinear between its points and constant outside the image.
    """
    field = as_tensor(field, ids).permute(2, 0, 1)[None]
    rows, cols = (max(n - 1, 1) for n in scope.layout.grid)
    at = torch.stack((2 * ids[:, COL] / cols - 1, 2 * ids[:, ROW] / rows - 1), -1)[None, None]
    moved = F.grid_sample(field, at, mode="bilinear", padding_mode="border", align_corners=True)[0, :, 0]
    return torch.cat((ids[:, :ROW], ids[:, PLANE] + moved.T, ids[:, COL + 1 :]), -1)


def parse_parts(value: object, path: str) -> list[float | None]:
    """a whole number from 1, [row, col] or {row: 2}"""
    numbers = types.per_axis(value, path)
    if any(n is not None and (n < 1 or n != int(n)) for n in numbers):
        raise UserError(f"{path}: {value}, expected whole numbers from 1")
    return numbers


@op("restart", {"parts": parse_parts})
def restart(ids: Tensor, scope: Scope, parts: PerAxis) -> Tensor:
    """Divide the selection into `parts` bands along an axis, each of which starts where the first one does.

    Bands are whole numbers of tokens long, so that the last one may be shorter. After Infinity-RoPE (arXiv 2511.20649),
    which keeps positions within the trained extent in this way.
    """
    least = ids.amin(0)
    length = ((ids.amax(0) - least + 1).detach() / axis_values(parts, ids, 1.0)).ceil()
    # a rounding error of positions must not move a token to another band
    return ids - length * ((ids - least).detach() / length + 1e-6).floor()


@op("jitter", {"std": types.per_axis, "seed": types.seed})
def jitter(ids: Tensor, scope: Scope, std: PerAxis, seed: int = 0) -> Tensor:
    """Add normal noise with standard deviation `std`, in tokens.

    It is drawn on the CPU for (token, axis) in order. Its last digit depends on the processor, as torch.randn does.
    """
    drawn = torch.randn(ids.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    return ids + drawn.to(ids) * axis_values(std, ids)


@op("quantize", {"to": types.word_or(types.positive, "bfloat16")})
def quantize(ids: Tensor, scope: Scope, to: str | float) -> Tensor:
    """Round to bfloat16, as some implementations do silently, or to multiples of `to`."""
    return ids.to(torch.bfloat16).to(ids.dtype) if to == "bfloat16" else (ids / to).round() * to


@op("centre")
def centre(ids: Tensor, scope: Scope) -> Tensor:
    """Number rows and columns from the middle of the image, as Qwen-Image does.

    They start at -⌈H/2⌉ and -⌈W/2⌉. Selected text lies on a diagonal that starts at max(H, W)//2.
    """
    half = torch.stack((torch.zeros_like(scope.rows), (scope.rows + 1) // 2, (scope.cols + 1) // 2), -1)
    diagonal = (max(scope.layout.grid) // 2 + scope.index)[:, None].expand(-1, 3).to(ids)
    return torch.where((scope.kind == TEXT)[:, None], _widen(diagonal, ids), ids - _widen(half, ids))


@op("layout", {"like": types.choice(*LAYOUTS, spellings=SPELLINGS), "axis": types.axis}, tokens="all")
def layout(ids: Tensor, scope: Scope, like: str, axis: str | int = "index") -> Tensor:
    """Place tokens as another model does. `axis` numbers the text of flux2, lumina2 and z_image.

    flux: text at 0, image at (0, row, col), reference image k at (k + 1, row, col). flux2: text token l at l, reference
    image k at index 10 + 10k; on FLUX.2 itself these are its own ids. lumina2: text token l at l, images at the number
    of text tokens. z_image: text token l at 1 + l, images at the number of text tokens + 1. qwen: rows and columns from
    the middle, text on a diagonal.
    """
    if like == "qwen":
        index = torch.where(scope.kind == TEXT, 0, scope.kind - IMAGE)[:, None].to(ids)
        return centre(_widen(torch.cat((index, _grid(ids, scope)), -1), ids), scope)
    text, is_text = scope.layout.text, scope.kind == TEXT
    number = {"flux": 0 * scope.index, "z_image": 1 + scope.index}.get(like, scope.index)
    image = {"flux": scope.kind - IMAGE, "flux2": 10 * (scope.kind - IMAGE)}.get(like)
    if image is None:
        image = torch.full_like(scope.kind, text if like == "lumina2" else text + 1)
    placed = _widen(torch.cat((image[:, None].to(ids), _grid(ids, scope)), -1), ids)
    own = like == "flux2" and ids.shape[-1] > 3  # FLUX.2's own ids
    line = types.ORDER if own else types.axis(axis, "axis")
    numbered = torch.tensor(types.axis_mask([line], ids.shape[-1]), device=ids.device)
    return torch.where(is_text[:, None], torch.where(numbered, number[:, None], 0).to(ids), placed)


def _widen(x: Tensor, ids: Tensor) -> Tensor:
    """Return `(n, 3)` numbers of index, row and col with zeros for the axes that `ids` has beyond them."""
    return F.pad(x.to(ids), (0, ids.shape[-1] - x.shape[-1]))


def _grid(ids: Tensor, scope: Scope) -> Tensor:
    """Return the row and column of each token in its grid, `(n, 2)`, 0 for text."""
    cols = scope.cols.clamp(min=1)
    place = torch.stack((scope.index // cols, scope.index % cols), -1)
    return torch.where((scope.kind == TEXT)[:, None], 0, place).to(ids)


@op("text_line", {"axis": types.axis, "start": types.number}, tokens="text")
def text_line(ids: Tensor, scope: Scope, axis: str | int, start: float = 0.0) -> Tensor:
    """Number text tokens along `axis`: token l is at `start` + l.

    FLUX.2 and Lumina 2 number them along the index from 0, Z-Image from 1.
    """
    if (scope.kind != TEXT).any():
        raise UserError("tokens: text_line numbers text tokens, expected a selection of text tokens only")
    numbered = torch.tensor(types.axis_mask([types.axis(axis, "axis")], ids.shape[-1]), device=ids.device)
    return torch.where(numbered, (start + scope.index)[:, None].to(ids), ids)
