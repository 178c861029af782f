"""Text in pictures: DejaVu Sans, which comes with matplotlib, set by Pillow. Sizes and lengths are in pixels."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

LONGEST = 500  # characters of a text that are looked at


def clean(text: str) -> str:
    """A text on one line, without what no font can draw, and not longer than anyone reads in a picture."""
    drawn = ("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() else c for c in text[:LONGEST])
    return " ".join("".join(drawn).split())


@cache
def _face(size: int, bold: bool, shaped: bool) -> ImageFont.FreeTypeFont:
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC)


def _font(text: str, size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Text from right to left needs the shaping engine, where there is one; all other looks the same without."""
    shaped = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text) and features.check("raqm")
    return _face(size, bold, shaped)


def length(text: str, size: int, bold: bool = False) -> float:
    return _font(text, size, bold).getlength(text)


def line_height(size: int) -> int:
    return sum(_face(size, False, False).getmetrics())


def write(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], size: int, fill: str, bold: bool = False
) -> None:
    """Lines under each other, flush left, from their top left corner (x, y)."""
    ascent, _ = _face(size, False, False).getmetrics()
    for i, line in enumerate(lines):
        at = corner[0], corner[1] + i * line_height(size) + ascent
        draw.text(at, line, fill, _font(line, size, bold), anchor="ls")


def _fitting(text: str, size: int, width: float, bold: bool) -> int:
    """How many of its characters have room."""
    return bisect_right(range(1, len(text) + 1), width, key=lambda n: length(text[:n], size, bold))


def broken(text: str, size: int, width: float, bold: bool = False) -> tuple[list[str], bool]:
    """Lines of at most `width`, broken at spaces and after _; and whether a word had to be torn."""
    lines, torn = [""], False
    for word in text.split(" "):
        for i, piece in enumerate(re.findall(r"[^_]*_+|[^_]+", word)):
            glue = " " if i == 0 and lines[-1] else ""
            if length(lines[-1] + glue + piece, size, bold) <= width:
                lines[-1] += glue + piece
                continue
            if lines[-1]:
                lines.append("")
            while len(piece) > 1 and length(piece, size, bold) > width:
                head = max(1, _fitting(piece, size, width, bold))
                lines[-1:] = [piece[:head], ""]
                piece, torn = piece[head:], True
            lines[-1] = piece
    return lines, torn


def clipped(lines: list[str], most: int, size: int, width: float, bold: bool = False) -> list[str]:
    """At most so many lines; an ellipsis stands for the rest."""
    if len(lines) <= most or most < 1:
        return lines[: max(0, most)]
    last = lines[most - 1]
    last = last[: _fitting(last, size, width - length("…", size, bold), bold)].rstrip()
    return [*lines[: most - 1], last + "…"]


def squeezed(text: str, most: int, size: int, width: float) -> list[str]:
    """At most so many lines; an ellipsis in the middle stands for the rest, as names differ at their ends too."""

    def lines(kept: int) -> list[str]:
        shown = text if kept == len(text) else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        return broken(shown, size, width)[0]

    if len(lines(len(text))) <= most:
        return lines(len(text))
    return lines(bisect_right(range(1, len(text)), most, key=lambda kept: len(lines(kept))))
