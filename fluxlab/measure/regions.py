"""Regions of binary masks (H, W): what hangs together, boxes, openings. In numpy alone."""

import numpy as np

Box = tuple[int, int, int, int]  # (top, left, bottom, right) in pixels, ends excluded


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the 8-connected regions of a mask: int (H, W) with 0 outside and 1 ... n inside, and n."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, stops = np.argwhere(edges == 1), np.argwhere(edges == -1)  # runs, row by row; stops excluded
    parent = list(range(len(starts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    runs = [(row, start, stop) for (row, start), (_, stop) in zip(starts.tolist(), stops.tolist(), strict=True)]
    above = 0  # the first run of the row above that can still touch this one or a later one
    for i, (row, start, stop) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] < start):
            above += 1
        j = above
        while runs[j][0] == row - 1 and runs[j][1] <= stop:  # a corner is enough
            one, other = root(i), root(j)
            parent[max(one, other)] = min(one, other)
            j += 1
    numbers: dict[int, int] = {}
    found = np.zeros(mask.shape, dtype=np.int64)
    for i, (row, start, stop) in enumerate(runs):
        found[row, start:stop] = numbers.setdefault(root(i), len(numbers) + 1)
    return found, len(numbers)


def areas(found: np.ndarray, count: int, of: np.ndarray | None = None) -> np.ndarray:
    """How many pixels (of a mask, if given) each region 0 ... count has; outside the regions counts as none."""
    totals = np.bincount(found.ravel() if of is None else found[of], minlength=count + 1)
    totals[0] = 0
    return totals


def bounds(mask: np.ndarray) -> Box:
    """The smallest box around a mask, which must hold at least one pixel."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1


def middle(box: Box) -> tuple[float, float]:
    """The middle of a box, (row, col) in pixels."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _slide(mask: np.ndarray, side: int, combine: np.ufunc, outside: bool) -> np.ndarray:
    for axis in (0, 1):
        padded = np.pad(
            mask, [(side // 2, side // 2) if a == axis else (0, 0) for a in (0, 1)], constant_values=outside
        )
        mask = combine.reduce([np.take(padded, range(d, d + mask.shape[axis]), axis) for d in range(side)])
    return mask


def erode(mask: np.ndarray, side: int) -> np.ndarray:
    """Keep the pixels whose square of an odd side around them is wholly inside; beyond the frame counts as inside."""
    return _slide(mask, side, np.logical_and, True)


def dilate(mask: np.ndarray, side: int) -> np.ndarray:
    """Add the pixels whose square of an odd side around them touches the mask."""
    return _slide(mask, side, np.logical_or, False)
