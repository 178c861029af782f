"""A figure laid out dot by dot, so that a picture's pixels are whole numbers of the PNG's dots."""

from typing import TYPE_CHECKING

from PIL import Image

from experiments.style import figure
from fluxlab.drawing.lettering import one_line, truncate, wrap
from fluxlab.experiment.spec import REFERENCE_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
"""Of the PNG; dots are counted from the top left corner."""

POINTS, SMALL = 7, 6
LINES = {REFERENCE_NAMES[0]: ("green", (0, (1, 1))), REFERENCE_NAMES[1]: ("vermillion", (0, (5, 2)))}
"""What every effect stands beside, by colour and by dashes."""


def blank(width: float, height: int) -> "tuple[Figure, Axes]":
    """A figure of so many inches by so many dots, and axes over all of it whose unit is a dot."""
    # a hair more than whole, which must not round down to a dot less
    whole = figure(width, (height + 0.01) / DPI)
    whole.set_layout_engine("none")
    canvas = whole.add_axes((0, 0, 1, 1), xlim=(0, round(width * DPI)), ylim=(height, 0), autoscale_on=False)
    canvas.axis("off")
    return whole, canvas


def add_axes(canvas: "Axes", left: int, top: int, width: int, height: int, **settings) -> "Axes":
    """Axes in a box of the canvas."""
    across, down = canvas.get_xlim()[1], canvas.get_ylim()[0]
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    return canvas.figure.add_axes(box, **settings)


def dots(points: float) -> int:
    return round(points / 72 * DPI)


def write(axes: "Axes", x: float, y: float, text: str, size: float, **looks) -> None:
    axes.text(x, y, text, size=size, parse_math=False, **looks)  # a $ in a prompt is a $


def lettered(text: str, points: float, width: float, most: int) -> list[str]:
    """A text in lines of at most so many dots."""
    return truncate(wrap(one_line(text), dots(points), width)[0], most, dots(points), width)


def sized(image: Image.Image, room: tuple[float, float]) -> Image.Image:
    """A picture of so many dots at most: enlarged by a whole factor, so that pixels stay pixels, or reduced."""
    scale = min(side / own for side, own in zip(room, image.size, strict=True))
    size = [max(1, int(own * (int(scale) if scale >= 1 else scale))) for own in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def lay(canvas: "Axes", image: Image.Image, x: int, y: int) -> None:
    """A picture, a dot a pixel, with its top left corner at (x, y)."""
    limits = canvas.get_xlim(), canvas.get_ylim()
    extent = (x, x + image.width, y + image.height, y)
    canvas.imshow(image, extent=extent, aspect="auto", interpolation="none", zorder=1)
    canvas.set(xlim=limits[0], ylim=limits[1])
