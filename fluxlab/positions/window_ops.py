"""Ops that give several positions to each token. Attention is computed with each of them, and its outputs averaged."""

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import op
from fluxlab.select.arguments import AXES, per_axis
from fluxlab.select.layout import Scope

MOST_WINDOWS = 31
"""Attention is computed this many times at most: 2s - 1 windows of s = 16."""


def sizes(value: object, path: str) -> list[float | None]:
    """a whole number from 1, [row, col] or {row: 2}"""
    numbers = per_axis(value, path)
    if any(n is not None and (n < 1 or n != int(n)) for n in numbers):
        raise UserError(f"{path}: {value}, expected whole numbers from 1")
    if numbers[0] is not None and None in numbers[1:3]:
        raise UserError(f"{path}: {value}, expected sizes of rows and columns")
    return numbers


@op("windows", {"size": sizes}, acts_on="windows", axes=("row", "col"))
def windows(ids: Tensor, scope: Scope, trained: tuple[int, int], size: list[float | None] | None = None) -> Tensor:
    """Let neighbours share positions, `size` of them each, and average attention over shifted boundaries.

    A position x of an axis becomes ⌈(x + 1 - n)/s⌉, or 0 for x < n. x is counted from the smallest position of the
    selected tokens on the axis. The first boundary n is slid along rows, then along columns, which makes 2s - 1 windows
    of equal sizes s. By default s is the smallest size whose positions fit the trained extent. With s = 1 nothing
    changes. HRDiT (arXiv 2608.07003).

    ids: `(n, A)`. trained: rows and columns of training. Returns `(windows, n, A)`.
    """
    exact = ids.detach().double()
    least = exact.amin(0)
    places = exact - least
    steps = [1] * ids.shape[1]
    for axis in (1, 2):
        if scope.axes is not None and AXES[axis] not in scope.axes:
            continue
        if size is not None:
            steps[axis] = int(size[axis] or 1)
        else:
            span, most = float(places[:, axis].max()), max(1, trained[axis - 1] - 1)
            steps[axis] = max(1, -(-int(-(-span // 1)) // most))
    rows, cols = steps[1:3]
    if rows + cols - 1 > MOST_WINDOWS:
        raise UserError(f"size: {rows} and {cols} make {rows + cols - 1} windows, expected at most {MOST_WINDOWS}")
    starts = [(rows, cols), *((n, cols) for n in range(1, rows)), *((rows, m) for m in range(1, cols))]
    return torch.stack([_shared(ids, places, least, (rows, cols), start) for start in starts])


def _shared(ids: Tensor, places: Tensor, least: Tensor, size: tuple[int, int], start: tuple[int, int]) -> Tensor:
    """Return the positions of one window: `start` is the first boundary of rows and columns."""
    columns = [ids[:, 0]]
    for axis, (s, n) in enumerate(zip(size, start, strict=True), start=1):
        x = places[:, axis]
        # a rounding error of positions must not move a token over a boundary
        shared = torch.where(x < n - 1e-4, 0.0, torch.ceil((x + 1 - n) / s - 1e-4))
        columns.append(ids[:, axis] if s == 1 else (least[axis] + shared).to(ids.dtype))
    return torch.cat((torch.stack(columns, 1), ids[:, 3:]), dim=1)
