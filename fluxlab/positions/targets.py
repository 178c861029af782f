"""The targets of `relocate` and the displacement fields of `warp`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, unknown_key, wrong
from fluxlab.positions.tensors import as_tensor
from fluxlab.select.arguments import UNITS, box, choice, is_list, number, per_axis, plain
from fluxlab.select.layout import Layout, Scope
from fluxlab.select.masks import parse_mask
from fluxlab.select.tokens import box_in_tokens, mask_on_grid

SHAPES = ("point", "box", "line", "mask")


def parse_target(value: Any, path: str) -> dict:
    """[row, col], {box}, {line} or {mask} of the image

    Returns `{point | box | line | mask, unit}`. A list is a point in tokens.
    """
    if is_list(value):
        value = {"point": value}
    accepted = f"[row, col], or one of {{{'}, {'.join(SHAPES)}}}"
    if not isinstance(value, Mapping):
        raise wrong(path, value, accepted)
    for key in value:
        if key not in (*SHAPES, "unit"):
            raise unknown_key(path, key, value[key], (*SHAPES, "unit"), "key")
    shapes = [key for key in SHAPES if key in value]
    if len(shapes) != 1:
        raise wrong(path, dict(value), accepted)
    (shape,) = shapes
    parse = {"point": per_axis, "box": box, "line": _line, "mask": parse_mask}[shape]
    default = "fraction" if shape == "mask" else "tokens"
    unit = choice(*UNITS)(value.get("unit", default), join(path, "unit"))
    return {shape: parse(value[shape], join(path, shape)), "unit": unit}


def _line(value: Any, path: str) -> list[list[float]]:
    if not is_list(value) or len(value) != 2 or any(not is_list(end) or len(end) != 2 for end in value):
        raise wrong(path, value, "[[row, col], [row, col]]")
    return [[number(n, f"{path}[{i}][{j}]") for j, n in enumerate(end)] for i, end in enumerate(value)]


def parse_field(value: Any, path: str) -> list[list[list[float]]]:
    """rows of displacements [row, col]

    Returns a field `(h, w, 2)` as nested lists.
    """
    value = plain(value)
    accepted = "rows of points [row, col], all rows of equal length"
    if not is_list(value) or not value or any(not is_list(row) or not row for row in value):
        raise wrong(path, value, accepted)
    if len({len(row) for row in value}) != 1:
        raise wrong(path, value, accepted)
    field = []
    for i, row in enumerate(value):
        for j, point in enumerate(row):
            if not is_list(point) or len(point) != 2:
                raise wrong(f"{path}[{i}][{j}]", point, "[row, col]")
        field.append([[number(n, f"{path}[{i}][{j}][{k}]") for k, n in enumerate(p)] for j, p in enumerate(row)])
    return field


def spread_over(ids: Tensor, scope: Scope, to: dict, spread: str | None) -> Tensor:
    """Return positions `(n, A)` spread over the target `to` (canonical). The index stays unless a point gives one."""
    ((shape, value),) = ((key, to[key]) for key in SHAPES if key in to)
    layout, unit, n = scope.layout, to["unit"], len(ids)
    spread = spread or {"point": "point", "line": "line"}.get(shape, "grid")
    if shape == "point":
        point = _position(value[1:3], unit, layout)
        head = ids[:, :1] if value[0] is None else as_tensor(value[0], ids).expand_as(ids[:, :1])
        if spread != "point":
            raise wrong("spread", spread, "point, since a point has no extent")
        rest = [ids[:, 1 + i] if x is None else as_tensor(x, ids).expand_as(ids[:, 1 + i]) for i, x in enumerate(point)]
        return torch.cat((head, torch.stack(rest, -1), ids[:, 3:]), -1)
    if shape == "line":
        ends = [_position(end, unit, layout) for end in value]
        if spread == "grid":
            raise wrong("spread", spread, "point or line, since a line has no area")
        positions = _along(*ends, n if spread == "line" else 1)
    elif shape == "box":
        positions = _in_box(box_in_tokens(value, unit, layout, "to.box"), spread, n, scope.rectangle())
    else:
        positions = _in_mask(mask_on_grid(value, unit, layout, "to.mask"), spread, n)
    positions = as_tensor(positions, ids).expand(n, 2)
    return torch.cat((ids[:, :1], positions, ids[:, 3:]), -1)


def _position(point: list[float | None], unit: str, layout: Layout) -> list[float | None]:
    """Return a (row, col) of the image as a position.

    The middle of token r lies at r in tokens and at (r + ½) · pixels_per_token in pixels.
    """
    if unit == "tokens":
        return list(point)
    size = [layout.pixels_per_token] * 2 if unit == "pixels" else [1 / n for n in layout.grid]
    return [None if x is None else x / s - 0.5 for x, s in zip(point, size, strict=True)]


def _along(a: list[float], b: list[float], n: int) -> list[list[float]]:
    shares = [i / (n - 1) for i in range(n)] if n > 1 else [0.5]
    return [[p + (q - p) * share for p, q in zip(a, b, strict=True)] for share in shares]


def _in_box(edges: list[float], spread: str, n: int, rectangle: tuple[int, int] | None) -> list[list[float]]:
    """Return the middles of n equal parts of a box. In a box of n tokens these are whole positions."""
    top, left, bottom, right = edges
    if spread != "grid":
        rectangle, n = (1, n), n if spread == "line" else 1
    if rectangle is None or rectangle[0] * rectangle[1] != n:
        rows = max(1, min(n, round(math.sqrt(n * (bottom - top) / (right - left)))))
        rectangle = (rows, math.ceil(n / rows))
    rows, cols = rectangle
    height, width = (bottom - top) / rows, (right - left) / cols
    return [[top + (i // cols + 0.5) * height - 0.5, left + (i % cols + 0.5) * width - 0.5] for i in range(n)]


def _in_mask(inside: Tensor, spread: str, n: int) -> list[list[float]]:
    """Return n positions in a mask.

    grid: the positions of its tokens, taken as evenly as n allows. line: a line through its centre of mass, as wide as
    the mask. point: its centre of mass.
    """
    covered = inside.nonzero().double()
    if not len(covered):
        raise UserError("to.mask: covers no token of the image")
    if spread == "grid":
        return covered[[int((i + 0.5) * len(covered) / n) for i in range(n)]].tolist()
    middle = covered.mean(0).tolist()
    if spread == "point":
        return [middle]
    left, right = covered[:, 1].min().item(), covered[:, 1].max().item()
    return _along([middle[0], left], [middle[0], right], n)
