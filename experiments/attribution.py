"""`python -m experiments.attribution -o figures`: does the gradient find the parts of the rotary tables that matter?

About 9 min on 2 CPU cores with model=tiny. For every (block, head, axis, band of wavelengths), the change of the
denoising loss when the band no longer contributes (exhaustive ablation) is compared with what one backward predicts.
Prints and writes the rank correlation over bands with its interval, and the effect of the top k bands against k random
ones. Each (prompt, seed) is an image of the model itself, and an own sample of the intervals.

The embedded models have fewer than 200 bands. Of FLUX.1's ten thousand, 200 at random are measured, or `--bands N`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.standalone import Loaded, run_alone
from experiments.style import COLUMN, OKABE_ITO, figure, paper, save, save_caption
from fluxlab.attribution import of_gains, with_gains
from fluxlab.gradients import denoising
from fluxlab.sampling import Sampling
from fluxlab.select.arguments import EVERY_AXIS

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from matplotlib.figure import Figure

    from fluxlab.probes import Captured

PROMPTS = (
    "a red fox on the left holding a sign that says open",
    "a blue circle at the bottom holding a sign that says rain",
    "a yellow heart at the top holding a sign that says taxi",
    "an orange cat on the right holding a sign that says hello",
)
BANDS = {"short": (0, 8), "middle": (8, 32), "long": (32, float("inf"))}
"""Wavelengths in tokens, [low, high)."""

STYLES = dict(zip(EVERY_AXIS, (("black", "o"), ("blue", "s"), ("vermillion", "D"), ("green", "^")), strict=True))
"""Colour and marker of each axis. FLUX.1 has the first three."""


Band = tuple[int, int, str, str, np.ndarray]


def bands(found: "Captured") -> list[Band]:
    """Return (block, head, axis, band, pairs) of every band that has a pair."""
    axis, wavelength = (np.array(found.coords[name][1]) for name in ("axis", "wavelength"))
    every = []
    for block in found.labels("block"):
        for head in found.labels("head"):
            for name in dict.fromkeys(axis):
                for band, (low, high) in BANDS.items():
                    pairs = np.flatnonzero((axis == name) & (wavelength >= low) & (wavelength < high))
                    every += [(block, head, name, band, pairs)] if len(pairs) else []
    return every


def measure(
    pipe: Any, seeds: Sequence[int], steps: int, most: int, prompts: Sequence[str] = PROMPTS
) -> dict[str, np.ndarray]:
    """Return the predicted and the measured change of the loss, each `(images, bands)`, and the names of the bands.

    most: of more bands, so many at random, the same for all images.
    """
    settings, predicted, measured, names = Sampling(steps=steps), [], [], []
    for prompt in prompts:
        for seed in seeds:
            x = pipe.sample([prompt], [seed], None, Sampling(), output="latent").clone()
            given = {"settings": settings}
            found = of_gains(pipe, [prompt], [seed], denoising(x), **given)
            every = chosen(bands(found), most)
            names = [f"block {block} head {head} {axis} {band}" for block, head, axis, band, _ in every]
            derivative = found.values.sum(0)  # over steps
            predicted.append([derivative[block, head, pairs].sum() for block, head, _, _, pairs in every])
            gains = [torch.ones(1, *derivative.shape)]
            for block, head, _, _, pairs in every:
                gain = torch.ones(1, *derivative.shape)
                gain[0, block, head, pairs] = 0
                gains.append(gain)
            scores = with_gains(pipe, [prompt], [seed], denoising(x), gains, **given)[:, 0].float().cpu().numpy()
            measured.append(scores[0] - scores[1:])  # loss of the ablation less that of the model
    return {"predicted": np.array(predicted), "measured": np.array(measured), "names": np.array(names)}


def chosen(every: Sequence[Band], most: int) -> Sequence[Band]:
    """Return the bands, or `most` of them at random in their order. The same number gives the same bands."""
    if most >= len(every):
        return every
    return [every[n] for n in np.sort(np.random.default_rng(0).choice(len(every), most, replace=False))]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def summary(found: dict[str, np.ndarray], tops: Sequence[int] = (5, 10, 20), draws: int = 2000) -> dict[str, list]:
    """Return means with 95 % bootstrap intervals over images: the rank correlation, and the effect of top k bands.

    Both compare |predicted| with |measured|. `top k` is the share of all bands' measured effect; `random k` is k of
    them at random.
    """
    predicted, measured = np.abs(found["predicted"]), np.abs(found["measured"])
    rng = np.random.default_rng(0)
    images, count = predicted.shape
    rows = {"rank correlation": np.array([rank_correlation(p, m) for p, m in zip(predicted, measured, strict=True)])}
    for k in [k for k in tops if k < count]:
        total = measured.sum(1)
        order = np.argsort(-predicted, axis=1)[:, :k]
        rows[f"top {k}"] = np.take_along_axis(measured, order, 1).sum(1) / total
        rows[f"random {k}"] = np.full(images, k / count)
    resampled = rng.integers(images, size=(draws, images))
    return {
        name: [values.mean(), *np.quantile(values[resampled].mean(1), [0.025, 0.975])] for name, values in rows.items()
    }


def draw(found: dict[str, np.ndarray], rows: dict[str, list]) -> "Figure":
    """Return the figure: predicted against measured size of the change, one point per band, mean over images."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    predicted, measured = np.abs(found["predicted"]).mean(0), np.abs(found["measured"]).mean(0)
    axis = np.array([name.split()[4] for name in found["names"]])
    with paper():
        drawn = figure(COLUMN, 2.6)
        axes = drawn.subplots()
        for name, (colour, marker) in STYLES.items():
            if name not in axis:
                continue
            shown = axis == name
            axes.plot(predicted[shown], measured[shown], lw=0, ms=3, marker=marker, color=OKABE_ITO[colour], label=name)
        axes.axline([float(np.median(measured))] * 2, slope=1, color="0.7", lw=0.8, ls=(0, (4, 2)), zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="|change of the loss|, by one backward", ylabel="by ablation")
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 3)))
            side.set_minor_formatter(NullFormatter())
            side.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+00", ""))
            )
        mean, low, high = rows["rank correlation"]
        axes.set_title(f"rank correlation {mean:.2f} [{low:.2f}, {high:.2f}]", loc="left")
        axes.legend(frameon=False, title="axis")
    return drawn


def make(loaded: Loaded, options: "Namespace") -> "list[Path | str]":
    """Measure, write the figure and its caption, and return the files and the numbers."""
    found = measure(loaded.pipe, range(options.seeds), loaded.steps, options.bands)
    rows = summary(found)
    lines = [f"{name}: {mean:.3f} [{low:.3f}, {high:.3f}]" for name, (mean, low, high) in rows.items()]
    largest = np.argsort(-np.abs(found["measured"]).mean(0))[:5]
    lines += ["largest by ablation: " + "; ".join(found["names"][largest])]
    text = (
        "Change of the denoising loss when a band of one axis in one head no longer adds to the scores, predicted by "
        f"one backward and measured by ablation; {len(found['names'])} bands, {len(PROMPTS)} prompts × {options.seeds} "
        f"seeds, {loaded.steps} noise levels; 95 % bootstrap intervals over images. Shares are those of the sum over "
        "these bands."
    )
    stem = options.out / "attribution"
    files = [*save(draw(found, rows), stem), save_caption("\n".join([text, *lines, loaded.conditions]), stem)]
    return [*files, *lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    counts = {"seeds": (4, "images per prompt"), "bands": (200, "bands that are measured at most, at random")}
    return run_alone("attribution", __doc__, arguments, counts, 4, make)


if __name__ == "__main__":
    sys.exit(main())
