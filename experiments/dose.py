"""`python -m experiments.dose STORE -o figures`: metrics as a function of the one number in which the variants differ.

Takes seconds; needs a finished run folder and no model. One to three metrics over that number: means with 95 %
intervals and the two controls, noise floor and another seed. Above them images of one prompt and seed, each at its
number. Column width shows the first metric. The caption file has all numbers.
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
    all_cells,
    axis_label,
    counts,
    effects,
    formula,
    is_paired,
    one_number,
    pick_metrics,
    pick_places,
    pick_variants,
    plain_name,
    run_command,
)
from experiments.sheet import DPI, LINES, POINTS, SMALL, add_axes, blank, dots, text_lines, write
from experiments.sheet import place as place_image
from experiments.style import COLUMN, OKABE_ITO, PAGE, paper, save, save_caption
from fluxlab.drawing.lettering import line_height
from fluxlab.drawing.pictures import fit_image, open_cell
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.measure.registry import about
from fluxlab.positions import Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Doses = list[tuple[float, str]]

LEFT, RIGHT, PANEL, BETWEEN = 205, 40, 300, 42  # dots
FOOT = {"column": 220, "page": 190}  # dots: the legend has two lines in column width
LARGEST = {"column": 128, "page": 192}  # dots: side of an image
MOST_METRICS = 3
WIDE = 50
"""The axis is logarithmic if the largest number is more than this many times the smallest."""


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
    """Draw metrics over the one number in which a run's variants differ, in column and page width, with a caption."""
    for flag, values in (("--prompt", prompts), ("--seeds", seeds)):
        if len(values or ()) > 1:
            raise UserError(f"{flag} {', '.join(values)}: the images are of one prompt and one seed; name one")
    shown, chosen = pick_variants(run, variants), pick_metrics(run, metrics, MOST_METRICS)
    place = pick_places(run, prompts, seeds, 1)[0]
    name, doses = varied(run, shown[1:])
    stem, written = folder / f"{plain_name(run)}-curve", []
    for width in widths:
        drawn = draw(run, name, doses, place, chosen if width == "page" else chosen[:1], width)
        written += save(drawn, stem.with_name(f"{stem.name}-{width}"))
    return [*written, save_caption(caption(run, name, doses, place, chosen), stem)]


def varied(run: Run, variants: Sequence[str]) -> tuple[str, Doses]:
    """Return what varies, in words, and the (number, variant) in the order of the numbers.

    Raises UserError unless the programs differ in one number only.
    """
    programs = [Program.from_config(run.record["variants"][variant]["program"]) for variant in variants]
    flat = [flatten(program) for program in programs]
    keys = {key for values in flat for key in values}
    differ = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    values = [values.get(differ[0]) for values in flat] if len(differ) == 1 else []
    if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = ", ".join(sorted({".".join(map(str, key[1:])) for key in differ})) or "nothing"
        raise UserError(
            f"{run.path}: expected two or more variants that differ in one number; these differ in {names[:120]}\n"
            "choose some with --variants, or use python -m experiments.article"
        )
    edit, key = programs[0].edits[differ[0][0]], differ[0][1:]
    with_x = formula(edit, "x") if key == (FORMULAS.get(edit.op, (None,))[0],) else None
    argument = key[-2] if key[-1] == "through" else key[-1]
    name = f"x, for {with_x}" if with_x and with_x != formula(edit) else f"{argument} of {edit.op}"
    return name, sorted(zip(map(float, values), variants, strict=True))


def flatten(program: Program) -> dict[tuple, Any]:
    """Return a program as plain values by (edit, key, …). A list that repeats one number becomes that number."""
    flat: dict[tuple, Any] = {}
    for i, edit in enumerate(program.edits):
        flat[i, "op"] = edit.op
        for key, value in (*edit.arguments.items(), *edit.where.items()):
            inside = {(key, k): v for k, v in value.items()} if isinstance(value, dict) else {(key,): value}
            for path, inner in inside.items():
                only = one_number(inner) if isinstance(inner, list) else None
                flat[i, *path] = inner if only is None else only
                if only is not None:  # [–, 2, 2] is not 2
                    flat[i, *path, "axes"] = tuple(part is None for part in inner)
    return flat


def draw(run: Run, name: str, doses: Doses, place: tuple[str, int], metrics: Sequence[str], width: str) -> "Figure":
    """Return the figure. width: "column" or "page"."""
    inches = PAGE if width == "page" else COLUMN
    across = round(inches * DPI) - LEFT - RIGHT
    images = {variant: fit_image(open_cell(run.image(variant, *place)), (LARGEST[width],) * 2) for _, variant in doses}
    large = max(image.height for image in images.values())
    heading = text_lines(f"“{place[0]}”, seed {place[1]}", POINTS, across, 2)
    head = len(heading) * line_height(dots(POINTS)) + 16
    strip = head + line_height(dots(SMALL)) + large + 24
    with paper():
        whole, canvas = blank(inches, strip + len(metrics) * (PANEL + BETWEEN) + FOOT[width] - BETWEEN)
        for i, line in enumerate(heading):
            write(canvas, LEFT, 8 + i * line_height(dots(POINTS)), line, POINTS, va="top")
        panels = []
        for i, metric in enumerate(metrics):
            panels.append(add_axes(canvas, LEFT, strip + i * (PANEL + BETWEEN), across, PANEL))
            curve(panels[-1], run, doses, metric)
            panels[-1].tick_params(labelbottom=metric == metrics[-1])
        whole.align_ylabels(panels)
        panels[-1].set_xlabel(name, parse_math=False)
        above(canvas, panels[0], doses, images, strip - large - 12, across)
        key(canvas, panels[0], 4 if width == "page" else 2)
    return whole


def curve(axes: "Axes", run: Run, doses: Doses, metric: str) -> None:
    """Draw a metric's effect over the numbers, its interval, and the controls."""
    shown, blue = effects(run, metric), OKABE_ITO["blue"]
    n = counts(run, [metric])
    for name, (colour, dashes) in LINES.items():
        mean, low, high = shown.get(name, (math.nan,) * 3)
        if math.isfinite(mean):
            axes.axhline(mean, color=OKABE_ITO[colour], ls=dashes, lw=1, label=f"{name} (n = {n[name]})", zorder=1)
        if math.isfinite(low) and math.isfinite(high):
            axes.axhspan(low, high, color=OKABE_ITO[colour], alpha=0.15, lw=0, zorder=0)
    x = [dose for dose, _ in doses]
    mean, low, high = ([finite(shown[variant][i]) for _, variant in doses] for i in range(3))
    axes.fill_between(
        x, low, high, color=blue, alpha=0.25, lw=0, label=f"95 % interval (n = {n[run.baseline]})", zorder=2
    )
    axes.plot(x, mean, color=blue, marker="o", ms=2.5, label="mean", zorder=3)
    if min(x) > 0 and max(x) > WIDE * min(x):
        axes.set_xscale("log")
    axes.margins(x=0.04)
    if about(metric).share and not is_paired(run, metric):
        least, most = axes.get_ylim()
        axes.set_ylim(min(least, -0.05), max(most, 1.05))
    axes.set_ylabel(axis_label(run, metric, POINTS, PANEL))


def finite(value: float) -> float:
    """Return nan, which leaves a gap, for a value that is not finite."""
    return value if math.isfinite(value) else math.nan


def above(canvas: "Axes", axes: "Axes", doses: Doses, images: dict, top: int, across: int) -> None:
    """Draw images above their numbers, as many as fit next to each other."""
    free = 0.0
    axes.get_xlim()  # updates the limits, which the transforms need
    for dose, variant in doses:
        image = images[variant]
        middle = LEFT + axes.transLimits.transform((axes.transScale.transform((dose, 1))[0], 0))[0] * across
        left = round(middle - image.width / 2)
        if left >= free:
            place_image(canvas, image, left, top)
            write(canvas, middle, top - 5, f"{dose:g}", SMALL, ha="center", va="bottom", color="0.35")
            free = left + image.width + 6


def key(canvas: "Axes", axes: "Axes", columns: int) -> None:
    """Draw the legend at the bottom."""
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns, fontsize=SMALL, borderaxespad=0.3
    )


def caption(run: Run, name: str, doses: Doses, place: tuple[str, int], metrics: Sequence[str]) -> str:
    """Return the caption with all numbers of the figure."""
    text = (
        f"Over {name}: {len(doses)} values from {doses[0][0]:g} to {doses[-1][0]:g}. Lines are means over "
        f"{all_cells(run)}, bands their {INTERVALS}. The images are of seed {place[1]} and “{place[0]}”."
    )
    return results.caption(run, text, [run.baseline, *(variant for _, variant in doses)], metrics)


if __name__ == "__main__":
    sys.exit(run_command(make, "dose"))
