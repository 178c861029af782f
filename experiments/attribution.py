"""`python -m experiments.attribution FOLDER -o figures`: does the gradient find the parts of the tables that matter?

Takes seconds. FOLDER is that of `python -m fluxlab.attribution +exp=attribution`, which has for bands (block, head,
axis, band of wavelengths) the change of the score when the band no longer adds to the scores of attention: as one
backward predicts it, and as it is measured. Shows the two sizes against each other, and the share of the measured
effect that the first k bands of the prediction have, next to k at random.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments import results
from experiments.style import COLUMN, OKABE_ITO, PAGE, figure, out_argument, paper, refusing_parser, save, save_caption
from fluxlab.compose import guarded
from fluxlab.drawing.legend import legend_below
from fluxlab.learning import Attribution, read_attribution
from fluxlab.select.arguments import EVERY_AXIS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = dict(zip(EVERY_AXIS, (("black", "o"), ("blue", "s"), ("vermillion", "D"), ("green", "^")), strict=True))
"""Colour and marker of each axis. FLUX.1 has the first three."""

TOPS, DRAWS = (5, 10, 20), 2000

Rows = Mapping[str, Sequence[float]]


def make(found: Attribution, folder: Path) -> list[Path]:
    """Draw the prediction against the measurement, in both widths, with a caption."""
    stem, written = folder / results.plain_name(found), []
    rows = summary(*sizes(found))
    for width, name in ((COLUMN, "column"), (PAGE, "page")):
        written += save(draw(found, rows, width), stem.with_name(f"{stem.name}-{name}"))
    return [*written, save_caption(caption(found, rows), stem)]


def sizes(found: Attribution) -> tuple[np.ndarray, np.ndarray]:
    """Return the size of the predicted and of the measured change, each `(images, bands)`."""
    predicted, measured = (np.abs(found.values(name)) for name in ("predicted", "measured"))
    return predicted, measured


def captured(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return the share of the measured effect that the first k bands of the prediction have, `(images, bands)`."""
    order = np.argsort(-predicted, axis=1)
    return np.take_along_axis(measured, order, 1).cumsum(1) / measured.sum(1, keepdims=True)


def summary(predicted: np.ndarray, measured: np.ndarray) -> Rows:
    """Return mean, low and high of the rank correlation over bands, and of the share that the first k bands have."""
    from scipy.stats import spearmanr

    ranks = [spearmanr(p, m).statistic for p, m in zip(predicted, measured, strict=True)]
    shares = captured(predicted, measured)
    tops = {f"first {k}": shares[:, k - 1] for k in TOPS if k < shares.shape[1]}
    return {name: ends(np.array(values)) for name, values in {"rank correlation": ranks, **tops}.items()}


def ends(values: np.ndarray) -> list[float]:
    """Return the mean over images with a 95 % bootstrap interval. values: `(images,)`."""
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return [float(values.mean()), *map(float, np.quantile(values[drawn].mean(1), [0.025, 0.975]))]


def draw(found: Attribution, rows: Rows, width: float) -> "Figure":
    """Return the figure: predicted against measured sizes, one point per band, and the share of the first k."""
    side = width == PAGE
    predicted, measured = sizes(found)
    with paper():
        drawn = figure(width, 2.5 if side else 4.5)
        points, curve = drawn.subplots(**{"ncols" if side else "nrows": 2})
        show_bands(points, predicted.mean(0), measured.mean(0), found.array("predicted").coords["axis"][1])
        mean, low, high = rows["rank correlation"]
        points.set_title(f"rank correlation {mean:.2f} [{low:.2f}, {high:.2f}]", loc="left")
        points.legend(title="axis")
        show_shares(curve, captured(predicted, measured))
        lines = legend_below(drawn, *curve.get_legend_handles_labels(), columns=2)
        drawn.set_figheight(drawn.get_figheight() + 0.13 * lines)
        return drawn


def show_bands(axes: "Axes", predicted: np.ndarray, measured: np.ndarray, axis: Sequence[str]) -> None:
    """Draw a point for each band. The dashed line has equal sizes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = np.array(axis)
    for name, (colour, marker) in STYLES.items():
        if name in axis:
            at = axis == name
            axes.plot(predicted[at], measured[at], lw=0, ms=3, marker=marker, color=OKABE_ITO[colour], label=name)
    positive = measured[measured > 0]
    if len(positive):
        axes.axline([float(np.median(positive))] * 2, slope=1, color="0.7", lw=0.8, ls=(0, (4, 2)), zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="|change of the score|, by one backward", ylabel="by ablation")
    shown = FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+00", ""))
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 3)))
        scale.set_minor_formatter(NullFormatter())
        scale.set_major_formatter(shown)


def show_shares(axes: "Axes", shares: np.ndarray) -> None:
    """Draw the share of the measured effect that the first k bands have, mean and 95 % interval over images."""
    ks = np.arange(1, shares.shape[1] + 1)
    mean, low, high = np.transpose([ends(column) for column in shares.T])
    axes.fill_between(ks, low, high, color=OKABE_ITO["blue"], alpha=0.25, lw=0)
    axes.plot(ks, mean, color=OKABE_ITO["blue"], label="first k by one backward")
    axes.plot(ks, ks / len(ks), color=OKABE_ITO["black"], lw=1, ls=(0, (4, 2)), label="k at random")
    axes.set(xlabel="bands, k", ylabel="share of the measured effect", ylim=(0, 1.02), xlim=(0, len(ks)))


def caption(found: Attribution, rows: Rows) -> str:
    """Return the caption with the numbers of the figure."""
    predicted = found.array("predicted")
    images, bands = found.values("measured").shape
    request, labels = found.record["request"], predicted.coords
    lines = [
        f"{results.opening(found)} Change of the score ({found.objective}) when a band of one axis in one head no "
        f"longer adds to the scores of attention, predicted by one backward and measured; {bands} bands, "
        f"{results.counted(len(request['prompts']), 'prompt')} × {results.counted(len(request['seeds']), 'seed')}. "
        "Points are means of sizes over images; dashed: equal sizes, and k bands at random. Shares are those of the "
        f"sum over these bands. 95 % intervals (bootstrap over {images} images).",
        *(f"  {name}: {results.mean_text(*values)}" for name, values in rows.items() if name == "rank correlation"),
    ]
    for name, values in rows.items():
        if name.startswith("first "):
            k = int(name.removeprefix("first "))
            lines.append(f"  share of the {name} bands: {results.mean_text(*values)}; {k} at random: {k / bands:.3g}")
    means = np.abs(found.values("measured")).mean(0)
    lines.append("Largest by ablation:")
    for n in np.argsort(-means, kind="stable")[:5]:
        block, head, axis, wavelength = (labels[key][1][n] for key in ("block", "head", "axis", "wavelength"))
        lines.append(f"  block {block} head {head} {axis}, wavelengths {wavelength}: {results.number(means[n])}")
    return "\n".join([*lines, results.conditions(found)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = refusing_parser("attribution", make.__doc__)
    parser.add_argument("folder", type=Path, help="of python -m fluxlab.attribution +exp=attribution")
    out_argument(parser)

    def work() -> None:
        options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        print(*make(read_attribution(options.folder), options.out), sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
