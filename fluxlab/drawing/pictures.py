"""Pictures for a page that is one file: as data URLs, together within a budget of bytes."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fluxlab.files import write_atomic
from fluxlab.images import open_image

BUDGET = 3_000_000
"""Bytes of a page's pictures, of which base64 makes a third more: with text and layouts, a page stays below 5 MB."""

SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)  # px of the longer side that large pictures are reduced to
SAMPLE = 8  # pictures that tell how large all will be
QUALITY = 85  # of WebP: no blocks or colour fringes to see on flat scenes and lettering


@dataclass(frozen=True)
class Picture:
    """A data URL, and the picture's width and height as embedded and as stored, in pixels."""

    url: str
    size: tuple[int, int]
    stored: tuple[int, int]


def embed(files: Iterable[Path], budget: int = BUDGET) -> dict[Path, Picture]:
    """A picture for every file that is there: as stored where `budget` bytes hold them all, else as WebP, no larger
    than the first of `SIDES` with which they do; with the last where none does.

    Raises `UserError` for a file that is no picture.
    """
    found = [file for file in dict.fromkeys(files) if file.is_file()]
    if sum(file.stat().st_size for file in found) <= budget:
        return {file: _as_stored(file) for file in found}
    sample = [open_cell(file) for file in found[:: max(1, len(found) // SAMPLE)]]
    longest = max(max(image.size) for image in sample)
    for side in (longest, *(side for side in SIDES if side < longest)):
        expected = sum(len(_webp(image, side)[0]) for image in sample) / len(sample) * len(found)
        if expected > budget and side > SIDES[-1]:
            continue
        pictures, total = {}, 0
        for file in found:
            image = open_cell(file)
            content, size = _webp(image, side)
            pictures[file] = Picture(data_url(content, "webp"), size, image.size)
            total += len(content)
        if total <= budget:
            break
    return pictures


def fitting(files: Iterable[Path], budget: int) -> dict[Path, Picture]:
    """As many of the files that are there, from the first on, as `budget` bytes hold: of full size, as WebP.

    Raises `UserError` for a file that is no picture.
    """
    found: dict[Path, Picture] = {}
    for file in dict.fromkeys(files):
        if file.is_file():
            image = open_cell(file)
            content, size = _webp(image, max(image.size))
            budget -= len(content)
            if budget < 0:
                break
            found[file] = Picture(data_url(content, "webp"), size, image.size)
    return found


def note(pictures: Sequence[Picture]) -> str:
    """In words, what of the pictures a page does not show; empty where it shows them as they are stored."""
    if not any(picture.url.startswith("data:image/webp") for picture in pictures):
        return ""
    stored, shown = (
        max((getattr(picture, key) for picture in pictures), key=max, default=(0, 0)) for key in ("stored", "size")
    )
    reduced = f"{stored[0]} × {stored[1]} px, shown at {shown[0]} × {shown[1]}" if stored != shown else "of full size"
    return f"Pictures are {reduced}, compressed as WebP; the originals lie in the run folder's cells/."


def put(file: Path, content: bytes) -> Path:
    """Write a file, atomically, unless it already holds just that. Returns it."""
    if not (file.is_file() and file.read_bytes() == content):
        write_atomic(file, content)
    return file


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _as_stored(file: Path) -> Picture:
    size = open_cell(file).size
    return Picture(data_url(file.read_bytes(), "png"), size, size)


def open_cell(file: Path) -> Image.Image:
    """Return a cell's image in RGB. Raises `UserError` for a file that is missing or not an image."""
    return open_image(file, remedy="remove it and run the command of its run folder again")


def _webp(image: Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    """Its bytes with at most `side` pixels on the longer side, and its (width, height) then."""
    scale = side / max(image.size)
    if scale < 1:
        size = [max(1, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    content = io.BytesIO()
    image.save(content, "webp", quality=QUALITY)
    return content.getvalue(), image.size
