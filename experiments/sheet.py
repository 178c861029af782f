"""A figure that is laid out in dots, so that every pixel of an image is a whole number of dots in the PNG."""

from typing import TYPE_CHECKING

from PIL import Image

from experiments.style import figure
from fluxlab.drawing.lettering import one_line, truncate, wrap
from fluxlab.measure.summary import ANOTHER_SEED, NOISE_FLOOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 300
"""Dots per inch of the PNG. Dots are counted from the top left corner."""

POINTS, SMALL = 7, 6
LINES = {NOISE_FLOOR: ("green", (0, (1, 1))), ANOTHER_SEED: ("vermillion", (0, (5, 2)))}
"""Colour and dashes of the two controls."""


def blank(width: float, height: int) -> "tuple[Figure, Axes]":
    """Return a figure of `width` inches by `height` dots, and axes that cover it and count in dots."""
    # slightly more than `height`, so that rounding down never loses a dot
    whole = figure(width, (height + 0.01) / DPI)
    whole.set_layout_engine("none")
    canvas = whole.add_axes((0, 0, 1, 1), xlim=(0, round(width * DPI)), ylim=(height, 0), autoscale_on=False)
    canvas.axis("off")
    return whole, canvas


def add_axes(canvas: "Axes", left: int, top: int, width: int, height: int, **settings) -> "Axes":
    """Add axes in a box of the canvas, in dots."""
    across, down = canvas.get_xlim()[1], canvas.get_ylim()[0]
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    return canvas.figure.add_axes(box, **settings)


def dots(points: float) -> int:
    return round(points / 72 * DPI)


def write(axes: "Axes", x: float, y: float, text: str, size: float, **options) -> None:
    axes.text(x, y, text, size=size, parse_math=False, **options)  # a $ in a prompt is not mathematics


def text_lines(text: str, points: float, width: float, most: int) -> list[str]:
    """Return a text as at most `most` lines of at most `width` dots."""
    return truncate(wrap(one_line(text), dots(points), width)[0], most, dots(points), width)


def place(canvas: "Axes", image: Image.Image, x: int, y: int) -> None:
    """Draw an image with its top left corner at (x, y), one dot per pixel."""
    limits = canvas.get_xlim(), canvas.get_ylim()
    extent = (x, x + image.width, y + image.height, y)
    canvas.imshow(image, extent=extent, aspect="auto", interpolation="none", zorder=1)
    canvas.set(xlim=limits[0], ylim=limits[1])
