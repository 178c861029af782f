"""Images for a page that is one file: data URLs within a budget of bytes, and one palette for all plots."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageColor

from fluxlab.files import write_atomic
from fluxlab.images import open_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET = 3_000_000
"""Bytes of a page's images. Base64 adds a third. With text and position plots a page stays below 5 MB."""

SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)  # px of the longer side that large images are reduced to
SAMPLE = 8  # images from which the size of all is estimated
QUALITY = 85  # of WebP: no visible blocks or colour fringes on flat scenes and lettering
TINTS, GREYS, RAMP = 5, 17, 64  # entries of a plot's palette: tints of each colour, greys, steps of the colour map


@dataclass(frozen=True)
class Picture:
    """A data URL, and (width, height) of the image as embedded and as stored, in pixels."""

    url: str
    size: tuple[int, int]
    stored: tuple[int, int]


def embed(files: Iterable[Path], budget: int = BUDGET) -> dict[Path, Picture]:
    """Return a `Picture` of every file that exists, together within `budget` bytes.

    Files are embedded unchanged if the budget allows, otherwise as WebP, reduced to the first of `SIDES` that fits. If
    none fits, the last one is used. Raises UserError for a file that is not an image.
    """
    existing = [file for file in dict.fromkeys(files) if file.is_file()]
    if sum(file.stat().st_size for file in existing) <= budget:
        return {file: _as_stored(file) for file in existing}
    sample = [open_cell(file) for file in existing[:: max(1, len(existing) // SAMPLE)]]
    longest = max(max(image.size) for image in sample)
    for side in (longest, *(side for side in SIDES if side < longest)):
        expected = sum(len(_webp(image, side)[0]) for image in sample) / len(sample) * len(existing)
        if expected > budget and side > SIDES[-1]:
            continue
        pictures, total = {}, 0
        for file in existing:
            image = open_cell(file)
            content, size = _webp(image, side)
            pictures[file] = Picture(data_url(content, "webp"), size, image.size)
            total += len(content)
        if total <= budget:
            break
    return pictures


def fitting(files: Iterable[Path], budget: int) -> dict[Path, Picture]:
    """Return the first files that exist as WebP in full size, as many as `budget` bytes hold.

    Raises UserError for a file that is not an image.
    """
    pictures: dict[Path, Picture] = {}
    for file in dict.fromkeys(files):
        if file.is_file():
            image = open_cell(file)
            content, size = _webp(image, max(image.size))
            budget -= len(content)
            if budget < 0:
                break
            pictures[file] = Picture(data_url(content, "webp"), size, image.size)
    return pictures


def note(pictures: Sequence[Picture]) -> str:
    """Return a sentence about images that are reduced or compressed, "" if all are embedded as stored."""
    if not any(picture.url.startswith("data:image/webp") for picture in pictures):
        return ""
    stored, shown = (
        max((getattr(picture, key) for picture in pictures), key=max, default=(0, 0)) for key in ("stored", "size")
    )
    size = f"{stored[0]} × {stored[1]} px, shown at {shown[0]} × {shown[1]}" if stored != shown else "in full size"
    return f"Images are {size}, compressed as WebP. The originals are in the run folder's cells/."


def fitted_size(size: tuple[int, int], room: tuple[float, float]) -> tuple[int, int]:
    """Return the (width, height) of `fit_image` for an image of a size."""
    scale = min(side / length for side, length in zip(room, size, strict=True))
    if scale >= 1:
        return size[0] * int(scale), size[1] * int(scale)
    return tuple(max(1, int(min(side, round(n * scale)))) for side, n in zip(room, size, strict=True))


def fit_image(image: Image.Image, room: tuple[float, float]) -> Image.Image:
    """Return an image of at most (width, height) pixels, in its own proportions.

    It is enlarged by a whole factor, so that its pixels stay visible, or reduced.
    """
    size = fitted_size(image.size, room)
    return image.resize(size, Image.Resampling.NEAREST if size >= image.size else Image.Resampling.LANCZOS)


def plot_png(figure: "Figure") -> tuple[bytes, tuple[int, int]]:
    """Return a plot as PNG with the palette that all plots share, and its (width, height).

    A palette per plot would be as small, but would move a colour that only a few pixels have, such as a legend entry's.
    `savefig` has the same pixels; it lays out and draws everything twice.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    image = drawn.quantize(palette=_palette(), dither=Image.Dither.NONE)
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return content.getvalue(), image.size


@cache
def _palette() -> Image.Image:
    """Return a P image with tints of the colours that plots use, greys, and the colour map of axis 0."""
    from matplotlib import colormaps

    from fluxlab.drawing.style import OKABE_ITO  # loads torch, which the grid does without

    colours = [
        tuple(round(255 + (channel - 255) * tint / TINTS) for channel in ImageColor.getrgb(colour))
        for colour in OKABE_ITO.values()
        for tint in range(1, TINTS + 1)
    ]
    colours += [(round(255 * i / (GREYS - 1)),) * 3 for i in range(GREYS)]
    colours += [tuple(round(255 * c) for c in colormaps["cividis"](i / (RAMP - 1))[:3]) for i in range(RAMP)]
    colours = list(dict.fromkeys(colours))
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for colour in colours for channel in colour])
    return palette


def put(file: Path, content: bytes) -> Path:
    """Write a file atomically, unless it already has this content. Returns the file."""
    if not (file.is_file() and file.read_bytes() == content):
        write_atomic(file, content)
    return file


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def open_cell(file: Path) -> Image.Image:
    """Return a cell's image in RGB. Raises UserError if its file is missing or not an image."""
    return open_image(file, remedy="remove it and run the command of its run folder again")


def _as_stored(file: Path) -> Picture:
    size = open_cell(file).size
    return Picture(data_url(file.read_bytes(), "png"), size, size)


def _webp(image: Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    """Return the image as WebP with at most `side` pixels on the longer side, and its (width, height) then."""
    scale = side / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    content = io.BytesIO()
    image.save(content, "webp", quality=QUALITY)
    return content.getvalue(), image.size
