"""`python -m experiments.article STORE -o figures`: what a run's variants look like, and how much they change.

Time: seconds; needs a finished store and no model. Figure: a row a variant, the baseline first, with its pictures and
beside them the mean of one to three measures with 95 % intervals, the noise floor and another seed. Page width has four
pictures a row, column width two and the first measure; a caption file has all numbers.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from experiments import results
from experiments.results import (
    INTERVALS,
    SHARES,
    axis,
    changes,
    effects,
    every_cell,
    label,
    pick_metrics,
    pick_places,
    pick_variants,
    plain_name,
    run_command,
    single,
)
from experiments.sheet import DPI, LINES, POINTS, SMALL, add_axes, blank, dots, lay, lettered, sized, write
from experiments.style import COLUMN, OKABE_ITO, PAGE, paper, save, save_caption
from fluxlab.drawing.lettering import length, line_height, one_line, shorten, wrap
from fluxlab.drawing.pictures import open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[str, int]

TALLEST, LARGEST = 2700, 330  # dots: a page's height, a picture's side
LABEL = {"column": 250, "page": 320}  # dots: what names take
PANEL = {"column": 270, "page": 270}  # dots: what an effect plot takes at least
PICTURES = {"column": 2, "page": 4}
GAP, PROMPT_GAP, BEFORE, MARGIN = 9, 24, 48, 24  # dots between pictures, prompts, plots; on the right
FOOT, LEAST_ROW, LEAST_PICTURE = 165, 54, 32  # dots
PROMPT_LINES, MOST_METRICS = 6, 3


def make(
    run: Run,
    folder: Path,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    widths: Sequence[str] = ("column", "page"),
) -> list[Path]:
    """Draw pictures and effects of a store's variants, in column and page width, and write the caption."""
    shown, measures = pick_variants(run, variants), pick_metrics(run, metrics, MOST_METRICS)
    stem, written = folder / plain_name(run), []
    for width in widths:
        places = pick_places(run, prompts, seeds, PICTURES[width])
        drawn = draw(run, shown, places, measures if width == "page" else measures[:1], width)
        written += save(drawn, stem.with_name(f"{stem.name}-{width}"))
    return [*written, save_caption(caption(run, shown, measures), stem)]


@dataclass(frozen=True)
class Sheet:
    """Where things lie, in dots from the top left corner.

    lefts: of the pictures; heads: left, right and lines of the prompts over them, in `points`; panels: left and width
    of the plots.
    """

    width: int
    height: int
    label: int
    top: int
    pitch: int
    cell: tuple[int, int]
    lefts: list[int]
    heads: list[tuple[int, int, list[str]]]
    points: float
    panels: list[tuple[int, int]]

    def middle(self, row: int) -> float:
        return self.top + (row + 0.5) * self.pitch - GAP / 2


def sheet(native: tuple[int, int], rows: int, places: Sequence[Place], plots: int, width: str) -> Sheet:
    """Pictures as large as width and height allow, enlarged by a whole factor; what is left goes to the plots.

    native: (width, height) of a picture in pixels. Raises `UserError` for more than fits.
    """
    across = round((PAGE if width == "page" else COLUMN) * DPI)
    gaps = [0, *(GAP if a[0] == b[0] else PROMPT_GAP for a, b in itertools.pairwise(places))]
    room = (across - LABEL[width] - MARGIN - plots * (PANEL[width] + BEFORE) - sum(gaps)) / len(places)
    down = (TALLEST - head(PROMPT_LINES) - FOOT) / rows - GAP
    if down + GAP < LEAST_ROW:
        raise UserError(f"{rows} variants do not fit a page; name some of them with --variants")
    if room < LEAST_PICTURE:
        raise UserError(f"{len(places)} pictures do not fit {width} width; name fewer with --prompt and --seeds")
    cell = sized(Image.new("L", native), (min(room, LARGEST), min(down, LARGEST))).size
    lefts = [LABEL[width] + sum(gaps[: j + 1]) + j * cell[0] for j in range(len(places))]
    spans = []
    for prompt in dict.fromkeys(prompt for prompt, _ in places):
        mine = [left for left, place in zip(lefts, places, strict=True) if place[0] == prompt]
        spans.append((prompt, mine[0], mine[-1] + cell[0]))
    for points in (POINTS, SMALL):
        heads = [(a, b, lettered(f"“{prompt}”", points, b - a, PROMPT_LINES)) for prompt, a, b in spans]
        if max(len(lines) for _, _, lines in heads) <= PROMPT_LINES // 2:
            break
    rest = across - MARGIN - lefts[-1] - cell[0]
    panels = [(across - MARGIN - rest + i * (rest // plots) + BEFORE, rest // plots - BEFORE) for i in range(plots)]
    top, pitch = head(max(len(lines) for _, _, lines in heads)), max(cell[1] + GAP, LEAST_ROW)
    return Sheet(across, top + rows * pitch + FOOT, LABEL[width], top, pitch, cell, lefts, heads, points, panels)


def head(lines: int) -> int:
    """How much prompts of so many lines and a line of seeds take."""
    return lines * line_height(dots(POINTS)) + line_height(dots(SMALL)) + 20


def draw(run: Run, variants: Sequence[str], places: Sequence[Place], metrics: Sequence[str], width: str) -> "Figure":
    """The figure. width: "column" or "page"."""
    first = open_cell(run.image(variants[0], *places[0]))
    at = sheet(first.size, len(variants), places, len(metrics), width)
    with paper():
        whole, canvas = blank(PAGE if width == "page" else COLUMN, at.height)
        heads(canvas, at, [seed for _, seed in places])
        names(canvas, at, {variant: label(run, variant) for variant in variants})
        for row, variant in enumerate(variants):
            for left, place in zip(at.lefts, places, strict=True):
                image = sized(open_cell(run.image(variant, *place)), at.cell)
                aside = (at.cell[0] - image.width) // 2  # of a picture of another shape
                lay(canvas, image, left + aside, round(at.middle(row) - image.height / 2))
        for (left, across), metric in zip(at.panels, metrics, strict=True):
            high = len(variants) * at.pitch
            axes = add_axes(canvas, left, at.top, across, high, ylim=(at.top + high, at.top))
            plot(axes, at, run, variants, metric)
        key(canvas, at, run, metrics)
    return whole


def heads(canvas: "Axes", at: Sheet, seeds: Sequence[int]) -> None:
    """Prompts over their pictures, with a rule under each, and seeds."""
    rule = at.top - line_height(dots(SMALL)) - 8
    for left, right, lines in at.heads:
        for i, line in enumerate(reversed(lines)):
            y = rule - 8 - round((i + 0.2) * line_height(dots(at.points)))
            write(canvas, left, y, line, at.points, va="baseline")
        canvas.plot([left, right], [rule, rule], color="0.6", lw=0.4)
    for left, seed in zip(at.lefts, seeds, strict=True):
        said = f"seed {seed}" if length(f"seed {seed}", dots(SMALL)) < at.cell[0] else str(seed)
        write(canvas, left + at.cell[0] / 2, at.top - 6, said, SMALL, ha="center", va="bottom", color="0.35")


def names(canvas: "Axes", at: Sheet, labels: Mapping[str, str]) -> None:
    """What each variant does and, under it, its name; as much as a row has room for."""
    large, small, room = line_height(dots(POINTS)), line_height(dots(SMALL)), at.label - 30
    both = at.pitch >= large + small
    most = max(1, (at.pitch - small * both) // large)
    fits = all(len(wrap(one_line(said), dots(POINTS), room)[0]) <= most for said in labels.values())
    points = POINTS if fits else SMALL
    for row, (variant, said) in enumerate(labels.items()):
        lines = shorten(one_line(said), most, dots(points), room)
        y = at.middle(row) - (len(lines) * large + small * both) / 2
        for line in lines:
            write(canvas, 10, y, line, points, va="top")
            y += large
        if both:
            write(canvas, 10, y, shorten(variant, 1, dots(SMALL), room)[0], SMALL, va="top", color="0.35")


def plot(axes: "Axes", at: Sheet, run: Run, variants: Sequence[str], metric: str) -> None:
    """A measure's effect and interval in each variant's row, over the two references; single pictures below, faint."""
    found, blue = effects(run, metric), OKABE_ITO["blue"]
    for name, (colour, dashes) in LINES.items():
        mean, low, high = found.get(name, (math.nan,) * 3)
        if math.isfinite(mean):
            axes.axvline(mean, color=OKABE_ITO[colour], ls=dashes, lw=1, zorder=1)
        if math.isfinite(low) and math.isfinite(high):
            axes.axvspan(low, high, color=OKABE_ITO[colour], alpha=0.15, lw=0, zorder=0)
    for n, variant in enumerate(variants):
        y, (mean, low, high) = at.middle(n), found[variant]
        axes.axhline(y, color="0.9", lw=0.5, zorder=0)
        cells = single(run, variant, metric)
        axes.plot(cells, [y + 0.22 * at.pitch] * len(cells), ls="", marker="|", ms=4, mew=0.5, color="0.55", zorder=1)
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [y, y], color=blue, lw=1, marker="|", ms=5, mew=1, zorder=3)
        if math.isfinite(mean):
            face = "white" if variant == run.baseline else blue
            axes.plot(mean, y, "o", ms=3, mec=blue, mfc=face, mew=0.8, zorder=4)
        else:
            said = "none" if math.isnan(mean) else "∞"
            looks = {"ha": "right", "va": "center", "color": "0.35", "transform": axes.get_yaxis_transform()}
            write(axes, 0.98, y, said, SMALL, **looks)
    axes.margins(x=0.06)
    if metric in SHARES and not changes(run, metric):
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.06), max(high, 1.06))
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(axis(run, metric))


def key(canvas: "Axes", at: Sheet, run: Run, metrics: Sequence[str]) -> None:
    """What the marks mean, under the pictures."""
    from matplotlib.lines import Line2D

    mean = Line2D([], [], color=OKABE_ITO["blue"], lw=1, marker="o", ms=3, label="mean, 95 % interval")
    single = Line2D([], [], color="0.55", ls="", marker="|", ms=4, mew=0.5, label="single pictures")
    lines = [
        Line2D([], [], color=OKABE_ITO[colour], ls=dashes, lw=1, label=name)
        for name, (colour, dashes) in LINES.items()
        if any(row["variant"] == name and row["metric"] in metrics for row in run.summary)
    ]
    canvas.legend(
        handles=[mean, single, *lines],
        loc="upper left",
        bbox_to_anchor=(0, (FOOT - 8) / at.height),
        ncols=2 if at.panels[0][0] > 800 else 1,
        borderaxespad=0.2,
        labelspacing=0.2,
        fontsize=SMALL,
    )


def caption(run: Run, variants: Sequence[str], metrics: Sequence[str]) -> str:
    """The figure's text, with the numbers that it shows."""
    said = (
        "A row a variant, its name below its formula; left some of its pictures, right its effects over all of "
        f"{every_cell(run)}: dots are means (the baseline's is open), bars their {INTERVALS}, ticks single pictures."
    )
    return results.caption(run, said, variants, metrics)


if __name__ == "__main__":
    sys.exit(run_command(make, "article"))
