"""Pictures of what was captured: a map over its image, a sheet of maps, a GIF. Arrays in, PIL images out."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxlab.errors import UserError
from fluxlab.files import write_atomic
from fluxlab.probes.arrays import Captured

if TYPE_CHECKING:
    from os import PathLike

    from PIL.Image import Image

COLORMAP, OPACITY = "inferno", 0.85
GAP, INK, PAPER, NOTHING = 4, (40, 40, 40), (255, 255, 255), (225, 225, 225)
SCALES, AT_MOST = ("sheet", "row", "cell"), "at most"
LABEL, LEAST_WIDTH = 200, 360  # px: the widest label of a row; the narrowest sheet, for its title's sake


def overlay(
    heat: np.ndarray,
    image: "Image | None" = None,
    *,
    highest: float | None = None,
    size: tuple[int, int] | None = None,
    opacity: float = OPACITY,
    colormap: str = COLORMAP,
) -> "Image":
    """A map `(rows, cols)` of values from 0 on, in colour, over an image in grey where one is given.

    highest: the value of the brightest colour, None for the map's own largest. size: (width, height) in pixels of the
    result, None for the image's, or 16 pixels a token. opacity: how far the brightest colour covers the image. NaN is
    grey.
    """
    if heat.ndim != 2:
        raise UserError(f"heat has shape {heat.shape}: a map (rows, cols) is needed")
    rows, cols = heat.shape
    size = size or (image.size if image is not None else (16 * cols, 16 * rows))
    return _over(heat, None if image is None else _grey(image, size), highest, size, opacity, colormap)


def _over(
    heat: np.ndarray,
    grey: "Image | None",
    highest: float | None,
    size: tuple[int, int],
    opacity: float,
    colormap: str,
) -> "Image":
    from PIL import Image

    shares = _shares(heat, highest)
    coloured = Image.fromarray(_coloured(shares, colormap)).resize(size, Image.Resampling.NEAREST)
    if grey is None:
        return coloured
    covered = np.uint8(255 * opacity * np.where(np.isfinite(shares), 0.35 + 0.65 * np.nan_to_num(shares), 1))
    return Image.composite(coloured, grey, Image.fromarray(covered).resize(size, Image.Resampling.NEAREST))


def _grey(image: "Image", size: tuple[int, int]) -> "Image":
    from PIL import Image

    return image.convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _shares(heat: np.ndarray, highest: float | None) -> np.ndarray:
    """The map in 0 … 1, 1 being the brightest; NaN stays."""
    top = float(np.max(heat, where=np.isfinite(heat), initial=0)) if highest is None else highest
    return np.clip(heat / (top if top > 0 else 1), 0, 1)


@cache
def colours(colormap: str = COLORMAP) -> np.ndarray:
    """The colours of shares from 0 to 1 in 256 steps, uint8 `(256, 3)`, not to be changed."""
    import matplotlib

    return matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, :3].copy()


def _coloured(shares: np.ndarray, colormap: str) -> np.ndarray:
    """uint8 `(rows, cols, 3)`."""
    found = colours(colormap)[np.minimum(256 * np.nan_to_num(shares), 255).astype(int)]  # as matplotlib has it
    return np.where(np.isfinite(shares)[..., None], found, np.uint8(NOTHING))


def sheet(
    captured: Captured,
    *,
    rows: str = "word",
    columns: str = "block",
    image: "Image | Sequence[Image | None] | None" = None,
    scale: str = "row",
    highest: float | np.ndarray | None = None,
    cell: int = 96,
    title: str = "",
    colormap: str = COLORMAP,
) -> "Image":
    """A contact sheet: the maps (row, col) of an array along two of its axes, labelled, say words × blocks.

    captured: has these two axes and `row`, `col`; further ones of a single entry are dropped, of more are an error
    (`captured.sel(step=3)` chooses one, `captured.mean("step")` averages). image: what the maps lie over, one for all,
    or one a column. scale: what shares a brightest colour, the whole sheet, a row or a single cell; its value is
    written at the right, or below the cell. highest: that value, or one a row, for sheets that are to be compared.
    cell: pixels of a map's longer side. title: as many lines as it takes.
    """
    from PIL import Image, ImageDraw

    maps = _maps(captured, rows, columns)
    if scale not in SCALES:
        raise UserError(f"scale {scale!r}: expected one of {', '.join(SCALES)}")
    tops = _tops(maps, scale, highest)
    height, width = (max(1, round(cell * n / max(maps.shape[2:]))) for n in maps.shape[2:])
    down, across = captured.labels(rows), [str(label) for label in captured.labels(columns)]
    under = _one_a_column(image, maps.shape[1])
    greys = {id(one): None if one is None else _grey(one, (width, height)) for one in under}
    under = [greys[id(one)] for one in under]
    font, small = _font(13), _font(11)
    down = [_cut(label if isinstance(label, str) else f"{rows} {label}", font, LABEL) for label in down]
    left = 12 + max(*[_width(font, text) for text in down], _width(small, columns))
    right = 4 if scale == "cell" else 8 + _width(small, AT_MOST)
    step = (height + GAP + (14 if scale == "cell" else 0), width + GAP)
    page_width = max(left + len(across) * step[1] + right, LEAST_WIDTH)
    told = _lines(title, font, page_width - 12)
    head = 22 + 17 * len(told) + (4 if told else 0)
    page = Image.new("RGB", (page_width, head + max(len(down) * step[0], 12)), PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(told):
        draw.text((6, 4 + 17 * i), line, INK, font)
    draw.text((left - 6, head - 5), columns, INK, small, anchor="rs")
    if right > 4:
        draw.text((left + len(across) * step[1] + 2, head - 5), AT_MOST, INK, small, anchor="ls")
    for j, text in enumerate(across):
        draw.text((left + j * step[1] + width / 2, head - 5), _cut(text, small, width), INK, small, anchor="ms")
    for i, text in enumerate(down):
        y = head + i * step[0]
        draw.text((left - 6, y + height / 2), text, INK, font, anchor="rm")
        for j in range(len(across)):
            top, x = tops[i, j], left + j * step[1]
            page.paste(_over(maps[i, j], under[j], top, (width, height), OPACITY, colormap), (x, y))
            if scale == "cell":
                draw.text((x + width / 2, y + height + 12), f"{top:.2g}", INK, small, anchor="ms")
        if right > 4:
            x = left + len(across) * step[1] + 2
            draw.text((x, y + height / 2), f"{tops[i, 0]:.2g}", INK, small, anchor="lm")
    return page


def frames(
    captured: Captured,
    *,
    over: str = "step",
    rows: str = "word",
    columns: str = "block",
    images: "Image | Sequence | None" = None,
    scale: str = "row",
    title: str = "",
    **options,
) -> "list[Image]":
    """A `sheet` for each entry of the axis `over`, on one scale throughout, each told below the common title.

    images: one for all, or one a frame; that may again be one a column, as `sheet` takes them.
    """
    labels = captured.labels(over)
    parts = [captured.sel(**{over: label}) for label in labels]
    maps = np.stack([_maps(part, rows, columns) for part in parts])
    if scale == "cell":
        raise UserError("scale 'cell': expected sheet or row, or frames could not be compared")
    highest = _tops(np.where(np.isfinite(maps), maps, 0).max(0), scale, None)[:, 0]
    each = [images] * len(parts) if images is None or hasattr(images, "size") else list(images)
    if len(each) != len(parts):
        raise UserError(f"images: {len(each)} for {len(parts)} frames, expected one, or one a frame")
    told = [f"{over} {label}{_sigma(captured, over, i)}" for i, label in enumerate(labels)]
    titles = [f"{title}\n{text}" if title else text for text in told]
    common = {"rows": rows, "columns": columns, "scale": scale, "highest": highest, **options}
    return [sheet(part, image=im, title=t, **common) for part, im, t in zip(parts, each, titles, strict=True)]


def gif(path: "str | PathLike[str]", pictures: "Sequence[Image]", *, seconds: float = 0.5) -> None:
    """Write pictures of one size as a GIF that goes round, `seconds` each; whole or not at all."""
    write_atomic(Path(path), gif_bytes(pictures, seconds=seconds))


def gif_bytes(pictures: "Sequence[Image]", *, seconds: float = 0.5) -> bytes:
    """What `gif` writes. One palette, of pictures from the first to the last, so that nothing flickers."""
    from PIL import Image

    if not pictures:
        raise UserError("pictures: there are none")
    some = [pictures[round(i)] for i in np.linspace(0, len(pictures) - 1, min(6, len(pictures)))]
    together = Image.new("RGB", (some[0].width, len(some) * some[0].height))
    for i, picture in enumerate(some):
        together.paste(picture, (0, i * picture.height))
    palette = together.quantize(256)
    first, *rest = (picture.convert("RGB").quantize(palette=palette, dither=0) for picture in pictures)
    content = io.BytesIO()
    options = {"save_all": True, "append_images": rest, "duration": round(1000 * seconds), "loop": 0}
    first.save(content, format="gif", **options)
    return content.getvalue()


def _maps(captured: Captured, rows: str, columns: str) -> np.ndarray:
    """`(rows, columns, row, col)` of an array with these axes; others must have one entry."""
    wanted = (rows, columns, "row", "col")
    for axis, size in zip(captured.axes, captured.values.shape, strict=True):
        if axis not in wanted and size > 1:
            raise UserError(f"{axis} has {size} entries: choose one with .sel({axis}=…), or .mean({axis!r}) averages")
    for axis in wanted:
        if axis not in captured.axes:
            raise UserError(f"{axis}: there is no such axis, expected {', '.join(wanted)}, got {captured.axes}")
    spare = tuple(i for i, axis in enumerate(captured.axes) if axis not in wanted)
    left = [axis for axis in captured.axes if axis in wanted]
    return captured.values.squeeze(spare).transpose([left.index(axis) for axis in wanted])


def _tops(maps: np.ndarray, scale: str, highest: float | np.ndarray | None) -> np.ndarray:
    """The value of the brightest colour of each cell, `(rows, columns)`."""
    finite = np.where(np.isfinite(maps), maps, 0)
    if highest is not None:
        return np.broadcast_to(np.asarray(highest, dtype=float).reshape(-1, 1), maps.shape[:2])
    over = {"sheet": (0, 1, 2, 3), "row": (1, 2, 3), "cell": (2, 3)}[scale]
    return np.broadcast_to(finite.max(over, keepdims=True)[..., 0, 0], maps.shape[:2])


def _sigma(captured: Captured, over: str, i: int) -> str:
    along, values = captured.coords.get("sigma", ((), ()))
    return f", σ {values[i]:.2f}" if along == (over,) else ""


@cache
def _font(size: int):
    """matplotlib's own, which has the letters that PIL's lacks."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def _width(font, text: str) -> int:
    return round(font.getlength(text))


def _cut(text: str, font, width: int) -> str:
    """As much of it as has room; an ellipsis stands for the rest."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _lines(text: str, font, width: int) -> list[str]:
    """Broken at spaces, and where a word is too long for a line it is cut."""
    lines = []
    for part in text.splitlines():
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines += [_cut(word, font, width)] if lines[-1] else []
                lines[-1] = _cut(word, font, width)
    return lines


def _one_a_column(image, columns: int) -> list:
    if image is None or hasattr(image, "size"):
        return [image] * columns
    if len(image) != columns:
        raise UserError(f"image: {len(image)} for {columns} columns, expected one, or one a column")
    return list(image)
