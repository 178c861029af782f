"""Regions of binary masks (H, W): connected components, bounding boxes, erosion and dilation."""

import numpy as np

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels; bottom and right are excluded."""


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the 8-connected regions of a mask.

    Returns an integer array (H, W), 0 outside and 1 ... n inside, and n. Regions are numbered in the order of their
    first pixel, row by row.
    """
    from scipy.ndimage import label

    return label(mask, np.ones((3, 3)))


def areas(labels: np.ndarray, count: int, within: np.ndarray | None = None) -> np.ndarray:
    """Return the number of pixels of each label 0 ... count. Label 0, the outside, has 0.

    within: count only the pixels of this mask.
    """
    totals = np.bincount(labels.ravel() if within is None else labels[within], minlength=count + 1)
    totals[0] = 0
    return totals


def bounds(mask: np.ndarray) -> Box:
    """Return the bounding box of a mask with at least one pixel."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1


def middle(box: Box) -> tuple[float, float]:
    """Return the middle of a box as (row, col) in pixels."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def erode(mask: np.ndarray, side: int) -> np.ndarray:
    """Erode a mask by a square of an odd side. Pixels outside the image count as set."""
    from scipy.ndimage import binary_erosion

    return binary_erosion(mask, np.ones((side, side)), border_value=1)


def dilate(mask: np.ndarray, side: int) -> np.ndarray:
    """Dilate a mask by a square of an odd side. Pixels outside the image count as not set."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(mask, np.ones((side, side)))
