"""Text in images: wrapping and shortening, in matplotlib's DejaVu Sans. Sizes and lengths are in pixels.

Pillow measures and draws. Its own `ImageText.wrap` raises for a word that is wider than the line and does not break
names at underscores.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

LONGEST = 500  # characters; more are not legible in an image anyway


def one_line(text: str) -> str:
    """Return a text on one line, cut to `LONGEST` characters, with characters that no font can draw replaced."""
    drawn = ("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() else c for c in text[:LONGEST])
    return " ".join("".join(drawn).split())


@cache
def _fonts() -> Path:
    """Return the folder of matplotlib's fonts. matplotlib is imported only if its data are apart from its package."""
    spec = find_spec("matplotlib")
    for package in spec.submodule_search_locations if spec else ():
        folder = Path(package) / "mpl-data" / "fonts" / "ttf"
        if (folder / "DejaVuSans.ttf").is_file():
            return folder
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@cache
def _face(size: int, bold: bool, shaped: bool) -> ImageFont.FreeTypeFont:
    file = _fonts() / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC)


def _font(text: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Return the font for a text. Right-to-left text uses the shaping engine if Pillow has it; other text does not."""
    shaped = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text) and features.check("raqm")
    return _face(size, bold, shaped)


def length(text: str, size: int, bold: bool = False) -> float:
    """Return the width of a text on one line."""
    return _font(text, size, bold).getlength(text)


def line_height(size: int) -> int:
    return sum(_face(size, False, False).getmetrics())


def draw_lines(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], size: int, fill: str, bold: bool = False
) -> None:
    """Draw lines below each other, flush left. corner: (x, y) of their top left corner."""
    ascent, _ = _face(size, False, False).getmetrics()
    for i, line in enumerate(lines):
        at = corner[0], corner[1] + i * line_height(size) + ascent
        draw.text(at, line, fill, _font(line, size, bold), anchor="ls")


def _count_fitting(text: str, size: int, width: float, bold: bool) -> int:
    """Return how many characters of a text fit a width."""
    return bisect_right(range(1, len(text) + 1), width, key=lambda n: length(text[:n], size, bold))


def wrap(text: str, size: int, width: float, bold: bool = False) -> tuple[list[str], bool]:
    """Return lines of at most `width`, broken at spaces and after underscores, and whether a word had to be split."""
    lines, split = [""], False
    for word in text.split(" "):
        for i, piece in enumerate(re.findall(r"[^_]*_+|[^_]+", word)):
            space = " " if i == 0 and lines[-1] else ""
            if length(lines[-1] + space + piece, size, bold) <= width:
                lines[-1] += space + piece
                continue
            if lines[-1]:
                lines.append("")
            while len(piece) > 1 and length(piece, size, bold) > width:
                head = max(1, _count_fitting(piece, size, width, bold))
                lines[-1:] = [piece[:head], ""]
                piece, split = piece[head:], True
            lines[-1] = piece
    return lines, split


def truncate(lines: list[str], most: int, size: int, width: float, bold: bool = False) -> list[str]:
    """Return at most `most` lines. The last one ends in an ellipsis if lines are left out."""
    if len(lines) <= most or most < 1:
        return lines[: max(0, most)]
    last = lines[most - 1]
    last = last[: _count_fitting(last, size, width - length("…", size, bold), bold)].rstrip()
    return [*lines[: most - 1], last + "…"]


def shorten(text: str, most: int, size: int, width: float) -> list[str]:
    """Return a text in at most `most` lines, with an ellipsis in its middle if it is too long.

    Names of variants often differ at their ends only.
    """

    def lines(kept: int) -> list[str]:
        shown = text if kept == len(text) else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        return wrap(shown, size, width)[0]

    if len(lines(len(text))) <= most:
        return lines(len(text))
    return lines(bisect_right(range(1, len(text)), most, key=lambda kept: len(lines(kept))))
