"""Greyscale images for overlays. Colours of equal luminance stay apart, and faint contrast is raised.

The luminance formula of an ordinary greyscale image maps, say, a purple object and its green background to one grey:
the object disappears. Here the channel weights are chosen for each image, as in C. Lu, L. Xu and J. Jia, "Real-time
contrast preserving decolorization", SIGGRAPH Asia Technical Briefs 2012.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

DARKEST, BRIGHTEST = 0.12, 0.72
"""The range of the greys: an overlay's darkest and brightest colours lie outside of it."""

MOST_GAIN = 3.0
"""The largest factor by which contrast is raised. An even image stays even."""

SIDE = 64
"""Pixels on the longer side of the copy from which a formula is computed."""

SPREAD = 0.05
"""How far the contrast of two greys may be from that of their colours: σ in the paper."""

WEIGHTS = np.array([(r, g, 10 - r - g) for r in range(11) for g in range(11 - r)]) / 10
"""Candidate weights of red, green and blue, `(66, 3)`, from 0 to 1 in steps of 0.1 with sum 1."""


def grey_formula(image: "Image") -> tuple[float, float, float, float]:
    """Return (red, green, blue, offset), such that grey = red·R + green·G + blue·B + offset, with channels in 0 … 1.

    Values outside of 0 … 1 are to be clipped. An SVG `feColorMatrix` takes the same numbers.
    """
    pixels = np.asarray(_sampled(image), dtype=np.float64).reshape(-1, 3) / 255
    weights = _weights(pixels)
    low, high = np.percentile(pixels @ weights, (1, 99))
    gain = min((BRIGHTEST - DARKEST) / max(high - low, 1e-9), MOST_GAIN)
    middle = np.clip((low + high) / 2, DARKEST + gain * (high - low) / 2, BRIGHTEST - gain * (high - low) / 2)
    offset = middle - gain * (low + high) / 2
    return (*(float(gain * weight) for weight in weights), float(offset))


def to_grey(image: "Image") -> "Image":
    """Return the image in grey by its `grey_formula`, as an RGB image of the same size."""
    from PIL import Image

    *weights, offset = grey_formula(image)
    grey = np.asarray(image.convert("RGB"), dtype=np.float64) @ np.array(weights) + 255 * offset
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")


def _sampled(image: "Image") -> "Image":
    """Return an RGB copy with at most `SIDE` pixels on the longer side. Pixels are not averaged: their range stays."""
    from PIL import Image

    scale = min(1, SIDE / max(image.size))
    width, height = (max(1, round(scale * length)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)


def _weights(pixels: np.ndarray) -> np.ndarray:
    """Return the candidate that keeps the contrast of pairs of pixels best. pixels: `(n, 3)` in 0 … 1."""
    order = np.random.default_rng(0).permutation(len(pixels))
    differences = np.concatenate((pixels - pixels[order], pixels - np.roll(pixels, 1, 0)))
    contrast = np.linalg.norm(differences, axis=1) / 3**0.5
    shown = np.abs(differences @ WEIGHTS.T)  # the sign is free: which of two colours is the brighter does not matter
    # A pair of different colours costs nothing if its greys differ as much.
    return WEIGHTS[np.exp(-(((shown - contrast[:, None]) / SPREAD) ** 2) / 2).mean(0).argmax()]
