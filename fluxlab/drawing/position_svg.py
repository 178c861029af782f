"""The plot of `draw_positions` as SVG, written directly: a run draws one per variant, and matplotlib takes a second."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from urllib.parse import quote

from fluxlab.drawing.position_plot import EDGES, piles
from fluxlab.drawing.style import MARKS, title
from fluxlab.positions.at_step import COL, INDEX, ROW, ProgramAtStep, summary, token_groups
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT

WIDTH, PANEL, LINE = 720, 510, 17  # px: of the figure, height of the axes, height of a line of text
LEFT, RIGHT, BAR = 46, 4, 86  # px next to the axes; BAR is the room of the colour bar
MARGIN = 0.08  # of the axes, on each side of the points
GREY, DARK = "#bfbfbf", "#4d4d4d"
CIVIDIS = ["00224e", "083370", "35456c", "4f576c", "666970", "7d7c78"]
CIVIDIS += ["948e77", "aea371", "c8b866", "e5cf52", "fee838"]
"""Every tenth of the colour map cividis (Nuñez et al., PLoS ONE 2018), which colour-blind readers see as others do."""

Point = tuple[float, float]


def positions_svg(state: ProgramAtStep) -> tuple[str, tuple[int, int]]:
    """Return the plot as the text of an SVG file, and its (width, height) in pixels. Its parts: `draw_positions`."""
    index = state.after[:, INDEX].tolist()
    low, high = min(index), max(index)
    heading = title(state.program, state.labels).splitlines()
    top = LINE * len(heading) + 9
    view = _View(state, top, LEFT, WIDTH - (BAR if high > low else RIGHT))
    groups = token_groups(state.context.layout)
    size = min(7.0, 170 / max(max(grid) for grid in state.context.layout.grids))  # px
    parts = [_text(heading_line, 7, LINE * (i + 1) - 3, 12) for i, heading_line in enumerate(heading)]
    parts += [*_axes(view), _dots(map(view, state.before[:, [COL, ROW]].tolist()), 0.7 * size, GREY)]
    legend, on_top = [], []
    for name, kind, start, stop in groups:
        own = list(map(view, state.after[start:stop, [COL, ROW]].tolist()))
        colour = MARKS[min(kind, REFERENCE)][1]
        if kind != TEXT:
            grid = state.context.layout.grids[kind - IMAGE]
            parts.append(_mesh(list(map(view, state.before[start:stop, [COL, ROW]].tolist())), grid, GREY))
            parts.append(_mesh(own, grid, DARK))
            if kind == IMAGE:
                sides = zip((own[: grid[1]], own[:: grid[1]]), EDGES.values(), strict=True)
                parts += [_path(_line(side), stroke) for side, stroke in sides]
        shades = [_shade((i - low) / (high - low)) for i in index[start:stop]] if high > low else [colour] * len(own)
        (on_top if kind == TEXT else parts).extend(_marks(own, shades, size, kind, edged=high > low))
        shown = DARK if high > low else colour
        legend.append((_marks([(22, 0)], [shown], 8, kind, edged=False), f"{name}: {summary(state.after[start:stop])}"))
    parts += [*on_top, *(_note(view((col, row)), text, view) for row, col, text in piles(state))]
    if high > low:
        parts.append(_colour_bar(low, high, top))
    at = top + PANEL + 56
    for marks, text in legend:
        parts.append(f'<g transform="translate(0 {at})">{"".join(marks)}{_text(text, 41, 4)}</g>')
        at += LINE
    parts.append(f'<g transform="translate(0 {at})">{_last_line()}</g>')
    height = at + LINE
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    style = 'font-family="DejaVu Sans, Verdana, sans-serif" font-size="11"'
    return f'{head} {style}><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>', (WIDTH, height)


def svg_url(svg: str) -> str:
    """Return a data URL that is smaller than base64, and has nothing that looks like an address."""
    return "data:image/svg+xml," + quote(svg, safe=",;=-.")


class _View:
    """Maps (col, row) to pixels. Both axes have one scale."""

    def __init__(self, state: ProgramAtStep, top: int, left: int, right: int):
        both = [*state.before[:, [COL, ROW]].tolist(), *state.after[:, [COL, ROW]].tolist()]
        self.box = left, top, right, top + PANEL  # px
        ends = [(min(values), max(values)) for values in zip(*both, strict=True)]
        sizes = right - left, PANEL
        spans = [max(high - low, 1e-6 * max(abs(low), abs(high)), 1.0) * (1 + 2 * MARGIN) for low, high in ends]
        self.scale = min(size / span for size, span in zip(sizes, spans, strict=True))  # px per position
        middles = [(low + high) / 2 for low, high in ends]
        self.first = [m - size / self.scale / 2 for m, size in zip(middles, sizes, strict=True)]  # at the upper left
        self.last = [first + size / self.scale for first, size in zip(self.first, sizes, strict=True)]

    def __call__(self, position: Sequence[float]) -> Point:
        x, y = ((p - first) * self.scale for p, first in zip(position, self.first, strict=True))
        return self.box[0] + x, self.box[1] + y

    def ticks(self, axis: int) -> list[int]:
        """Return whole numbers 1, 2 or 5 times a power of ten apart, at most ten of them."""
        low, high = self.first[axis], self.last[axis]
        power = 10 ** max(0, math.floor(math.log10(max(high - low, 1) / 10)))
        step = next(power * n for n in (1, 2, 5, 10, 20) if (high - low) / (power * n) <= 10)
        return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(view: _View) -> Iterator[str]:
    left, top, right, bottom = view.box
    yield f'<path d="M{left} {top}H{right}V{bottom}H{left}z" fill="none" stroke="#000" stroke-width=".8"/>'
    for tick in view.ticks(0):
        x = view((tick, 0))[0]
        yield _path(f"M{x:.1f} {bottom}v4", "#000", 0.8) + _text(f"{tick}", x, bottom + 17, anchor="middle")
    for tick in view.ticks(1):
        y = view((0, tick))[1]
        yield _path(f"M{left} {y:.1f}h-4", "#000", 0.8) + _text(f"{tick}", left - 7, y + 4, anchor="end")
    yield _text("col", (left + right) / 2, bottom + 33, anchor="middle")
    yield f'<g transform="translate(13 {(top + bottom) / 2}) rotate(-90)">{_text("row", 0, 0, anchor="middle")}</g>'


def _text(text: str, x: float, y: float, size: int | None = None, anchor: str = "", more: str = "") -> str:
    of = (f' font-size="{size}"' if size else "") + (f' text-anchor="{anchor}"' if anchor else "") + more
    return f'<text x="{x:.4g}" y="{y:.4g}"{of}>{escape(text)}</text>'


def _path(d: str, stroke: str, width: float = 2, more: str = "") -> str:
    return f'<path d="{d}" fill="none" stroke="{stroke}" stroke-width="{width:.3g}"{more}/>'


def _steps(points: Sequence[Point]) -> Iterator[str]:
    """Yield the step from each point to the next. Both are rounded to a tenth of a pixel, so no error adds up."""
    x, y = 0, 0
    for point in points:
        a, b = (round(10 * p) for p in point)
        yield f"{(a - x) / 10:g},{(b - y) / 10:g}"
        x, y = a, b


def _line(points: Sequence[Point]) -> str:
    first, *others = _steps(points)
    return f"M{first}l{' '.join(others)}"


def _mesh(points: list[Point], grid: tuple[int, int], stroke: str) -> str:
    """Return lines that join neighbours."""
    rows, cols = grid
    lines = [*(points[i * cols : (i + 1) * cols] for i in range(rows)), *(points[i::cols] for i in range(cols))]
    return _path("".join(map(_line, lines)), stroke, 0.5, ' opacity=".6"')


def _dots(points: Iterator[Point] | Sequence[Point], width: float, colour: str, cap: str = "round") -> str:
    """Return points as lines without length, which have the shape of their caps."""
    return _path("".join(f"m{step}h0" for step in _steps(list(points))), colour, width, f' stroke-linecap="{cap}"')


def _marks(points: Sequence[Point], shades: Sequence[str], size: float, kind: int, edged: bool) -> list[str]:
    """Return the marks of one kind of token: triangles for text, circles for the image, squares for references."""
    groups: dict[str, list[Point]] = {}
    for point, shade in zip(points, shades, strict=True):
        groups.setdefault(shade, []).append(point)
    if kind == TEXT:
        r = max(4.0, 0.8 * size)
        shape = f"l{r:.3g},{1.8 * r:.3g}h{-2 * r:.3g}z"
        return [
            f'<path d="{"".join(f"M{x:.1f},{y - r:.1f}{shape}" for x, y in own)}" fill="{shade}" stroke="#000"/>'
            for shade, own in groups.items()
        ]
    cap = "round" if kind == IMAGE else "square"
    width = size if kind == IMAGE else 0.85 * size  # a square cap is as wide as a round one, with corners
    edge = [_dots(points, width + max(0.6, 0.15 * size), "#000", cap)] if edged else []
    return [*edge, *(_dots(own, width, shade, cap) for shade, own in groups.items())]


def _shade(share: float) -> str:
    """Return the colour of a share of the index axis, 0 to 1, between those of `CIVIDIS`."""
    i = min(int(share * 10), 9)
    ends = ([int(colour[k : k + 2], 16) for k in (0, 2, 4)] for colour in CIVIDIS[i : i + 2])
    return "#" + "".join(f"{round(a + (b - a) * (10 * share - i)):02x}" for a, b in zip(*ends, strict=True))


def _colour_bar(low: float, high: float, top: int) -> str:
    x, y, height = WIDTH - 56, top + PANEL * 0.15, PANEL * 0.7
    stops = "".join(f'<stop offset="{i / 10:g}" stop-color="#{colour}"/>' for i, colour in enumerate(CIVIDIS))
    bar = f'<linearGradient id="index" x1="0" y1="1" x2="0" y2="0">{stops}</linearGradient>'
    bar += f'<rect x="{x}" y="{y}" width="17" height="{height}" fill="url(#index)" stroke="#000" stroke-width=".8"/>'
    ends = _text(f"{high:.4g}", x + 22, y + 8) + _text(f"{low:.4g}", x + 22, y + height)
    name = _text("index (axis 0)", 0, 0, anchor="middle")
    return f'{bar}{ends}<g transform="translate({x - 8} {y + height / 2}) rotate(-90)">{name}</g>'


def _note(at: Point, text: str, view: _View) -> str:
    """Return a text next to a point, on the side where there is more room."""
    right = at[0] > (view.box[0] + view.box[2]) / 2
    halo = ' paint-order="stroke" stroke="#fff" stroke-width="5" stroke-linejoin="round"'
    return _text(text, at[0] + (-8 if right else 8), at[1] - 11, anchor="end" if right else "start", more=halo)


def _last_line() -> str:
    """Return the entries of the legend that every plot has."""
    parts = [_dots([(22, 0)], 5, GREY), _text("unchanged positions", 41, 4)]
    for x, (edge, colour) in zip((200, 380), EDGES.items(), strict=True):
        parts += [_path(f"M{x} 0h22", colour), _text(edge, x + 29, 4)]
    return "".join(parts)
