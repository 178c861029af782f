"""The grid image, at print size: one row per variant, one column per (prompt, seed)."""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image, ImageDraw

from fluxlab.drawing import lettering
from fluxlab.drawing.pictures import fit_image, open_cell, put
from fluxlab.errors import UserError

MAX_WIDTH, MAX_HEIGHT = 4000, 8000  # px of the grid, approximately, unless cells would be smaller than SMALLEST
SMALL, LARGE, SMALLEST = 128, 512, 32  # px of a cell's longer side: small images are enlarged, large ones reduced
PAGE, LABELS = 6.9, 1.15  # in: width of a printed page, and of the column of names
LEAST_DPI = 150  # a grid with few columns is printed smaller than the page
NAME, NOTE, TITLE = 7, 5.5, 8.5  # pt in print
LEAST_TYPE = 0.6  # where cells are lower than a name and its note, type is reduced to this share at most
PROMPT, PROMPT_LINES, NARROW, LISTED = (7, 6, 5, 4), 3, 40, 5  # pt: the first size that fits; else a numbered list
MARGIN, THIN = 4, 0.35  # pt
BLACK, GREY, RULE, EMPTY, HATCH = "#111111", "#666666", "#bbbbbb", "#f0f0f0", "#d8d8d8"

Images = Callable[[int, int], "Path | None"] | Sequence[Sequence["Path | None"]]


def write_grid(
    file: "str | PathLike[str]",
    rows: Sequence[tuple[str, str]],
    columns: Sequence[tuple[str, int]],
    images: Images,
    title: str = "",
) -> Path:
    """Write the grid as PNG, atomically. Returns the file.

    The same images give the same bytes, and a file that already has them is not written. Arguments and errors are those
    of `draw_grid`.
    """
    file = Path(file)
    grid, dpi = draw_grid(rows, columns, images, title)
    content = io.BytesIO()
    grid.save(content, format="png", dpi=(dpi, dpi))
    return put(file, content.getvalue())


def draw_grid(
    rows: Sequence[tuple[str, str]], columns: Sequence[tuple[str, int]], images: Images, title: str = ""
) -> tuple[Image.Image, float]:
    """Return the grid as an RGB image, and the dots per inch at which its type has its size in print.

    rows: (name, one line about it), from top to bottom. columns: (prompt, seed), from left to right; adjacent columns
    of one prompt share its heading. images: `images(row, column)` or rows of paths. An image that is None or whose file
    does not exist is drawn as missing. Images are opened one at a time. Cells have the shape of the first image,
    enlarged by a whole factor or reduced; an image of another shape is fitted into its cell. If columns are too narrow
    for their prompts, the prompts are numbered and listed below the grid.

    Raises UserError if there is no row or no column, if rows of paths do not match them, or for a file that is not an
    image.
    """
    if not rows or not columns:
        raise UserError(f"grid of {len(rows)} variants and {len(columns)} columns: expected at least one of each")
    if not callable(images) and [len(paths) for paths in images] != [len(columns)] * len(rows):
        counts = ", ".join(str(len(paths)) for paths in images)
        raise UserError(f"images: rows of {counts or '0'} paths, expected {len(rows)} rows of {len(columns)}")
    at = images if callable(images) else lambda row, column: images[row][column]
    frame = _frame(_first_size(at, len(rows), len(columns)), len(rows), columns)
    head, ruled, listed = _head(frame, columns, title)
    foot = _list_of_prompts(frame, listed)
    pitch = frame.row_height + frame.gap
    bottom = head.height + len(rows) * pitch - frame.gap
    grid = Image.new("RGB", (frame.width, bottom + foot.height), "white")
    grid.paste(head, (0, 0))
    grid.paste(foot, (0, bottom))
    for i, (name, note) in enumerate(rows):
        top = head.height + i * pitch
        grid.paste(_label(frame, name, note), (0, top))
        for j, left in enumerate(frame.lefts):
            image = _load(at(i, j))
            cell = _missing(frame) if image is None else fit_image(image, frame.cell)
            free = [(room - side) // 2 for room, side in zip((frame.cell[0], frame.row_height), cell.size, strict=True)]
            grid.paste(cell, (left + free[0], top + free[1]))
    draw = ImageDraw.Draw(grid)
    for (_, _, before), (_, after, _) in itertools.pairwise(frame.groups):
        middle = (before + after - frame.px(THIN)) // 2
        draw.rectangle((middle, ruled, middle + frame.px(THIN) - 1, bottom - 1), RULE)
    return grid, frame.dpi


@dataclass(frozen=True)
class _Frame:
    """Positions of columns and sizes of type, in pixels.

    lefts: left edge of every column. groups: prompt, left and right edge of adjacent columns. type: share of the usual
    sizes.
    """

    dpi: float
    type: float
    width: int
    label: int
    cell: tuple[int, int]
    gap: int
    row_height: int
    lefts: list[int]
    groups: list[tuple[str, int, int]]

    def px(self, points: float) -> int:
        return max(1, round(points / 72 * self.dpi))

    def size(self, points: float) -> int:
        return self.px(points * self.type)


def _frame(native: tuple[int, int], rows: int, columns: Sequence[tuple[str, int]]) -> _Frame:
    cell = _cell(native, rows, len(columns))
    gap = max(2, round(0.03 * min(cell)))
    steps = [cell[0] + (gap if a[0] == b[0] else 5 * gap) for a, b in itertools.pairwise(columns)]
    across = sum(steps) + cell[0]
    dpi = max(LEAST_DPI, across / (PAGE - LABELS))
    label, margin = round(LABELS * dpi), round(MARGIN / 72 * dpi)
    lefts = [label + sum(steps[:j]) for j in range(len(columns))]
    firsts = [j for j in range(len(columns)) if j == 0 or columns[j][0] != columns[j - 1][0]]
    groups = [
        (columns[first][0], lefts[first], lefts[last - 1] + cell[0])
        for first, last in zip(firsts, [*firsts[1:], len(columns)], strict=True)
    ]
    high = 1.25 * (NAME + NOTE) / 72 * dpi  # a name and one line of its note
    share = min(1, max(LEAST_TYPE, cell[1] / high))
    return _Frame(
        dpi, share, label + across + margin, label, cell, gap, max(cell[1], round(share * high)), lefts, groups
    )


def _cell(native: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Return (width, height) of a cell: a whole multiple of a small image if the limits of the grid allow it."""
    longer = max(native)
    scale = min(max(1, round(SMALL / longer)), LARGE / longer)
    across, down = 1.05 * columns * native[0], 1.03 * rows * native[1]  # with gaps
    room = min(MAX_WIDTH * (1 - LABELS / PAGE) / across, MAX_HEIGHT / down)
    if scale > room:
        scale = int(room) if room >= 1 else max(room, min(scale, SMALLEST / longer))
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))


def _head(frame: _Frame, columns: Sequence[tuple[str, int]], title: str) -> tuple[Image.Image, int, list[str]]:
    """Return the title, the prompts with a rule below each, and the seeds.

    Also return the top of the prompts, and the prompts to list below the grid because they had to be numbered.
    """
    prompts = [f"“{lettering.one_line(prompt)}”" for prompt, _, _ in frame.groups]
    size, texts, numbered = _set_prompts(frame, prompts)
    seeds, word = _seeds(frame, [seed for _, seed in columns])
    margin, large = frame.px(MARGIN), frame.px(TITLE)
    width = frame.width - 2 * margin
    titled = lettering.wrap(lettering.one_line(title), large, width, bold=True)[0] if title else []
    titled = lettering.truncate(titled, 2, large, width, bold=True)
    top = margin + len(titled) * lettering.line_height(large) + frame.px(4) * bool(titled)
    rule = top + max(len(lines) for lines in texts) * lettering.line_height(size) + frame.px(2)
    bottom = rule + frame.px(2) + max(seed.height for seed in seeds)
    image = Image.new("RGB", (frame.width, bottom + frame.px(1.5)), "white")
    draw = ImageDraw.Draw(image)
    lettering.draw_lines(draw, (margin, margin), titled, large, BLACK, bold=True)
    for (_, left, right), lines in zip(frame.groups, texts, strict=True):
        y = rule - frame.px(2) - len(lines) * lettering.line_height(size)
        lettering.draw_lines(draw, (left, y), lines, size, BLACK)
        draw.rectangle((left, rule, right - 1, rule + frame.px(THIN) - 1), RULE)
    for left, seed in zip(frame.lefts, seeds, strict=True):
        image.paste(seed, (left + (frame.cell[0] - seed.width) // 2, bottom - seed.height))
    if word:
        image.paste(word, (frame.label - frame.px(4) - word.width, bottom - word.height))
    return image, top, prompts if numbered else []


def _set_prompts(frame: _Frame, prompts: Sequence[str]) -> tuple[int, list[list[str]], bool]:
    """Return size and lines of the prompts in the largest type that fits, and whether they are numbers instead."""
    widths = [right - left for _, left, right in frame.groups]
    for points in PROMPT:
        size = frame.px(points)
        texts = [lettering.wrap(text, size, width) for text, width in zip(prompts, widths, strict=True)]
        if all(len(lines) <= PROMPT_LINES and not split for lines, split in texts):
            return size, [lines for lines, _ in texts], False
    if min(widths) < frame.px(NARROW):
        return frame.size(NAME), [[str(i + 1)] for i in range(len(prompts))], True
    lines = [
        lettering.truncate(lines, PROMPT_LINES, size, width) for (lines, _), width in zip(texts, widths, strict=True)
    ]
    return size, lines, False


def _seeds(frame: _Frame, seeds: Sequence[int]) -> tuple[list[Image.Image], Image.Image | None]:
    """Return one label per column, and the word "seed" if it is written once.

    Labels are "seed 3"; if that is too wide, "3"; if that is too wide, "3" turned upright.
    """
    size = frame.size(NOTE)
    texts = [f"seed {seed}" for seed in seeds]
    if max(lettering.length(text, size) for text in texts) <= frame.cell[0]:
        return [_text(text, size, GREY) for text in texts], None
    labels = [_text(str(seed), size, GREY) for seed in seeds]
    if max(label.width for label in labels) > frame.cell[0]:
        labels = [label.transpose(Image.Transpose.ROTATE_90) for label in labels]
    return labels, _text("seed", size, GREY)


def _text(text: str, size: int, fill: str) -> Image.Image:
    image = Image.new("RGB", (max(1, round(lettering.length(text, size))), lettering.line_height(size)), "white")
    lettering.draw_lines(ImageDraw.Draw(image), (0, 0), [text], size, fill)
    return image


def _list_of_prompts(frame: _Frame, prompts: Sequence[str]) -> Image.Image:
    """Return the numbered prompts, if there are any, and the bottom margin."""
    size, margin = frame.px(LISTED), frame.px(MARGIN)
    indent = round(lettering.length("000  ", size))
    width = frame.width - 2 * margin - indent
    texts = [lettering.truncate(lettering.wrap(text, size, width)[0], PROMPT_LINES, size, width) for text in prompts]
    line = lettering.line_height(size)
    image = Image.new("RGB", (frame.width, margin * (2 if texts else 1) + line * sum(map(len, texts))), "white")
    draw, y = ImageDraw.Draw(image), margin
    for i, lines in enumerate(texts):
        lettering.draw_lines(draw, (margin, y), [str(i + 1)], size, BLACK)
        lettering.draw_lines(draw, (margin + indent, y), lines, size, GREY)
        y += line * len(lines)
    return image


def _label(frame: _Frame, name: str, note: str) -> Image.Image:
    """Return a variant's name and as much of its description as fits, centred in the row."""
    large, small, margin = frame.size(NAME), frame.size(NOTE), frame.px(MARGIN)
    high, low = lettering.line_height(large), lettering.line_height(small)
    width = frame.label - margin - frame.px(4)
    names = lettering.shorten(lettering.one_line(name), max(1, min(3, frame.row_height // high)), large, width)
    notes = lettering.wrap(lettering.one_line(note), small, width)[0] if note else []
    notes = lettering.truncate(notes, (frame.row_height - high * len(names)) // low, small, width)
    image = Image.new("RGB", (frame.label, frame.row_height), "white")
    y = (frame.row_height - high * len(names) - low * len(notes)) // 2
    lettering.draw_lines(ImageDraw.Draw(image), (margin, y), names, large, BLACK)
    lettering.draw_lines(ImageDraw.Draw(image), (margin, y + high * len(names)), notes, small, GREY)
    return image


def _missing(frame: _Frame) -> Image.Image:
    box = Image.new("RGB", frame.cell, EMPTY)
    draw, (width, height) = ImageDraw.Draw(box), frame.cell
    for x in range(-height, width, frame.px(5)):
        draw.line((x, height, x + height, 0), HATCH, frame.px(0.5))
    draw.rectangle((0, 0, width - 1, height - 1), outline=HATCH)
    size = frame.size(NOTE)
    word, high = round(lettering.length("missing", size)), lettering.line_height(size)
    if word + 4 <= width and high <= height:
        x, y = (width - word) // 2, (height - high) // 2
        draw.rectangle((x - 3, y, x + word + 2, y + high), EMPTY)
        lettering.draw_lines(draw, (x, y), ["missing"], size, GREY)
    return box


def _first_size(at: Callable[[int, int], "Path | None"], rows: int, columns: int) -> tuple[int, int]:
    """Return (width, height) of the first image that exists; of a square if none does."""
    for i in range(rows):
        for j in range(columns):
            image = _load(at(i, j))
            if image is not None:
                return image.size
    return SMALL, SMALL


def _load(path: "Path | None") -> Image.Image | None:
    """Return an image in RGB, or None if its file does not exist."""
    return open_cell(path) if path is not None and path.is_file() else None
