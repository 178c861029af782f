"""Open image files. This is the only place that does."""

from os import PathLike
from typing import TYPE_CHECKING

from fluxlab.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def open_image(file: "str | PathLike[str]", mode: str | None = "RGB", remedy: str = "") -> "Image.Image":
    """Return the image in `file`, loaded and converted to `mode`. With `mode=None`, keep the file's own mode.

    Transparent pixels become white in RGB. Raises `UserError`, which ends in `remedy`, if the file is missing, cut
    short, or not an image.
    """
    from PIL import Image

    advice = f"; {remedy}" if remedy else ""
    try:
        with Image.open(file) as image:
            image.load()
            return _converted(image, mode)
    except FileNotFoundError:
        raise UserError(f"{file}: image not found{advice}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        raise UserError(f"{file}: not a readable image ({error}){advice}") from error


def _converted(image: "Image.Image", mode: str | None) -> "Image.Image":
    from PIL import Image

    if mode is None or image.mode == mode:
        return image
    if mode == "RGB" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def read_pixels(file: "str | PathLike[str]") -> "np.ndarray":
    """Return the image in `file` as a uint8 array `(H, W, 3)`. Raises like `open_image`."""
    import numpy as np

    return np.asarray(open_image(file))
