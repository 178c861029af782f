"""`python -m experiments.roles STORE [--one-step FILE] -o figures`: what an edit does in each block or window of steps.

Takes seconds; needs a finished run folder and no model. One line per edit: PSNR to the baseline (low where the model
depends on what was edited) by block or window, with 95 % intervals and the two controls. With the file of
`python -m fluxlab.roles STORE` also the change of the velocity in one forward, and the rank correlation of the two.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import results
from experiments.sheet import LINES
from experiments.style import COLUMN, OKABE_ITO, PAGE, figure, out_argument, paper, refusing_parser, save, save_caption
from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_run
from fluxlab.measure.summary import CONTROLS
from fluxlab.positions import Program

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS, MARKERS = ("blue", "orange", "purple", "black"), ("o", "s", "D", "^")
DRAWS = 2000


class Role(NamedTuple):
    """A variant's place in the figure. kind: the edit, in words. where: block or window, in words. block: its number,
    None for several blocks and for windows."""

    variant: str
    kind: str
    where: str
    block: int | None


class Correlation(NamedTuple):
    """Spearman's rank correlation of two scores over variants, with a bootstrap interval over cells."""

    value: float
    low: float
    high: float
    cells: int


def make(run: Run, folder: Path, one_step: Path | None = None) -> list[Path]:
    """Draw PSNR by block or window of steps, and the score of one forward next to it."""
    found, scores = roles(run), one_step and read_scores(run, one_step)
    stem, written = folder / f"{results.plain_name(run)}-roles", []
    for width, name in ((COLUMN, "column"), (PAGE, "page")):
        written += save(draw(run, found, scores, width), stem.with_name(f"{stem.name}-{name}"))
    return [*written, save_caption(caption(run, found, scores), stem)]


def roles(run: Run) -> list[Role]:
    """Return the place of every variant. Raises UserError unless variants differ in blocks or steps."""
    found = []
    for variant in run.variants[1:]:
        program = Program.from_config(run.record["variants"][variant]["program"], variant)
        wheres = {json.dumps([edit.where["blocks"], edit.where["steps"]]) for edit in program.edits}
        if len(wheres) != 1:
            raise UserError(f"{run.path}: {variant} has edits in different blocks or steps; expected one place")
        blocks, steps = json.loads(next(iter(wheres)))
        bare = {
            name: {k: v for k, v in edit.items() if k not in ("blocks", "steps")}
            for name, edit in program.to_config().items()
        }
        number = blocks["through"][0] if isinstance(blocks, dict) and len(blocks.get("through", ())) == 1 else None
        found.append(Role(variant, Program.from_config(bare).describe(), where(blocks, steps), number))
    if len({role.where for role in found}) < 2:
        raise UserError(f"{run.path}: its variants act in the same blocks and steps; see python -m experiments.article")
    return found


def where(blocks: Any, steps: Any) -> str:
    """Return blocks and steps as a short label."""
    parts = []
    if isinstance(blocks, dict):
        parts += [
            f"{'' if key == 'through' else key} {numbers_text(numbers)}".strip() for key, numbers in blocks.items()
        ]
    if isinstance(steps, dict):
        ((key, (low, high)),) = steps.items()
        parts.append(f"{'σ ' if key == 'sigma' else ''}{high:g}–{low:g}")
    elif steps != "all":
        parts.append(f"step {numbers_text(steps)}")
    return ", ".join(parts) or "all"


def numbers_text(numbers: Any) -> str:
    return "" if numbers == "all" else ",".join(map(str, numbers))


def read_scores(run: Run, file: Path) -> dict[str, np.ndarray]:
    """Return for each variant its change of the velocity in each cell, in dB, and under "" what it cost and σ.

    Raises UserError for a file of another run.
    """
    try:
        found = json.loads(file.read_text())
        scores = {name: np.array(values, float) for name, values in found["change"].items()}
        places, digest = [tuple(place) for place in found["places"]], found["experiment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--one-step {file}: not a file of python -m fluxlab.roles ({error})") from None
    if digest != run.record["digest"] or places != run.places or set(scores) != set(run.variants[1:]):
        raise UserError(f"--one-step {file}: of experiment {digest}, the run is {run.record['digest']}")
    return scores | {"": np.array([found["evaluations"], found["naive"], found["sigma"]])}


def squared_errors(run: Run, variant: str) -> np.ndarray:
    return np.array([run.cell(variant, *place)["rmse"] ** 2 for place in run.places])


def correlation(run: Run, found: list[Role], scores: dict[str, np.ndarray]) -> Correlation:
    """Return the rank correlation over variants between PSNR, negated, and the change of the velocity."""
    from scipy.stats import spearmanr

    errors = np.array([squared_errors(run, role.variant) for role in found])
    change = np.array([scores[role.variant] for role in found])
    rng, cells = np.random.default_rng(0), errors.shape[1]
    value, *drawn = (
        spearmanr(errors[:, pick].mean(1), change[:, pick].mean(1)).statistic
        for pick in (np.arange(cells), *rng.integers(cells, size=(DRAWS, cells)))
    )
    return Correlation(float(value), *map(float, np.nanquantile(drawn, [0.025, 0.975])), cells)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean with a 95 % bootstrap interval over cells."""
    means = values[np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))].mean(1)
    return float(values.mean()), *map(float, np.quantile(means, [0.025, 0.975]))


def draw(run: Run, found: list[Role], scores: dict[str, np.ndarray] | None, width: float) -> "Figure":
    """Return the figure: PSNR, and with `scores` the change of the velocity."""
    panels, side = (2 if scores else 1), width == PAGE
    kinds = list(dict.fromkeys(role.kind for role in found))
    with paper():
        drawn = figure(width, 2.2 if side else 0.3 + 1.8 * panels)
        axes = drawn.subplots(**{"ncols" if side else "nrows": panels}, squeeze=False).ravel()
        shown = results.effects(run, "psnr")
        lines(axes[0], found, kinds, {role.variant: shown[role.variant] for role in found})
        controls(axes[0], shown)
        axes[0].set_ylabel("PSNR to the\nbaseline (dB)")
        if scores:
            lines(axes[1], found, kinds, {role.variant: interval(scores[role.variant]) for role in found})
            axes[1].set_ylabel(f"change of the velocity\nat σ = {scores[''][2]:g} (dB)")
            rank = correlation(run, found, scores)
            axes[1].set_title(f"rank correlation {rank.value:.2f} [{rank.low:.2f}, {rank.high:.2f}]", loc="left")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2 if side else 1)
        return drawn


def controls(axes: "Axes", shown: dict[str, tuple[float, float, float]]) -> None:
    """Draw the controls. The axis ends where the edits do: the noise floor may lie far above them."""
    least, most = axes.get_ylim()
    for name, (colour, dashes) in LINES.items():
        value = shown.get(name, (math.nan,))[0]
        if math.isfinite(value):
            axes.axhline(value, color=OKABE_ITO[colour], ls=dashes, lw=1, label=f"{name} ({value:.1f} dB)", zorder=1)
            least = min(least, value - 1)
    axes.set_ylim(least, most)


def lines(axes: "Axes", found: list[Role], kinds: list[str], values: dict[str, tuple[float, float, float]]) -> None:
    """Draw each kind of edit with its intervals. Points of single blocks are joined."""
    labels = list(dict.fromkeys(role.where for role in sorted(found, key=lambda r: (r.block is None, r.block or 0))))
    for i, one in enumerate(kinds):
        mine = [role for role in found if role.kind == one]
        style = {"color": OKABE_ITO[COLOURS[i % 4]], "marker": MARKERS[i % 4], "ms": 3, "zorder": 3}
        shift = 0.0 if len(labels) > 20 else (i - (len(kinds) - 1) / 2) * 0.12
        x = {role.variant: labels.index(role.where) + shift for role in mine}
        joined = sorted((role for role in mine if role.block is not None), key=lambda role: role.block)
        if joined:
            axes.plot([x[r.variant] for r in joined], [values[r.variant][0] for r in joined], label=one, **style)
        alone = [role for role in mine if role.block is None]
        if alone:
            label = None if joined else one
            axes.plot([x[r.variant] for r in alone], [values[r.variant][0] for r in alone], lw=0, label=label, **style)
        for role in mine:
            _, low, high = values[role.variant]
            axes.plot([x[role.variant]] * 2, [low, high], color=style["color"], lw=0.9, zorder=2)
    step = max(1, len(labels) // 12)
    long = max(map(len, labels)) > 5
    axes.set_xticks(
        range(0, len(labels), step), labels[::step], rotation=45 if long else 0, ha="right" if long else "center"
    )
    axes.set_xlabel("block" if any(role.block is not None for role in found) else "where the edit acts")


def caption(run: Run, found: list[Role], scores: dict[str, np.ndarray] | None) -> str:
    """Return the caption with all numbers of the figure."""
    text = f"PSNR to the baseline where an edit acts. Over {results.all_cells(run)}; {results.INTERVALS}."
    if scores:
        done, naive, sigma = scores[""]
        rank = correlation(run, found, scores)
        text += (
            f" Change of the velocity of one forward at σ = {sigma:g}, of the baseline's images with noise: 10·log10 "
            f"of its square over that of the velocity, mean over cells; {done:.0f} of {naive:.0f} block evaluations "
            f"({done / naive:.2f}). Rank correlation of the two over {len(found)} variants: {rank.value:.3f} "
            f"[{rank.low:.3f}, {rank.high:.3f}], bootstrap over {rank.cells} cells."
        )
    effects = {(effect.variant, effect.metric): effect for effect in run.effects}
    lines = [f"{results.opening(run)} {text} {results.controls(run)}"]
    lines += [
        f"  {name}: {results.effect_text(effects[name, 'psnr'])}" for name in CONTROLS if (name, "psnr") in effects
    ]
    for role in found:
        line = f"  {role.variant} ({role.kind}, {role.where}): {results.effect_text(effects[role.variant, 'psnr'])}"
        if scores:
            line += f"; one step {results.mean_text(*interval(scores[role.variant]))} dB"
        lines.append(line)
    return "\n".join([*lines, results.conditions(run)])


def main(arguments: list[str]) -> int:
    """Return 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("roles", make.__doc__)
    parser.add_argument("store", type=Path, help="the folder of a finished run")
    parser.add_argument("--one-step", type=Path, metavar="FILE", help="the file of python -m fluxlab.roles STORE")
    out_argument(parser)

    def work() -> None:
        options = parser.parse_args(arguments)
        for file in make(read_run(options.store), options.out, options.one_step):
            print(file)

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
