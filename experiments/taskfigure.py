"""What the figures of runs with a task share (`fluxlab.experiment.tasks`): images next to what is measured in them."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.results import (
    INTERVALS,
    all_cells,
    conditions,
    controls,
    counted,
    every_image,
    opening,
    plain_name,
    value_text,
)
from experiments.style import (
    COLUMN,
    OKABE_ITO,
    PAGE,
    figure,
    out_argument,
    paper,
    refusing_parser,
    save,
    save_caption,
    save_table,
)
from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.experiment.inputs import Inputs, from_values
from fluxlab.experiment.reading import Run, read_store
from fluxlab.images import read_pixels
from fluxlab.measure.summary import CONTROLS, summarise
from fluxlab.scenes import cases
from fluxlab.scenes.cases import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Read = Callable[[np.ndarray, Case], dict[str, float]]
"""Measures of an image of a drawn scene, which are added to the columns of metrics.csv."""

Means = dict[str, dict[str, dict[str, float]]]
"""Variant or control → measure → n, mean, low and high, and those of the paired difference to the baseline."""

AT_ONCE = (9, 11)
"""Images next to each other: at least, if there are several lines of them, and at most."""


@dataclass(frozen=True)
class About:
    """What a figure shows. measures: name → title, in order. shown: those that are drawn, the first in column width.
    shares: measures between 0 and 1. read: see `Read`. text: of the caption, by the run and
    whether the oracle reads it.
    """

    name: str
    task: str
    measures: Mapping[str, str]
    shown: Sequence[str]
    shares: Sequence[str]
    read: Read
    text: Callable[[Run, bool], str]


class Worked:
    """A run with what its tasks work on."""

    def __init__(self, run: Run):
        self.run, request = run, run.record["request"]
        self.inputs = from_values(request.get("inputs", ()))
        self.tasks: Mapping[str, Mapping[str, Any]] = request.get("tasks", {})
        self.prompts = list(request["prompts"])

    @property
    def is_read(self) -> bool:
        """Whether the scene oracle reads the images: drawn scenes, of a model that was trained on them."""
        return bool(self.run.record["request"]["model"].get("scenes")) and self.case(self.prompts[0]) is not None

    def given(self, prompt: str) -> Inputs:
        """Return the inputs of a prompt."""
        return self.inputs[self.prompts.index(prompt) if len(self.inputs) > 1 else 0]

    def case(self, prompt: str) -> Case | None:
        """Return the drawn scene of a prompt; None for the user's own images."""
        path = self.given(prompt).image.path
        return cases.case(*cases.parsed(path)[:3]) if cases.is_name(path) else None


def rows_of(worked: Worked, about: About) -> list[dict[str, Any]]:
    """Return the measures of every image, of cells and of controls. A cell without an image has none."""
    rows = []
    for row, file in every_image(worked.run):
        keys = {key: row[key] for key in ("variant", "prompt", "seed")}
        values = {name: row[name] for name in about.measures if name in row}
        if worked.is_read and file.is_file():
            values |= about.read(read_pixels(file), worked.case(row["prompt"]))
        rows.append(keys | {name: values.get(name, math.nan) for name in about.measures})
    return rows


def means(rows: Sequence[Mapping[str, Any]], baseline: str, measures: Iterable[str]) -> Means:
    """Return the mean of every measure that has values, and its paired difference to the baseline.

    first: the value of the first image, which a test computes again.
    """
    found: Means = {}
    first = {row["variant"]: row for row in reversed(rows)}
    for row in summarise(rows, baseline, list(measures)):
        if not row["n"]:
            continue
        values = {key: row[key] for key in ("mean", "low", "high", "paired_mean", "paired_low", "paired_high")}
        values |= {"first": first[row["variant"]][row["metric"]]}
        kept = {key: round(value, 6) for key, value in values.items() if math.isfinite(value)}
        found.setdefault(row["variant"], {})[row["metric"]] = {"n": row["n"], **kept}
    return found


def numbers(run: Run, about: About) -> Means:
    """Return the means of a run. Raises `UserError` for a run without the task of the figure."""
    return means(rows_of(_checked(run, about), about), run.baseline, about.measures)


def _checked(run: Run, about: About) -> Worked:
    worked = Worked(run)
    if about.task not in {task["name"] for task in worked.tasks.values()}:
        raise UserError(f"{run.path}: no variant has the task {about.task}; give a run of +exp={about.name}")
    return worked


def make(run: Run, about: About, folder: Path, widths: Sequence[str], shown: int) -> list[Path]:
    """Write the figure of a run in the given widths, its caption, and a CSV with a row per image.

    shown: how many scenes have their images in page width.
    """
    worked, stem, written = _checked(run, about), folder / plain_name(run), []
    rows = rows_of(worked, about)
    found = means(rows, run.baseline, about.measures)
    places = run.places[:shown]
    for width in widths:
        with paper():
            drawn = _page(worked, about, found, places) if width == "page" else _column(worked, about, found)
        written += save(drawn, stem.with_name(f"{stem.name}-{width}"))
    text = "\n".join([_caption(worked, about, len(places)), *measure_lines(found, about.measures), conditions(run)])
    return [*written, save_caption(text, stem), save_table(rows, stem.with_suffix(".csv"))]


def _caption(worked: Worked, about: About, shown: int) -> str:
    run = worked.run
    return (
        f"{opening(run)} {about.text(run, worked.is_read)} Baseline: {run.describe(run.baseline)}. Means over "
        f"{all_cells(run)}, {INTERVALS}; Δ: mean difference to the {run.baseline} at equal prompt and seed. Images: "
        f"the first {counted(shown, 'prompt')}. {controls(run)}"
    )


def measure_lines(found: Means, titles: Mapping[str, str]) -> list[str]:
    """Return a caption's lines: every measure of `titles` that there is, with its value for every variant."""
    lines = []
    for measured, title in titles.items():
        rows = [f"  {name}: {value_text(row[measured])}" for name, row in found.items() if measured in row]
        lines += [f"{title}:", *rows] if rows else []
    return lines


def label(name: str) -> str:
    """Return the name of a variant as the figures show it."""
    return name.replace("_", " ")


def _page(worked: Worked, about: About, found: Means, places: Sequence[tuple[str, int]]) -> "Figure":
    """Return images of some scenes, in lines of at most `AT_ONCE` columns, above a panel for every measure."""
    run = worked.run
    first = [("given", "image"), *([("target", "target")] if worked.inputs[0].target else [])]
    columns = [*first, *((name, None) for name in run.variants)]
    lines, panels = -(-len(columns) // AT_ONCE[1]), 0.13 * len(found) + 0.55
    width = min(len(columns), max(AT_ONCE[0], -(-len(columns) // lines)))
    height = PAGE / width * len(places) + 0.3
    drawn = figure(PAGE, height * lines + panels)
    parts = drawn.subfigures(lines + 1, 1, height_ratios=[height] * lines + [panels])
    for line in range(lines):
        grid = parts[line].subplots(len(places), width, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for n, (prompt, seed) in enumerate(places):
            for axes, (name, part) in zip(grid[n], columns[line * width : (line + 1) * width], strict=False):
                if n == 0:
                    axes.set_title(label(name).replace(" ", "\n", 1))
                _show(axes, worked, name, part, (prompt, seed), part != "target" and about.task == "inpaint")
    shown = _with_values(about, found)
    _panels(parts[-1].subplots(1, len(shown), sharey=True, squeeze=False)[0], about, found, shown, worked.tasks)
    return drawn


def _with_values(about: About, found: Means) -> list[str]:
    """Return the measures that are drawn: those of `shown` that have values, or else the others that do."""
    known = [name for name in about.measures if any(name in row for row in found.values())]
    return [name for name in about.shown if name in known] or known


def _column(worked: Worked, about: About, found: Means) -> "Figure":
    """Return the panels of the first two measures."""
    drawn = figure(COLUMN, 0.13 * len(found) + 0.55)
    shown = _with_values(about, found)[:2]
    _panels(drawn.subplots(1, len(shown), sharey=True, squeeze=False)[0], about, found, shown, worked.tasks)
    return drawn


def _show(axes: "Axes", worked: Worked, variant: str, part: str | None, place: tuple[str, int], outlined: bool) -> None:
    """Draw a given image, or that of a variant if it has one, with the border of its mask as a dashed line.

    part: of the inputs; None for the variant's image. place: (prompt, seed).
    """
    given = worked.given(place[0])
    if part is not None:
        image = given.open(part)
    else:
        file = worked.run.image(variant, *place)
        image = read_pixels(file) if file.is_file() else None
    if image is None:
        return
    height, width = image.shape[:2]
    axes.imshow(image, interpolation="nearest", extent=(0, width, height, 0))
    mask = given.open("mask") if outlined else None
    if mask is not None:
        (top, left), (bottom, right) = np.argwhere(mask).min(0), np.argwhere(mask).max(0) + 1
        box = [left, right, right, left, left], [top, top, bottom, bottom, top]
        axes.plot(*box, color="white", lw=0.7)
        axes.plot(*box, color="black", lw=0.7, ls=(0, (2, 2)))
    axes.set(xlim=(0, width), ylim=(height, 0))


def _panels(
    panels: Sequence["Axes"], about: About, found: Means, shown: Sequence[str], tasks: Mapping[str, Any]
) -> None:
    """Draw a panel for each measure: its mean with its interval, a row per variant; those of the task in blue."""
    own = [name for name, task in tasks.items() if task["name"] == about.task]
    order = [*(name for name in found if name not in CONTROLS), *(name for name in CONTROLS if name in found)]
    for axes, measured in zip(panels, shown, strict=True):
        for y, name in enumerate(order):
            if measured not in found[name]:
                continue
            value = found[name][measured]
            colour = OKABE_ITO["blue"] if name in own else "0.45"
            marker = "s" if name in CONTROLS else "o"
            axes.plot([value.get("low", value["mean"]), value.get("high", value["mean"])], [y, y], color=colour)
            axes.plot(value["mean"], y, marker, ms=3, color=colour)
        axes.set_title(about.measures[measured], loc="left")
        axes.grid(axis="x", color="0.9", lw=0.5)
        if measured in about.shares:
            axes.set_xlim(-0.04, 1.04)
    panels[0].set_yticks(range(len(order)), list(map(label, order)))
    panels[0].set_ylim(len(order) - 0.4, -0.6)


def main(about: About, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of a figure. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser(about.name, description)
    parser.add_argument("stores", type=Path, nargs="+", metavar="STORE", help="finished runs; each makes a figure")
    out_argument(parser)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="prompts whose images are shown; default: 3")
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        if options.rows < 1:
            raise UserError(f"--rows {options.rows}: expected at least 1")
        widths = ("column", "page") if options.width == "both" else (options.width,)
        for store in options.stores:
            print(*make(read_store(store), about, options.out, widths, options.rows), sep="\n")

    return guarded(work, "interrupted")
