"""Images of captured attention: a map over its image, a contact sheet of maps, a GIF. Arrays in, PIL images out."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxlab.drawing import lettering
from fluxlab.drawing.greyscale import to_grey
from fluxlab.errors import UserError
from fluxlab.files import write_atomic
from fluxlab.probes.arrays import Captured

if TYPE_CHECKING:
    from os import PathLike

    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLORMAP, OPACITY = "inferno", 0.75
"""A colormap with even steps of lightness, which colour-blind readers can read; and how much its brightest colour
covers of the image."""

GAP, INK, PAPER, NAN_COLOUR = 4, (40, 40, 40), (255, 255, 255), (225, 225, 225)
SCALES, MAXIMUM = ("sheet", "row", "cell"), "max"
LARGE, SMALL = 13, 11  # px, sizes of text
LABEL_WIDTH, PAGE_WIDTH = 200, 360  # px: the widest label of a row; the narrowest sheet, so that its title has room


def overlay(
    heat: np.ndarray,
    image: "Image | None" = None,
    *,
    highest: float | None = None,
    size: tuple[int, int] | None = None,
    opacity: float = OPACITY,
    colormap: str = COLORMAP,
) -> "Image":
    """Draw a map of attention in colour, over its image in grey if one is given.

    The colours are transparent where the map is 0 and become opaque with its values, so that the image stays visible.
    The image is made grey by `greyscale.to_grey`, which keeps objects apart from their background.

    Args:
        heat: `(rows, cols)`, values of 0 or more. NaN is drawn in light grey.
        image: the image that the map belongs to.
        highest: the value with the brightest colour; by default the maximum of the map.
        size: (width, height) of the result in pixels; by default the image's, or 16 pixels per token.
        opacity: how much the brightest colour covers of the image, from 0 to 1.

    Raises `UserError` if `heat` does not have two dimensions.
    """
    if heat.ndim != 2:
        raise UserError(f"heat has shape {heat.shape}, expected (rows, cols)")
    rows, cols = heat.shape
    size = size or (image.size if image is not None else (16 * cols, 16 * rows))
    return _over(heat, None if image is None else _resized_grey(image, size), highest, size, opacity, colormap)


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
    alpha = np.uint8(255 * opacity * np.where(np.isfinite(shares), shares, 1))
    return Image.composite(coloured, grey, Image.fromarray(alpha).resize(size, Image.Resampling.NEAREST))


def _resized_grey(image: "Image", size: tuple[int, int]) -> "Image":
    from PIL import Image

    return to_grey(image).resize(size, Image.Resampling.LANCZOS)


def _shares(heat: np.ndarray, highest: float | None) -> np.ndarray:
    """Scale a map to 0 … 1, where 1 has the brightest colour. NaN stays NaN."""
    top = float(np.max(heat, where=np.isfinite(heat), initial=0)) if highest is None else highest
    return np.clip(heat / (top if top > 0 else 1), 0, 1)


@cache
def colours(colormap: str = COLORMAP) -> np.ndarray:
    """Return the colours of the shares 0, 1/255, …, 1 as uint8 `(256, 3)`. The array is cached: do not modify it."""
    import matplotlib

    return matplotlib.colormaps[colormap](np.arange(256), bytes=True)[:, :3].copy()


def _coloured(shares: np.ndarray, colormap: str) -> np.ndarray:
    """Return uint8 `(rows, cols, 3)`, with the same rounding as matplotlib's colormaps."""
    pixels = colours(colormap)[np.minimum(256 * np.nan_to_num(shares), 255).astype(int)]
    return np.where(np.isfinite(shares)[..., None], pixels, np.uint8(NAN_COLOUR))


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
    """Draw a contact sheet: maps (row, col) along two axes of an array, with labels, for instance words × blocks.

    Args:
        captured: an array with the axes `rows`, `columns`, `row` and `col`. Other axes must have length 1: select
            with `captured.sel(step=3)` or average with `captured.mean("step")`.
        image: the image below the maps, one for all columns or one per column.
        scale: which maps share a colour scale: the whole "sheet", each "row" or each "cell". The value of the brightest
            colour is printed at the right of the row, or below the cell.
        highest: that value, one for all rows or one per row, to compare several sheets.
        cell: length of a map's longer side in pixels.
        title: one or more lines above the sheet. Long lines are wrapped.

    Raises `UserError` for missing axes, other axes that are longer than 1, and an unknown scale.
    """
    from PIL import Image, ImageDraw

    maps = _maps(captured, rows, columns)
    if scale not in SCALES:
        raise UserError(f"scale {scale!r}: expected one of {', '.join(SCALES)}")
    tops = _tops(maps, scale, highest)
    height, width = (max(1, round(cell * n / max(maps.shape[2:]))) for n in maps.shape[2:])
    across = [str(label) for label in captured.labels(columns)]
    down = [label if isinstance(label, str) else f"{rows} {label}" for label in captured.labels(rows)]
    down = [_fitted(label, LARGE, LABEL_WIDTH) for label in down]
    images = _one_per_column(image, maps.shape[1])
    greys = {id(one): None if one is None else _resized_grey(one, (width, height)) for one in images}

    left = 12 + round(max(*[lettering.length(text, LARGE) for text in down], lettering.length(columns, SMALL)))
    right = 4 if scale == "cell" else 8 + round(max(lettering.length(f"{top:.2g}", SMALL) for top in tops[:, 0]))
    right = right if scale == "cell" else max(right, 8 + round(lettering.length(MAXIMUM, SMALL)))
    step = (height + GAP + (14 if scale == "cell" else 0), width + GAP)
    page_width = max(left + len(across) * step[1] + right, PAGE_WIDTH)
    lines = [line for text in title.splitlines() for line in lettering.wrap(text, LARGE, page_width - 12)[0]]
    head = 22 + 17 * len(lines) + (4 if lines else 0)
    page = Image.new("RGB", (page_width, head + max(len(down) * step[0], 12)), PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        _write(draw, 6, 11 + 17 * i, line, LARGE)
    _write(draw, left - 6, head - 10, columns, SMALL, 1)
    margin = left + len(across) * step[1] + 2
    if scale != "cell":
        _write(draw, margin, head - 10, MAXIMUM, SMALL)
    for j, text in enumerate(across):
        _write(draw, left + j * step[1] + width / 2, head - 10, _fitted(text, SMALL, width), SMALL, 0.5)
    for i, text in enumerate(down):
        y = head + i * step[0]
        _write(draw, left - 6, y + height / 2, text, LARGE, 1)
        for j in range(len(across)):
            top, x = tops[i, j], left + j * step[1]
            page.paste(_over(maps[i, j], greys[id(images[j])], top, (width, height), OPACITY, colormap), (x, y))
            if scale == "cell":
                _write(draw, x + width / 2, y + height + 8, f"{top:.2g}", SMALL, 0.5)
        if scale != "cell":
            _write(draw, margin, y + height / 2, f"{tops[i, 0]:.2g}", SMALL)
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
    """Draw one `sheet` per entry of the axis `over`, all with the same scale. The title's last line names the entry.

    images: one image for all frames, or one entry per frame, in the form that `sheet` accepts. The other arguments are
    those of `sheet`. Raises `UserError` like `sheet`, and for scale "cell".
    """
    labels = captured.labels(over)
    parts = [captured.sel(**{over: label}) for label in labels]
    maps = np.stack([_maps(part, rows, columns) for part in parts])
    if scale == "cell":
        raise UserError("scale 'cell': expected sheet or row, because frames share a scale")
    highest = _tops(np.where(np.isfinite(maps), maps, 0).max(0), scale, None)[:, 0]
    per_frame = [images] * len(parts) if images is None or hasattr(images, "size") else list(images)
    if len(per_frame) != len(parts):
        raise UserError(f"images: got {len(per_frame)} for {len(parts)} frames, expected one, or one per frame")
    names = [f"{over} {label}{_sigma(captured, over, i)}" for i, label in enumerate(labels)]
    titles = [f"{title}\n{name}" if title else name for name in names]
    common = {"rows": rows, "columns": columns, "scale": scale, "highest": highest, **options}
    return [sheet(part, image=im, title=t, **common) for part, im, t in zip(parts, per_frame, titles, strict=True)]


def gif(path: "str | PathLike[str]", images: "Sequence[Image]", *, seconds: float = 0.5) -> None:
    """Write images of equal size as a GIF that repeats, `seconds` per frame. The write is atomic."""
    write_atomic(Path(path), gif_bytes(images, seconds=seconds))


def gif_bytes(images: "Sequence[Image]", *, seconds: float = 0.5) -> bytes:
    """Return the bytes that `gif` writes. All frames share one palette, so that colours do not flicker.

    Raises `UserError` if there are no images.
    """
    from PIL import Image

    if not images:
        raise UserError("images: got none, expected at least one frame")
    sample = [images[round(i)] for i in np.linspace(0, len(images) - 1, min(6, len(images)))]
    stacked = Image.new("RGB", (sample[0].width, len(sample) * sample[0].height))
    for i, image in enumerate(sample):
        stacked.paste(image, (0, i * image.height))
    palette = stacked.quantize(256)
    first, *rest = (image.convert("RGB").quantize(palette=palette, dither=0) for image in images)
    content = io.BytesIO()
    options = {"save_all": True, "append_images": rest, "duration": round(1000 * seconds), "loop": 0}
    first.save(content, format="gif", **options)
    return content.getvalue()


def _maps(captured: Captured, rows: str, columns: str) -> np.ndarray:
    """Return `(rows, columns, row, col)` of an array with these axes; other axes must have length 1."""
    wanted = (rows, columns, "row", "col")
    for axis, size in zip(captured.axes, captured.values.shape, strict=True):
        if axis not in wanted and size > 1:
            raise UserError(f"{axis} has {size} entries: select one with .sel({axis}=…) or use .mean({axis!r})")
    for axis in wanted:
        if axis not in captured.axes:
            raise UserError(f"{axis}: axis not found, expected {', '.join(wanted)}, got {', '.join(captured.axes)}")
    single = tuple(i for i, axis in enumerate(captured.axes) if axis not in wanted)
    order = [axis for axis in captured.axes if axis in wanted]
    return captured.values.squeeze(single).transpose([order.index(axis) for axis in wanted])


def _tops(maps: np.ndarray, scale: str, highest: float | np.ndarray | None) -> np.ndarray:
    """Return the value of the brightest colour of each cell, `(rows, columns)`."""
    finite = np.where(np.isfinite(maps), maps, 0)
    if highest is not None:
        return np.broadcast_to(np.asarray(highest, dtype=float).reshape(-1, 1), maps.shape[:2])
    over = {"sheet": (0, 1, 2, 3), "row": (1, 2, 3), "cell": (2, 3)}[scale]
    return np.broadcast_to(finite.max(over, keepdims=True)[..., 0, 0], maps.shape[:2])


def _sigma(captured: Captured, over: str, i: int) -> str:
    along, values = captured.coords.get("sigma", ((), ()))
    return f", σ {values[i]:.2f}" if along == (over,) else ""


def _write(draw: "ImageDraw", x: float, middle: float, text: str, size: int, align: float = 0) -> None:
    """Write one line, centred vertically on `middle`. align: 0 starts at x, 0.5 is centred on x, 1 ends at x."""
    corner = round(x - align * lettering.length(text, size)), round(middle - lettering.line_height(size) / 2)
    lettering.draw_lines(draw, corner, [text], size, INK)


def _fitted(text: str, size: int, width: float) -> str:
    """Return the text, shortened with an ellipsis where it is wider than `width`."""
    return "".join(lettering.truncate(lettering.wrap(text, size, width)[0], 1, size, width))


def _one_per_column(image, columns: int) -> list:
    if image is None or hasattr(image, "size"):
        return [image] * columns
    if len(image) != columns:
        raise UserError(f"image: got {len(image)} for {columns} columns, expected one, or one per column")
    return list(image)
