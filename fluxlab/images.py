"""Open image files. This is the only place that does."""

from os import PathLike
from typing import TYPE_CHECKING

from fluxlab.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def open_image(file: "str | PathLike[str]", mode: str | None = "RGB") -> "Image.Image":
    """Return the image in `file`, loaded and converted to `mode`. With `mode=None`, keep the file's own mode.

    Raises `UserError` if the file is missing, cut short, or not an image.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image if mode is None or image.mode == mode else image.convert(mode)
    except FileNotFoundError:
        raise UserError(f"{file}: image not found") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        raise UserError(f"{file}: not a readable image ({error})") from error


def read_pixels(file: "str | PathLike[str]") -> "np.ndarray":
    """Return the image in `file` as a uint8 array `(H, W, 3)`. Raises like `open_image`."""
    import numpy as np

    return np.asarray(open_image(file))
