"""`python -m experiments.article STORE -o figures`: images of a run's variants, next to their effects.

Takes seconds; needs a finished run folder and no model. One row per variant, the baseline first. Left: its images.
Right: one to three metrics with 95 % intervals and the two controls, noise floor and another seed. Page width shows
four images per row, column width two and the first metric. The caption file has all numbers.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import results
from experiments.results import (
    INTERVALS,
    all_cells,
    axis_label,
    cell_effects,
    counts,
    effects,
    is_paired,
    label,
    pick_metrics,
    pick_places,
    pick_variants,
    plain_name,
    run_command,
)
from experiments.sheet import DPI, LINES, POINTS, SMALL, add_axes, blank, dots, place, text_lines, write
from experiments.style import COLUMN, OKABE_ITO, PAGE, paper, save, save_caption
from fluxlab.drawing.lettering import length, line_height, one_line, shorten, wrap
from fluxlab.drawing.pictures import fit_image, fitted_size, open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.measure.registry import about

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Place = tuple[str, int]  # prompt and seed

TALLEST, LARGEST = 2700, 330  # dots: height of a page, side of an image
LABEL = {"column": 250, "page": 320}  # dots: width of the names
PANEL = {"column": 270, "page": 270}  # dots: smallest width of a plot
IMAGES = {"column": 2, "page": 4}  # per row
GAP, PROMPT_GAP, BEFORE, MARGIN = 9, 24, 48, 24  # dots between images, between prompts, before plots, on the right
FOOT, LEAST_ROW, LEAST_IMAGE = 165, 54, 32  # dots
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
    """Draw images and effects of a run's variants, in column and page width, and write the caption."""
    shown, chosen = pick_variants(run, variants), pick_metrics(run, metrics, MOST_METRICS)
    stem, written = folder / plain_name(run), []
    for width in widths:
        places = pick_places(run, prompts, seeds, IMAGES[width])
        drawn = draw(run, shown, places, chosen if width == "page" else chosen[:1], width)
        written += save(drawn, stem.with_name(f"{stem.name}-{width}"))
    return [*written, save_caption(caption(run, shown, chosen), stem)]


@dataclass(frozen=True)
class Sheet:
    """Positions on the figure, in dots from the top left corner.

    lefts: left edges of the images. heads: left and right edge and lines of the prompts above them, with type of size
    `points`. panels: left edge and width of the plots.
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
    """Return a layout with images as large as the page allows, enlarged by a whole factor; plots get the rest.

    native: (width, height) of an image in pixels. Raises UserError for more than fits.
    """
    across = round((PAGE if width == "page" else COLUMN) * DPI)
    gaps = [0, *(GAP if a[0] == b[0] else PROMPT_GAP for a, b in itertools.pairwise(places))]
    room = (across - LABEL[width] - MARGIN - plots * (PANEL[width] + BEFORE) - sum(gaps)) / len(places)
    down = (TALLEST - head(PROMPT_LINES) - FOOT) / rows - GAP
    if down + GAP < LEAST_ROW:
        raise UserError(f"{rows} variants do not fit a page; choose some with --variants")
    if room < LEAST_IMAGE:
        raise UserError(f"{len(places)} images do not fit {width} width; choose fewer with --prompt and --seeds")
    cell = fitted_size(native, (min(room, LARGEST), min(down, LARGEST)))
    lefts = [LABEL[width] + sum(gaps[: j + 1]) + j * cell[0] for j in range(len(places))]
    spans = []
    for prompt in dict.fromkeys(prompt for prompt, _ in places):
        edges = [left for left, cell_of in zip(lefts, places, strict=True) if cell_of[0] == prompt]
        spans.append((prompt, edges[0], edges[-1] + cell[0]))
    for points in (POINTS, SMALL):
        heads = [(a, b, text_lines(f"“{prompt}”", points, b - a, PROMPT_LINES)) for prompt, a, b in spans]
        if max(len(lines) for _, _, lines in heads) <= PROMPT_LINES // 2:
            break
    rest = across - MARGIN - lefts[-1] - cell[0]
    panels = [(across - MARGIN - rest + i * (rest // plots) + BEFORE, rest // plots - BEFORE) for i in range(plots)]
    top, pitch = head(max(len(lines) for _, _, lines in heads)), max(cell[1] + GAP, LEAST_ROW)
    return Sheet(across, top + rows * pitch + FOOT, LABEL[width], top, pitch, cell, lefts, heads, points, panels)


def head(lines: int) -> int:
    """Return the height of prompts with so many lines and of the line of seeds."""
    return lines * line_height(dots(POINTS)) + line_height(dots(SMALL)) + 20


def draw(run: Run, variants: Sequence[str], places: Sequence[Place], metrics: Sequence[str], width: str) -> "Figure":
    """Return the figure. width: "column" or "page"."""
    first = open_cell(run.image(variants[0], *places[0]))
    at = sheet(first.size, len(variants), places, len(metrics), width)
    with paper():
        whole, canvas = blank(PAGE if width == "page" else COLUMN, at.height)
        heads(canvas, at, [seed for _, seed in places])
        names(canvas, at, {variant: label(run, variant) for variant in variants})
        for row, variant in enumerate(variants):
            for left, shown in zip(at.lefts, places, strict=True):
                image = fit_image(open_cell(run.image(variant, *shown)), at.cell)
                aside = (at.cell[0] - image.width) // 2  # an image of another shape is centred
                place(canvas, image, left + aside, round(at.middle(row) - image.height / 2))
        for (left, across), metric in zip(at.panels, metrics, strict=True):
            high = len(variants) * at.pitch
            axes = add_axes(canvas, left, at.top, across, high, ylim=(at.top + high, at.top))
            plot(axes, at, run, variants, metric)
            axes.set_xlabel(axis_label(run, metric, POINTS, across + BEFORE - GAP))
        key(canvas, at, run, metrics)
    return whole


def heads(canvas: "Axes", at: Sheet, seeds: Sequence[int]) -> None:
    """Draw prompts above their images, each with a rule below it, and seeds."""
    rule = at.top - line_height(dots(SMALL)) - 8
    for left, right, lines in at.heads:
        for i, line in enumerate(reversed(lines)):
            y = rule - 8 - round((i + 0.2) * line_height(dots(at.points)))
            write(canvas, left, y, line, at.points, va="baseline")
        canvas.plot([left, right], [rule, rule], color="0.6", lw=0.4)
    for left, seed in zip(at.lefts, seeds, strict=True):
        text = f"seed {seed}" if length(f"seed {seed}", dots(SMALL)) < at.cell[0] else str(seed)
        write(canvas, left + at.cell[0] / 2, at.top - 6, text, SMALL, ha="center", va="bottom", color="0.35")


def names(canvas: "Axes", at: Sheet, labels: Mapping[str, str]) -> None:
    """Draw what each variant does and, below it, its name, as far as the row has room."""
    large, small, room = line_height(dots(POINTS)), line_height(dots(SMALL)), at.label - 30
    both = at.pitch >= large + small
    most = max(1, (at.pitch - small * both) // large)
    fits = all(len(wrap(one_line(text), dots(POINTS), room)[0]) <= most for text in labels.values())
    points = POINTS if fits else SMALL
    for row, (variant, text) in enumerate(labels.items()):
        lines = shorten(one_line(text), most, dots(points), room)
        y = at.middle(row) - (len(lines) * large + small * both) / 2
        for line in lines:
            write(canvas, 10, y, line, points, va="top")
            y += large
        if both:
            write(canvas, 10, y, shorten(variant, 1, dots(SMALL), room)[0], SMALL, va="top", color="0.35")


def plot(axes: "Axes", at: Sheet, run: Run, variants: Sequence[str], metric: str) -> None:
    """Draw a metric's effect and interval in each variant's row, the controls behind, single cells faintly below."""
    shown, blue = effects(run, metric), OKABE_ITO["blue"]
    for name, (colour, dashes) in LINES.items():
        mean, low, high = shown.get(name, (math.nan,) * 3)
        if math.isfinite(mean):
            axes.axvline(mean, color=OKABE_ITO[colour], ls=dashes, lw=1, zorder=1)
        if math.isfinite(low) and math.isfinite(high):
            axes.axvspan(low, high, color=OKABE_ITO[colour], alpha=0.15, lw=0, zorder=0)
    for n, variant in enumerate(variants):
        y, (mean, low, high) = at.middle(n), shown[variant]
        axes.axhline(y, color="0.9", lw=0.5, zorder=0)
        cells = cell_effects(run, variant, metric)
        axes.plot(cells, [y + 0.22 * at.pitch] * len(cells), ls="", marker="|", ms=4, mew=0.5, color="0.55", zorder=1)
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [y, y], color=blue, lw=1, marker="|", ms=5, mew=1, zorder=3)
        if math.isfinite(mean):
            face = "white" if variant == run.baseline else blue
            axes.plot(mean, y, "o", ms=3, mec=blue, mfc=face, mew=0.8, zorder=4)
        else:
            text = about(metric).absent or "no value" if math.isnan(mean) else "∞"
            options = {"ha": "right", "va": "center", "color": "0.35", "transform": axes.get_yaxis_transform()}
            write(axes, 0.98, y, text, SMALL, **options)
    axes.margins(x=0.06)
    if about(metric).share and not is_paired(run, metric):
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.06), max(high, 1.06))
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def key(canvas: "Axes", at: Sheet, run: Run, metrics: Sequence[str]) -> None:
    """Draw the legend below the images."""
    from matplotlib.lines import Line2D

    n = counts(run, metrics)
    label = f"mean, 95 % interval (n = {n[run.baseline]})"
    mean = Line2D([], [], color=OKABE_ITO["blue"], lw=1, marker="o", ms=3, label=label)
    cells = Line2D([], [], color="0.55", ls="", marker="|", ms=4, mew=0.5, label="single images")
    lines = [
        Line2D([], [], color=OKABE_ITO[colour], ls=dashes, lw=1, label=f"{name} (n = {n[name]})")
        for name, (colour, dashes) in LINES.items()
        if n.get(name)
    ]
    canvas.legend(
        handles=[mean, cells, *lines],
        loc="upper left",
        bbox_to_anchor=(0, (FOOT - 8) / at.height),
        ncols=2 if at.panels[0][0] > 800 else 1,
        borderaxespad=0.2,
        labelspacing=0.2,
        fontsize=SMALL,
    )


def caption(run: Run, variants: Sequence[str], metrics: Sequence[str]) -> str:
    """Return the caption with all numbers of the figure."""
    text = (
        "One row per variant, its name below its formula. Left: some of its images. Right: its effects over all "
        f"{all_cells(run)}; dots are means (open: the baseline), bars their {INTERVALS}, ticks single images."
    )
    return results.caption(run, text, variants, metrics)


if __name__ == "__main__":
    sys.exit(run_command(make, "article"))
