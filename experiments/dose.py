"""`python -m experiments.dose STORE -o figures`: how measures follow the one number that a run's variants differ in.

Time: seconds; needs a finished store and no model. Figure: one to three measures over the number, means with 95 %
intervals, beside the untouched ids, the noise floor and another seed; above them pictures of one prompt and seed, each
over its number. Column width has the first measure; a caption file has all numbers.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import results
from experiments.results import (
    FORMULAS,
    INTERVALS,
    SHARES,
    axis,
    changes,
    effects,
    every_cell,
    formula,
    one_number,
    pick_metrics,
    pick_places,
    pick_variants,
    plain_name,
    run_command,
)
from experiments.sheet import DPI, LINES, POINTS, SMALL, add_axes, blank, dots, lay, lettered, sized, write
from experiments.style import COLUMN, OKABE_ITO, PAGE, paper, save, save_caption
from fluxlab.drawing.lettering import line_height
from fluxlab.drawing.pictures import open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.positions import Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Doses = list[tuple[float, str]]

LEFT, RIGHT, PANEL, BETWEEN, FOOT = 205, 40, 300, 42, 190  # dots
LARGEST = {"column": 128, "page": 192}  # dots: a picture's side
MOST_METRICS = 3
WIDE = 50
"""How many times the least number the largest is where the axis becomes logarithmic."""


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
    """Draw measures over the one number that a store's variants differ in, in column and page width, with a caption."""
    shown, measures = pick_variants(run, variants), pick_metrics(run, metrics, MOST_METRICS)
    place = pick_places(run, prompts, seeds, 1)[0]
    name, doses = varied(run, shown[1:])
    stem, written = folder / f"{plain_name(run)}-curve", []
    for width in widths:
        drawn = draw(run, name, doses, place, measures if width == "page" else measures[:1], width)
        written += save(drawn, stem.with_name(f"{stem.name}-{width}"))
    return [*written, save_caption(caption(run, name, doses, place, measures), stem)]


def varied(run: Run, variants: Sequence[str]) -> tuple[str, Doses]:
    """What varies, in words, and its (number, variant) in order of the numbers.

    Raises `UserError` unless the programs are the same but for one number.
    """
    programs = [Program.from_config(run.record["variants"][variant]["program"]) for variant in variants]
    found = [parts(program) for program in programs]
    keys = {key for one in found for key in one}
    differ = [key for key in keys if len({repr(one.get(key)) for one in found}) > 1]
    values = [one.get(differ[0]) for one in found] if len(differ) == 1 else []
    if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = ", ".join(sorted({".".join(map(str, key[1:])) for key in differ})) or "nothing"
        raise UserError(
            f"{run.path}: a curve needs two variants or more that differ in one number; these differ in {names[:120]}\n"
            "name those that do with --variants, or draw them with python -m experiments.article"
        )
    edit, key = programs[0].edits[differ[0][0]], differ[0][1:]
    formulated = formula(edit, "x") if key == (FORMULAS.get(edit.op, (None,))[0],) else None
    said = key[-2] if key[-1] == "through" else key[-1]
    name = f"x, for {formulated}" if formulated and formulated != formula(edit) else f"{said} of {edit.op}"
    return name, sorted(zip(map(float, values), variants, strict=True))


def parts(program: Program) -> dict[tuple, Any]:
    """A program as plain values by (edit, key, …); a list of one number over and over is that number."""
    found: dict[tuple, Any] = {}
    for i, edit in enumerate(program.edits):
        found[i, "op"] = edit.op
        for key, value in (*edit.arguments.items(), *edit.where.items()):
            inside = {(key, k): v for k, v in value.items()} if isinstance(value, dict) else {(key,): value}
            for path, inner in inside.items():
                only = one_number(inner) if isinstance(inner, list) else None
                found[i, *path] = inner if only is None else only
                if only is not None:  # [–, 2, 2] is not 2
                    found[i, *path, "axes"] = tuple(part is None for part in inner)
    return found


def draw(run: Run, name: str, doses: Doses, place: tuple[str, int], metrics: Sequence[str], width: str) -> "Figure":
    """The figure. width: "column" or "page"."""
    inches = PAGE if width == "page" else COLUMN
    across = round(inches * DPI) - LEFT - RIGHT
    images = {variant: sized(open_cell(run.image(variant, *place)), (LARGEST[width],) * 2) for _, variant in doses}
    large = max(image.height for image in images.values())
    told = lettered(f"“{place[0]}”, seed {place[1]}", POINTS, across, 2)
    head = len(told) * line_height(dots(POINTS)) + 16
    strip = head + line_height(dots(SMALL)) + large + 24
    with paper():
        whole, canvas = blank(inches, strip + len(metrics) * (PANEL + BETWEEN) + FOOT - BETWEEN)
        for i, line in enumerate(told):
            write(canvas, LEFT, 8 + i * line_height(dots(POINTS)), line, POINTS, va="top")
        panels = []
        for i, metric in enumerate(metrics):
            panels.append(add_axes(canvas, LEFT, strip + i * (PANEL + BETWEEN), across, PANEL))
            curve(panels[-1], run, doses, metric)
            panels[-1].tick_params(labelbottom=metric == metrics[-1])
        whole.align_ylabels(panels)
        panels[-1].set_xlabel(name, parse_math=False)
        above(canvas, panels[0], doses, images, strip - large - 12, across)
        key(canvas, panels[0], run)
    return whole


def curve(axes: "Axes", run: Run, doses: Doses, metric: str) -> None:
    """A measure's effect over the numbers, its interval, and the references."""
    found, blue = effects(run, metric), OKABE_ITO["blue"]
    for name, (colour, dashes) in LINES.items():
        mean, low, high = found.get(name, (math.nan,) * 3)
        if math.isfinite(mean):
            axes.axhline(mean, color=OKABE_ITO[colour], ls=dashes, lw=1, label=name, zorder=1)
        if math.isfinite(low) and math.isfinite(high):
            axes.axhspan(low, high, color=OKABE_ITO[colour], alpha=0.15, lw=0, zorder=0)
    x = [dose for dose, _ in doses]
    mean, low, high = ([finite(found[variant][i]) for _, variant in doses] for i in range(3))
    axes.fill_between(x, low, high, color=blue, alpha=0.25, lw=0, label="95 % interval", zorder=2)
    axes.plot(x, mean, color=blue, marker="o", ms=2.5, label="mean", zorder=3)
    if min(x) > 0 and max(x) > WIDE * min(x):
        axes.set_xscale("log")
    axes.margins(x=0.04)
    if metric in SHARES and not changes(run, metric):
        least, most = axes.get_ylim()
        axes.set_ylim(min(least, -0.05), max(most, 1.05))
    axes.set_ylabel(axis(run, metric).replace(" to the ", "\nto the "))


def finite(value: float) -> float:
    """nan, which leaves a gap, for what is off every scale."""
    return value if math.isfinite(value) else math.nan


def above(canvas: "Axes", axes: "Axes", doses: Doses, images: dict, top: int, across: int) -> None:
    """Pictures over their numbers, as many as stand side by side."""
    free = 0.0
    axes.get_xlim()  # settles them
    for dose, variant in doses:
        image = images[variant]
        middle = LEFT + axes.transLimits.transform((axes.transScale.transform((dose, 1))[0], 0))[0] * across
        left = round(middle - image.width / 2)
        if left >= free:
            lay(canvas, image, left, top)
            write(canvas, middle, top - 5, f"{dose:g}", SMALL, ha="center", va="bottom", color="0.35")
            free = left + image.width + 6


def key(canvas: "Axes", axes: "Axes", run: Run) -> None:
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 0), ncols=4, fontsize=SMALL, borderaxespad=0.3)


def caption(run: Run, name: str, doses: Doses, place: tuple[str, int], metrics: Sequence[str]) -> str:
    """The figure's text, with the numbers that it shows."""
    said = (
        f"Over {name}: {len(doses)} values from {doses[0][0]:g} to {doses[-1][0]:g}. Lines are means over "
        f"{every_cell(run)}, bands their {INTERVALS}; the pictures are those of seed {place[1]} of “{place[0]}”."
    )
    return results.caption(run, said, [run.baseline, *(variant for _, variant in doses)], metrics)


if __name__ == "__main__":
    sys.exit(run_command(make, "dose"))
