"""Assign the pixels of an image to the colours that scenes are drawn in."""

import numpy as np

from fluxlab.errors import UserError
from fluxlab.scenes.scene import BACKGROUNDS, BOARD, COLOURS, INK

PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values(), BOARD, INK], dtype=np.float32)
COLOUR_LABELS = len(COLOURS)
"""Labels below this are the colours of things."""

BOARD_LABEL, INK_LABEL = len(PALETTE) - 2, len(PALETTE) - 1


def pixels_of(image) -> np.ndarray:
    """Return RGB as float32 (H, W, 3) in 0 ... 255, from uint8, from floats in 0 ... 1 or from a PIL image."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape) < 1:
        raise UserError(f"image: shape {array.shape}, expected (height, width, 3)")
    if array.dtype == np.uint8:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"image: dtype {array.dtype}, expected uint8 in 0 ... 255 or floats in 0 ... 1")
    array = np.nan_to_num(array.astype(np.float32))
    if array.min() < -0.5 or array.max() > 1.5:  # samplers exceed 0 ... 1 a little
        raise UserError(f"image: values {array.min():.3g} ... {array.max():.3g}, expected floats in 0 ... 1")
    return np.clip(array, 0, 1) * 255


def labels_of(pixels: np.ndarray) -> np.ndarray:
    """Return the index in `PALETTE` of the nearest colour, (H, W)."""
    # |p - c|² without |p|², which is equal for all colours
    return ((PALETTE**2).sum(1) - 2 * pixels @ PALETTE.T).argmin(axis=2)
