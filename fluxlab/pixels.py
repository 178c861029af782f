"""Images as tensors: what `encode` and `invert` accept, and what `decode` returns."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError, show

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Images = Any
"""A PIL image, array or tensor, a batch, or a list of these: see `image_tensor`."""

RANGES = ((0, 1), (-1, 1))
_PIL_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
_ROUNDING = 1e-3  # how far a float may exceed its range: 16-bit floats and resampling round


def image_tensor(images: Any, value_range: tuple[float, float] = (0, 1)) -> Float[Tensor, "b 3 h w"]:
    """Return one image, a batch, or a list of images of one size as a tensor `(B, 3, H, W)`, fp32 in 0 … 1.

    Accepts PIL images without transparency, uint8 arrays and tensors `(H, W, 3)` or `(B, H, W, 3)`, float arrays of
    these shapes, and float tensors `(3, H, W)` or `(B, 3, H, W)`. Floats are in `value_range`: (0, 1), or (-1, 1) if
    said so. Raises `UserError`, in one line, for anything else: another shape, dtype or range, NaN, or no image.
    """
    if tuple(value_range) not in RANGES:
        raise UserError(f"value_range={value_range!r}: expected (0, 1) or (-1, 1)")
    parts = [_one(image, tuple(value_range)) for image in (images if isinstance(images, list | tuple) else [images])]
    if not parts or not all(map(len, parts)):
        raise UserError("images: expected at least one image")
    sizes = sorted({tuple(part.shape[-2:]) for part in parts})
    if len(sizes) != 1:
        raise UserError(f"images have the sizes {sizes} (height, width): expected one size")
    return torch.cat(parts)


def _one(image: Any, value_range: tuple[float, float]) -> Tensor:
    """Return one image or batch as a tensor `(B, 3, H, W)`, fp32 in 0 … 1."""
    import numpy as np
    from PIL import Image

    if isinstance(image, Image.Image):
        image = _rgb(image)
    if not isinstance(image, np.ndarray | Tensor):
        raise UserError(f"images hold {show(image)}: expected PIL images, arrays or tensors")
    tensor = torch.from_numpy(np.require(image, None, ["C", "W"])) if isinstance(image, np.ndarray) else image
    whole = tensor.dtype == torch.uint8
    if not whole and not tensor.is_floating_point():
        raise UserError(f"image of dtype {image.dtype}: expected uint8, or floats in 0 … 1")
    channels_last = whole or isinstance(image, np.ndarray)
    form = "(H, W, 3) or (B, H, W, 3)" if channels_last else "(3, H, W) or (B, 3, H, W)"
    if tensor.ndim not in (3, 4) or tensor.shape[-1 if channels_last else -3] != 3 or 0 in tensor.shape[-3:]:
        kind = f"{'uint8' if whole else 'float'} {'array' if isinstance(image, np.ndarray) else 'tensor'}"
        raise UserError(f"image of shape {tuple(tensor.shape)}: expected {form} for a {kind}")
    tensor = tensor if tensor.ndim == 4 else tensor[None]
    tensor = tensor.permute(0, 3, 1, 2) if channels_last else tensor
    return tensor.float() / 255 if whole else _unit(tensor.float(), value_range)


def _unit(values: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return floats of `value_range` in 0 … 1. Raises `UserError` for values outside of it."""
    if not values.isfinite().all():
        raise UserError("image with NaN or infinity: expected finite floats")
    low, high = value_range
    if values.numel() and (values.min() < low - _ROUNDING or values.max() > high + _ROUNDING):
        hint = "; for -1 … 1 pass value_range=(-1, 1)" if low == 0 and values.min() >= -1 - _ROUNDING else ""
        raise UserError(
            f"image with values from {values.min():.3g} to {values.max():.3g}: expected floats in {low} … {high}{hint}"
        )
    return values if low == 0 else (values + 1) / 2


def _rgb(image: "Image.Image") -> "np.ndarray":
    """Return a PIL image as uint8 `(H, W, 3)`. Raises `UserError` if it is transparent or has more than 8 bits."""
    import numpy as np

    if image.mode not in _PIL_MODES:
        raise UserError(f"PIL image of mode {image.mode}: expected 8 bits per channel, such as RGB or L")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise UserError("image with transparent pixels: expected an opaque one; put it on a background first")
    return np.array(image.convert("RGB"))


def to_pil(images: Tensor) -> "list[Image.Image]":
    """Return a tensor `(B, 3, H, W)` in 0 … 1 as PIL images."""
    from PIL import Image

    array = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]
