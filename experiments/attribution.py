"""`python -m experiments.attribution -o figures`: does the gradient find the parts of the rotary tables that matter?

About 9 min on 2 CPU cores with model=tiny. For every (block, head, axis, band of wavelengths), the change of the
denoising loss when the band no longer contributes (exhaustive ablation) is compared with what one backward predicts.
Prints and writes the rank correlation over bands with its interval, and the effect of the top k bands against k random
ones. Each (prompt, seed) is an image of the model itself, and an own sample of the intervals.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import fluxlab
from experiments.style import COLUMN, OKABE_ITO, figure, paper, save, save_caption
from fluxlab.attribution import of_gains, with_gains
from fluxlab.compose import guarded
from fluxlab.gradients import denoising
from fluxlab.sampling import Sampling

PROMPTS = (
    "a red fox on the left holding a sign that says open",
    "a blue circle at the bottom holding a sign that says rain",
    "a yellow heart at the top holding a sign that says taxi",
    "an orange cat on the right holding a sign that says hello",
)
BANDS = {"short": (0, 8), "middle": (8, 32), "long": (32, float("inf"))}
"""Wavelengths in tokens, [low, high)."""


def bands(found: fluxlab.probes.Captured) -> list[tuple[int, int, str, str, np.ndarray]]:
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


def measure(model: str, seeds: Sequence[int], steps: int, prompts: Sequence[str] = PROMPTS) -> dict[str, np.ndarray]:
    """Return the predicted and the measured change of the loss, each `(images, bands)`, and the names of the bands."""
    pipe = fluxlab.load_pipeline(model, dtype=torch.float32)
    settings, predicted, measured, names = Sampling(steps=steps), [], [], []
    for prompt in prompts:
        for seed in seeds:
            x = pipe.sample([prompt], [seed], None, Sampling(), output="latent").clone()
            given = {"settings": settings}
            found = of_gains(pipe, [prompt], [seed], denoising(x), **given)
            every = bands(found)
            names = [f"block {block} head {head} {axis} {band}" for block, head, axis, band, _ in every]
            derivative = found.values.sum(0)  # over steps
            predicted.append([derivative[block, head, pairs].sum() for block, head, _, _, pairs in every])
            gains = [torch.ones(1, *derivative.shape)]
            for block, head, _, _, pairs in every:
                gain = torch.ones(1, *derivative.shape)
                gain[0, block, head, pairs] = 0
                gains.append(gain)
            scores = with_gains(pipe, [prompt], [seed], denoising(x), gains, **given)[:, 0].numpy()
            measured.append(scores[0] - scores[1:])  # loss of the ablation less that of the model
    return {"predicted": np.array(predicted), "measured": np.array(measured), "names": np.array(names)}


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
    for k in tops:
        total = measured.sum(1)
        order = np.argsort(-predicted, axis=1)[:, :k]
        rows[f"top {k}"] = np.take_along_axis(measured, order, 1).sum(1) / total
        rows[f"random {k}"] = np.full(images, k / count)
    resampled = rng.integers(images, size=(draws, images))
    return {
        name: [values.mean(), *np.quantile(values[resampled].mean(1), [0.025, 0.975])] for name, values in rows.items()
    }


def draw(found: dict[str, np.ndarray], rows: dict[str, list]):
    """Return the figure: predicted against measured change of the loss, one point per band, mean over images."""
    predicted, measured = np.abs(found["predicted"]).mean(0), np.abs(found["measured"]).mean(0)
    axis = np.array([name.split()[4] for name in found["names"]])
    with paper():
        drawn = figure(COLUMN, 2.6)
        axes = drawn.subplots()
        for name, colour, marker in (("index", "black", "o"), ("row", "blue", "s"), ("col", "vermillion", "D")):
            shown = axis == name
            axes.plot(predicted[shown], measured[shown], lw=0, ms=3, marker=marker, color=OKABE_ITO[colour], label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("change of the loss by one backward")
        axes.set_ylabel("by ablation")
        mean, low, high = rows["rank correlation"]
        axes.set_title(f"rank correlation {mean:.2f} [{low:.2f}, {high:.2f}]", loc="left")
        axes.legend(frameon=False, title="axis")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m experiments.attribution", allow_abbrev=False)
    parser.add_argument("-o", "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="images per prompt; default: 4")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="noise levels of the loss; default: 4")
    options = parser.parse_args(arguments)

    def work() -> None:
        found = measure(options.model, range(options.seeds), options.steps)
        rows = summary(found)
        lines = [f"{name}: {mean:.3f} [{low:.3f}, {high:.3f}]" for name, (mean, low, high) in rows.items()]
        largest = np.argsort(-np.abs(found["measured"]).mean(0))[:5]
        lines += ["largest by ablation: " + "; ".join(found["names"][largest])]
        text = (
            f"Change of the denoising loss of model {options.model} when a band of one axis in one head no longer adds "
            f"to the scores, predicted by one backward and measured by ablation; {len(PROMPTS)} prompts × "
            f"{options.seeds} seeds, {options.steps} noise levels; 95 % bootstrap intervals over images. Shares are "
            "those of the sum over all bands."
        )
        stem = options.out / "attribution"
        print(*save(draw(found, rows), stem), save_caption("\n".join([text, *lines]), stem), *lines, sep="\n")

    return guarded(work, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
