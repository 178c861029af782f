"""`python -m experiments.response STORE [STORE …] -o figures`: one metric of several edits over their amounts.

Takes seconds; needs finished run folders of one model and prompts, and no weights. One panel for each kind of edit in
which variants differ by one number: the metric with its 95 % interval, and the RoPE similarity of neighbours, the mean
cosine of the angles between an image token's rotation and those of the tokens to its right and below it.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments import results
from experiments.dose import flatten
from experiments.sheet import LINES
from experiments.style import COLUMN, OKABE_ITO, PAGE, figure, out_argument, paper, refusing_parser, save, save_caption
from fluxlab.compose import guarded
from fluxlab.drawing.legend import legend_below
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_run
from fluxlab.measure.summary import CONTROLS
from fluxlab.positions import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Dose(NamedTuple):
    """A variant of one kind of edit: its amount, and the RoPE similarity of neighbours."""

    amount: float
    variant: str
    run: Run
    similarity: float


UNITS = {
    "factor": "factor",
    "by": "tokens",
    "degrees": "degrees",
    "std": "std, tokens",
    "to": "step, tokens",
    "value": "tokens",
}
"""The arguments that are amounts, with what they count."""

Families = dict[str, list[Dose]]
"""The kinds of edit, in words, each with its variants in the order of their amounts."""


def make(runs: Sequence[Run], folder: Path, metric: str) -> list[Path]:
    """Draw one metric of every kind of edit over its amount, with the RoPE similarity of neighbours."""
    families = read_families(runs)
    stem, written = folder / "-".join([*dict.fromkeys(map(results.plain_name, runs)), "response"]), []
    for width, name in ((COLUMN, "column"), (PAGE, "page")):
        written += save(draw(runs, families, metric, width), stem.with_name(f"{stem.name}-{name}"))
    return [*written, save_caption(caption(runs, families, metric), stem)]


def read_families(runs: Sequence[Run]) -> Families:
    """Return the variants of all runs by kind. Variants without an amount, or alone in their kind, are left out.

    Raises UserError if none is left, and for runs of different models or sizes.
    """
    keys = ("model_digest", "height", "width", "steps")
    if len({tuple(run.record["settings"][key] for key in keys) for run in runs}) > 1:
        raise UserError(f"{runs[0].path} and others: runs of different models, sizes or steps cannot share a figure")
    sizes, families = axes_of(runs[0]), {}
    for run in runs:
        for variant in run.variants[1:]:
            program = Program.from_config(run.record["variants"][variant]["program"], variant)
            found = amount_of(program)
            if found is not None:
                families.setdefault(found[0], []).append(Dose(found[1], variant, run, similarity(program, run, *sizes)))
    families = {name: sorted(doses, key=lambda dose: dose.amount) for name, doses in families.items() if len(doses) > 1}
    if not families:
        raise UserError(f"{runs[0].path}: no two variants have one edit in different amounts")
    return families


def amount_of(program: Program) -> tuple[str, float] | None:
    """Return the kind of a program of one edit with one number, in words, and the number."""
    flat = {key: value for key, value in flatten(program).items() if len(program.edits) == 1}
    numbers = {
        key: value
        for key, value in flat.items()
        if key[1] in UNITS and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(numbers) != 1:
        return None
    ((key, value),) = numbers.items()
    empty = flat.get((*key, "axes"), ())
    axes = [axis for axis, none in zip(("index", "row", "col"), empty, strict=False) if not none]
    name = " ".join([program.edits[0].op, *([", ".join(axes)] if 0 < len(axes) < 3 else [])])
    return f"{name} ({UNITS[key[1]]})", float(value)


def axes_of(run: Run) -> tuple[Sequence[int], float]:
    """Return the widths of the axes and the base of the frequencies of a run's model, without its weights."""
    from fluxlab.checkpoints.stored import published, stored
    from fluxlab.config import ModelRow

    row = run.record["request"]["model"]
    known = {key: row[key] for key in ("name", "path", "variant") if row.get(key) is not None}
    params = (stored(ModelRow(**known)) or published(ModelRow(**known)))["transformer"].params
    return params.axes_dim, params.theta


def similarity(program: Program, run: Run, axes_dim: Sequence[int], theta: float) -> float:
    """Return the mean cosine between the rotations of image tokens and of those to the right and below, on the axes of
    rows and columns; 1 for equal positions."""
    from fluxlab.positions import tables

    side = run.record["settings"]["pixels_per_token"]
    rows, cols = (run.record["settings"][key] // side for key in ("height", "width"))
    cos, sin = (
        part.double().reshape(rows, cols, -1)[..., axes_dim[0] // 2 :]
        for part in tables(program, rows, cols, 0, axes_dim, theta, (rows, cols))
    )
    right = cos[:, 1:] * cos[:, :-1] + sin[:, 1:] * sin[:, :-1]
    below = cos[1:] * cos[:-1] + sin[1:] * sin[:-1]
    return float((right.mean() + below.mean()) / 2)


def draw(runs: Sequence[Run], families: Families, metric: str, width: float) -> "Figure":
    """Return the figure: a panel per kind of edit, the metric in blue and the similarity in orange."""
    across = 3 if width == PAGE else 2
    down = math.ceil(len(families) / across)
    shown = {run.path: results.effects(run, metric) for run in runs}
    with paper():
        drawn = figure(width, 0.3 + 1.4 * down)
        panels = drawn.subplots(down, across, sharey=True, squeeze=False).ravel()
        for axes, (name, doses) in zip(panels, families.items(), strict=False):
            x = [dose.amount for dose in doses]
            mean, low, high = zip(*(shown[dose.run.path][dose.variant] for dose in doses), strict=True)
            axes.fill_between(x, low, high, color=OKABE_ITO["blue"], alpha=0.25, lw=0)
            style = {"marker": "o", "ms": 2.5}
            axes.plot(x, mean, color=OKABE_ITO["blue"], label=results.title(metric), **style)
            axes.plot(
                x,
                [dose.similarity for dose in doses],
                color=OKABE_ITO["orange"],
                label="RoPE similarity of neighbours",
                **{**style, "marker": "s"},
            )
            for control, (colour, dashes) in LINES.items():
                value = shown[doses[0].run.path].get(control, (math.nan,))[0]
                if math.isfinite(value):
                    axes.axhline(value, color=OKABE_ITO[colour], ls=dashes, lw=1, label=control, zorder=1)
            if min(x) > 0 and max(x) >= 16 * min(x):
                axes.set_xscale("log", base=2)
                axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.set_title(name, loc="left")
        for axes in panels[len(families) :]:
            axes.remove()
        lines = legend_below(drawn, *panels[0].get_legend_handles_labels(), columns=4)
        drawn.set_figheight(drawn.get_figheight() + 0.13 * lines)
        return drawn


def caption(runs: Sequence[Run], families: Families, metric: str) -> str:
    """Return the caption with all numbers, and where each kind of edit first falls to the level of another seed."""
    lines = [
        f"{' '.join(map(results.opening, runs))} {results.title(metric)} and RoPE similarity of neighbouring image "
        f"tokens over the amount of each edit. Means over {', '.join(dict.fromkeys(map(results.all_cells, runs)))}; "
        f"{results.INTERVALS}. {results.controls(runs[0])}"
    ]
    for run in runs:
        found = {effect.variant: effect for effect in run.effects if effect.metric == metric}
        lines += [f"  {results.plain_name(run)}, {c}: {results.effect_text(found[c])}" for c in CONTROLS if c in found]
        for name, doses in families.items():
            for dose in (dose for dose in doses if dose.run is run):
                text = results.effect_text(found[dose.variant])
                lines.append(f"  {name} {dose.amount:g}: {text}; similarity {dose.similarity:.3f}")
    value, cells = correlation(runs, families, metric)
    lines.append(
        f"Rank correlation of {results.title(metric)} with the similarity, over {cells} variants of all kinds: "
        f"{value:.2f}."
    )
    return "\n".join([*lines, *map(results.conditions, runs)])


def correlation(runs: Sequence[Run], families: Families, metric: str) -> tuple[float, int]:
    """Return Spearman's rank correlation of a metric and the similarity over all variants, and their number."""
    from scipy.stats import spearmanr

    shown = {run.path: results.effects(run, metric) for run in runs}
    doses = [dose for family in families.values() for dose in family]
    pairs = [(shown[dose.run.path][dose.variant][0], round(dose.similarity, 9)) for dose in doses]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def main(arguments: list[str]) -> int:
    """Return 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("response", make.__doc__)
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="folders of finished runs")
    parser.add_argument("--metric", default="ssim", help="a column of metrics.csv; default: ssim")
    out_argument(parser)

    def work() -> None:
        options = parser.parse_args(arguments)
        runs = [read_run(store) for store in options.stores]
        for run in runs:
            results.pick_metrics(run, [options.metric], 1)
        for file in make(runs, options.out, options.metric):
            print(file)

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
