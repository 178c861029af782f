"""The grid picture: a row a variant, a column a (prompt, seed), as it goes into a paper."""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image, ImageDraw

from fluxlab.drawing import lettering
from fluxlab.drawing.pictures import open_cell, put
from fluxlab.errors import UserError

MAX_WIDTH, MAX_HEIGHT = 4000, 8000  # px of the whole, about, as long as cells are not smaller than SMALLEST
SMALL, LARGE, SMALLEST = 128, 512, 32  # px of a cell's longer side: enlarged to about, reduced to, never below
PAGE, LABELS = 6.9, 1.15  # in: the widest a paper prints the whole, and of it the column of names
LEAST_DPI = 150  # a grid with few columns is printed smaller than the page
NAME, NOTE, TITLE = 7, 5.5, 8.5  # pt in print, and where cells are lower than a name and its note …
LEAST_TYPE = 0.6  # … not less than this much of it
PROMPT, PROMPT_LINES, NARROW, LISTED = (7, 6, 5, 4), 3, 40, 5  # pt: the first size that fits; if too narrow, a list
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
    """Write the grid picture as PNG, atomically; the same images give the same bytes. Returns the file.

    A file that already holds just that is left alone. Arguments and errors are those of `draw_grid`.
    """
    file = Path(file)
    picture, dpi = draw_grid(rows, columns, images, title)
    content = io.BytesIO()
    picture.save(content, format="png", dpi=(dpi, dpi))
    return put(file, content.getvalue())


def draw_grid(
    rows: Sequence[tuple[str, str]], columns: Sequence[tuple[str, int]], images: Images, title: str = ""
) -> tuple[Image.Image, float]:
    """The grid as an RGB picture, and the dots per inch at which its type has its size in print.

    rows: (name, one line about it), from top to bottom. columns: (prompt, seed), from left to right; neighbours of one
    prompt stand together under it. images: `images(row, column)`, or rows of paths. An image that is None or not there
    is drawn as missing. Images are opened one at a time. Cells have the first image's shape, enlarged by a whole factor
    or reduced; an image of another shape is fitted into its cell. Where columns are too narrow for their prompts these
    are numbered, and listed under the grid.

    Raises `UserError` for no row or no column, rows of paths that do not fit them, and a file that is no image.
    """
    if not rows or not columns:
        raise UserError(f"a grid of {len(rows)} variants and {len(columns)} columns: one of each is needed at least")
    if not callable(images) and [len(paths) for paths in images] != [len(columns)] * len(rows):
        counts = ", ".join(str(len(paths)) for paths in images)
        raise UserError(f"images: rows of {counts or 'nothing'} for {len(rows)} variants and {len(columns)} columns")
    at = images if callable(images) else lambda row, column: images[row][column]
    frame = _frame(_first_size(at, len(rows), len(columns)), len(rows), columns)
    head, ruled, listed = _head(frame, columns, title)
    foot = _list_of_prompts(frame, listed)
    pitch = frame.row_height + frame.gap
    bottom = head.height + len(rows) * pitch - frame.gap
    picture = Image.new("RGB", (frame.width, bottom + foot.height), "white")
    picture.paste(head, (0, 0))
    picture.paste(foot, (0, bottom))
    for i, (name, note) in enumerate(rows):
        top = head.height + i * pitch
        picture.paste(_label(frame, name, note), (0, top))
        for j, left in enumerate(frame.lefts):
            image = _opened(at(i, j))
            cell = _missing(frame) if image is None else _fitted(image, frame.cell)
            free = [(room - side) // 2 for room, side in zip((frame.cell[0], frame.row_height), cell.size, strict=True)]
            picture.paste(cell, (left + free[0], top + free[1]))
    draw = ImageDraw.Draw(picture)
    for (_, _, before), (_, after, _) in itertools.pairwise(frame.groups):
        middle = (before + after - frame.px(THIN)) // 2
        draw.rectangle((middle, ruled, middle + frame.px(THIN) - 1, bottom - 1), RULE)
    return picture, frame.dpi


@dataclass(frozen=True)
class _Frame:
    """Where columns lie and how large type is, in pixels.

    lefts: of every column. groups: prompt, left and right of neighbouring columns. type: share of the usual sizes.
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
    high = 1.25 * (NAME + NOTE) / 72 * dpi  # a name and a line of its note
    share = min(1, max(LEAST_TYPE, cell[1] / high))
    return _Frame(
        dpi, share, label + across + margin, label, cell, gap, max(cell[1], round(share * high)), lefts, groups
    )


def _cell(native: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """(width, height) of a cell: a whole multiple of a small image, as far as the limits of the whole allow."""
    longer = max(native)
    scale = min(max(1, round(SMALL / longer)), LARGE / longer)
    across, down = 1.05 * columns * native[0], 1.03 * rows * native[1]  # with gaps
    room = min(MAX_WIDTH * (1 - LABELS / PAGE) / across, MAX_HEIGHT / down)
    if scale > room:
        scale = int(room) if room >= 1 else max(room, min(scale, SMALLEST / longer))
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))


def _head(frame: _Frame, columns: Sequence[tuple[str, int]], title: str) -> tuple[Image.Image, int, list[str]]:
    """Title, prompts with a rule under each, seeds.

    With it the top of the prompts, and those to list elsewhere because they had to be numbered.
    """
    prompts = [f"“{lettering.clean(prompt)}”" for prompt, _, _ in frame.groups]
    size, texts, numbered = _set_prompts(frame, prompts)
    seeds, word = _seeds(frame, [seed for _, seed in columns])
    margin, large = frame.px(MARGIN), frame.px(TITLE)
    width = frame.width - 2 * margin
    titled = lettering.broken(lettering.clean(title), large, width, bold=True)[0] if title else []
    titled = lettering.clipped(titled, 2, large, width, bold=True)
    top = margin + len(titled) * lettering.line_height(large) + frame.px(4) * bool(titled)
    rule = top + max(len(lines) for lines in texts) * lettering.line_height(size) + frame.px(2)
    bottom = rule + frame.px(2) + max(seed.height for seed in seeds)
    picture = Image.new("RGB", (frame.width, bottom + frame.px(1.5)), "white")
    draw = ImageDraw.Draw(picture)
    lettering.write(draw, (margin, margin), titled, large, BLACK, bold=True)
    for (_, left, right), lines in zip(frame.groups, texts, strict=True):
        y = rule - frame.px(2) - len(lines) * lettering.line_height(size)
        lettering.write(draw, (left, y), lines, size, BLACK)
        draw.rectangle((left, rule, right - 1, rule + frame.px(THIN) - 1), RULE)
    for left, seed in zip(frame.lefts, seeds, strict=True):
        picture.paste(seed, (left + (frame.cell[0] - seed.width) // 2, bottom - seed.height))
    if word:
        picture.paste(word, (frame.label - frame.px(4) - word.width, bottom - word.height))
    return picture, top, prompts if numbered else []


def _set_prompts(frame: _Frame, prompts: Sequence[str]) -> tuple[int, list[list[str]], bool]:
    """Size and lines of the prompts, in the largest type that fits. True: numbers, for want of room."""
    widths = [right - left for _, left, right in frame.groups]
    for points in PROMPT:
        size = frame.px(points)
        texts = [lettering.broken(text, size, width) for text, width in zip(prompts, widths, strict=True)]
        if all(len(lines) <= PROMPT_LINES and not torn for lines, torn in texts):
            return size, [lines for lines, _ in texts], False
    if min(widths) < frame.px(NARROW):
        return frame.size(NAME), [[str(i + 1)] for i in range(len(prompts))], True
    lines = [
        lettering.clipped(lines, PROMPT_LINES, size, width) for (lines, _), width in zip(texts, widths, strict=True)
    ]
    return size, lines, False


def _seeds(frame: _Frame, seeds: Sequence[int]) -> tuple[list[Image.Image], Image.Image | None]:
    """A label a column: "seed 3"; or where that is too long 3, and the word by itself; or 3 upright."""
    size = frame.size(NOTE)
    texts = [f"seed {seed}" for seed in seeds]
    if max(lettering.length(text, size) for text in texts) <= frame.cell[0]:
        return [_text(text, size, GREY) for text in texts], None
    labels = [_text(str(seed), size, GREY) for seed in seeds]
    if max(label.width for label in labels) > frame.cell[0]:
        labels = [label.transpose(Image.Transpose.ROTATE_90) for label in labels]
    return labels, _text("seed", size, GREY)


def _text(text: str, size: int, fill: str) -> Image.Image:
    picture = Image.new("RGB", (max(1, round(lettering.length(text, size))), lettering.line_height(size)), "white")
    lettering.write(ImageDraw.Draw(picture), (0, 0), [text], size, fill)
    return picture


def _list_of_prompts(frame: _Frame, prompts: Sequence[str]) -> Image.Image:
    """The bottom margin, and above it the numbered prompts, if there are any."""
    size, margin = frame.px(LISTED), frame.px(MARGIN)
    indent = round(lettering.length("000  ", size))
    width = frame.width - 2 * margin - indent
    texts = [lettering.clipped(lettering.broken(text, size, width)[0], PROMPT_LINES, size, width) for text in prompts]
    line = lettering.line_height(size)
    picture = Image.new("RGB", (frame.width, margin * (2 if texts else 1) + line * sum(map(len, texts))), "white")
    draw, y = ImageDraw.Draw(picture), margin
    for i, lines in enumerate(texts):
        lettering.write(draw, (margin, y), [str(i + 1)], size, BLACK)
        lettering.write(draw, (margin + indent, y), lines, size, GREY)
        y += line * len(lines)
    return picture


def _label(frame: _Frame, name: str, note: str) -> Image.Image:
    """A variant's name and, under it, as much of the line about it as the row has room for; in the row's middle."""
    large, small, margin = frame.size(NAME), frame.size(NOTE), frame.px(MARGIN)
    high, low = lettering.line_height(large), lettering.line_height(small)
    width = frame.label - margin - frame.px(4)
    names = lettering.squeezed(lettering.clean(name), max(1, min(3, frame.row_height // high)), large, width)
    notes = lettering.broken(lettering.clean(note), small, width)[0] if note else []
    notes = lettering.clipped(notes, (frame.row_height - high * len(names)) // low, small, width)
    picture = Image.new("RGB", (frame.label, frame.row_height), "white")
    y = (frame.row_height - high * len(names) - low * len(notes)) // 2
    lettering.write(ImageDraw.Draw(picture), (margin, y), names, large, BLACK)
    lettering.write(ImageDraw.Draw(picture), (margin, y + high * len(names)), notes, small, GREY)
    return picture


def _missing(frame: _Frame) -> Image.Image:
    box = Image.new("RGB", frame.cell, EMPTY)
    draw, (width, height) = ImageDraw.Draw(box), frame.cell
    for x in range(-height, width, frame.px(5)):
        draw.line((x, height, x + height, 0), HATCH, frame.px(0.5))
    draw.rectangle((0, 0, width - 1, height - 1), outline=HATCH)
    size = frame.size(NOTE)
    long, high = round(lettering.length("missing", size)), lettering.line_height(size)
    if long + 4 <= width and high <= height:
        x, y = (width - long) // 2, (height - high) // 2
        draw.rectangle((x - 3, y, x + long + 2, y + high), EMPTY)
        lettering.write(draw, (x, y), ["missing"], size, GREY)
    return box


def _first_size(at: Callable[[int, int], "Path | None"], rows: int, columns: int) -> tuple[int, int]:
    """(width, height) of the first image there is; square where there is none."""
    for i in range(rows):
        for j in range(columns):
            image = _opened(at(i, j))
            if image is not None:
                return image.size
    return SMALL, SMALL


def _opened(path: "Path | None") -> Image.Image | None:
    """Return an image in RGB, or None if its file is missing."""
    return open_cell(path) if path is not None and path.is_file() else None


def _fitted(image: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """Enlarged by a whole factor, so that pixels stay pixels, or reduced."""
    scale = min(room / side for room, side in zip(cell, image.size, strict=True))
    if scale >= 1:
        return image.resize([side * int(scale) for side in image.size], Image.Resampling.NEAREST)
    size = [max(1, min(room, round(side * scale))) for room, side in zip(cell, image.size, strict=True)]
    return image.resize(size, Image.Resampling.LANCZOS)
