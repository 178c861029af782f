"""The numbers of `experiments.atlas`: the part of the rotary tables on which the place of the thing depends."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.images import read_pixels
from fluxlab.learning import Attribution
from fluxlab.learning.bands import BANDS
from fluxlab.learning.place import SIDES, side_of, towards
from fluxlab.learning.ranking import sizes, variants
from fluxlab.measure.summary import CONTROLS, summarise
from fluxlab.positions import Program

OBJECTIVES = ("place", "denoising")
ORDERS = (*OBJECTIVES, "random")
"""How the ablated sites are chosen: by the place, by the denoising loss, or at random."""

METRICS = {"place": "place", "found": "object", "moved": "thing_moved"}
"""What the oracle reads: the thing is where the prompt says, a thing is found, it moved by so many pixels. Values are
columns of metrics.csv."""

ALL = "all sites"
"""What the numbers call the baseline."""

Row = dict[str, Any]


def read(place: Attribution, denoising: Attribution) -> dict[str, Any]:
    """Return the derivatives of both objectives, `(images, steps, blocks, heads, pairs)`, axis and wavelength of pairs.

    Raises UserError for attributions of other objectives.
    """
    for one, wanted in zip((place, denoising), OBJECTIVES, strict=True):
        if one.objective != wanted:
            raise UserError(f"{one.path}: of objective={one.objective}, expected objective={wanted}")
    coords = place.array("gains").coords
    found: dict[str, Any] = {one.objective: one.values("gains") for one in (place, denoising)}
    return found | {key: list(coords[key][1]) for key in ("axis", "wavelength")}


def choices(run: Run, found: Sequence[Attribution]) -> dict[str, tuple[str, int]]:
    """Return the order and the number of sites of every variant of an ablation.

    Raises UserError unless the run has the variants that `fluxlab.ablation` writes for these attributions.
    """
    every = {name: re.fullmatch(rf"({'|'.join(ORDERS)})_(\d+)(?:_\d+)?", name) for name in run.variants[1:]}
    wrong = [name for name, match in every.items() if not match]
    kinds = {name: (match[1], int(match[2])) for name, match in every.items() if match}
    if not wrong and kinds:
        counts = sorted({k for _, k in kinds.values()})
        sets = max((int(name.split("_")[2]) for name, (kind, _) in kinds.items() if kind == "random"), default=0)
        expected = {
            name: Program.from_config(config, name).digest for name, config in variants(found, counts, sets).items()
        }
        known = {name: entry["digest"] for name, entry in run.record["variants"].items()}
        wrong = [name for name in {**expected, **known} if expected.get(name) != known.get(name)]
    digests = {one.record["settings"]["model_digest"] for one in found} | {run.record["settings"]["model_digest"]}
    if wrong or not kinds or len(digests) > 1:
        reason = f"its variant {wrong[0]} is not theirs" if wrong else "of another model"
        raise UserError(
            f"{run.path}: not the ablation of {' and '.join(str(one.path) for one in found)}, {reason}; run the "
            "experiment that python -m fluxlab.ablation writes for them"
        )
    return kinds


def numbers(place: Attribution, denoising: Attribution, run: Run) -> Row:
    """Return what the figure shows, as plain values. Raises UserError for folders that do not belong together."""
    found, kinds = read(place, denoising), choices(run, (place, denoising))
    if not any(math.isfinite(row.get("thing_row", math.nan)) for row in run.metrics):
        raise UserError(f"{run.path}: the scene oracle found no thing; the figure needs a model of scenes")
    return {
        "images": len(found["place"]),
        "shares": shares(found),
        "ablation": outcomes(run, kinds),
        "agreement": dict(zip(("correlation", "n"), agreement(run), strict=True)),
        "first": sorted(table_rows(found), key=lambda row: -row["place"])[:10],
    }


def outcomes(run: Run, kinds: Mapping[str, tuple[str, int]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the oracle reads: variant → metric → n, mean, low and high over images.

    Variants are `ALL`, the controls, and an order with its number of sites, such as `place 8`. Of sites at random, an
    image counts with its mean over the choices, and `sets` has the smallest and the largest mean of one choice.
    `place 8` and `denoising 8` also have the paired difference to `random 8`.
    """
    rows, found = pooled(run, kinds), {}
    for row in summarise(rows, ALL, list(METRICS)):
        ends = {key: row[key] for key in ("n", "mean", "low", "high")}
        found.setdefault(row["variant"], {})[row["metric"]] = ends
    for name in [name for name in found if name.startswith("random ")]:
        k = int(name.split()[1])
        for row in summarise([row for row in rows if row["variant"].endswith(f" {k}")], name, list(METRICS)):
            if row["variant"] != name:
                ends = {"n": row["paired_n"]} | {key: row[f"paired_{key}"] for key in ("mean", "low", "high")}
                found[row["variant"]][f"{row['metric']} - random"] = ends
        of_sets = [variant for variant, kind in kinds.items() if kind == ("random", k)]
        for metric, column in METRICS.items():
            means = [effect.value for effect in run.effects if effect.metric == column and effect.variant in of_sets]
            found[name][metric]["sets"] = [min(means), max(means)]
    names = {column: metric for metric, column in METRICS.items()}
    for effect in run.effects:
        if effect.variant in CONTROLS and effect.metric in names:
            ends = {"n": effect.n, "mean": effect.value, "low": effect.low, "high": effect.high}
            found.setdefault(effect.variant, {})[names[effect.metric]] = ends
    return found


def pooled(run: Run, kinds: Mapping[str, tuple[str, int]]) -> list[Row]:
    """Return a row for each image and choice of sites, with the mean of each metric over choices at random."""
    names = {run.baseline: ALL} | {variant: f"{order} {k}" for variant, (order, k) in kinds.items()}
    grouped: dict[tuple, list] = {}
    for row in run.metrics:
        key = names[row["variant"]], row["prompt"], row["seed"]
        grouped.setdefault(key, []).append([row[column] for column in METRICS.values()])
    rows = []
    for (variant, prompt, seed), values in grouped.items():
        table = np.array(values, float)
        known = np.isfinite(table)
        means = np.where(known, table, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)
        read = dict(zip(METRICS, map(float, means), strict=True))
        rows.append({"variant": variant, "prompt": prompt, "seed": seed, **read})
    return rows


def agreement(run: Run) -> tuple[float, int]:
    """Return the correlation of two movements towards the named side, and the number of images: the thing's by the
    oracle, and that of the centre of mass of the pixels. Images are those of all variants that have a thing.
    """
    pairs = []
    for prompt, seed in run.places:
        axis, sign = SIDES[side_of(prompt)]
        before = content(run, run.baseline, prompt, seed)
        for variant in run.variants[1:]:
            moved = run.cell(variant, prompt, seed)[f"thing_moved_{axis}"]
            if math.isfinite(moved):
                pairs.append((content(run, variant, prompt, seed) - before, sign * moved))
    if len(pairs) < 3 or np.ptp(pairs, 0).min() == 0:
        return math.nan, len(pairs)
    return float(np.corrcoef(np.transpose(pairs))[0, 1]), len(pairs)


def content(run: Run, variant: str, prompt: str, seed: int) -> float:
    """Return how far the content of an image lies towards the side of its prompt, in tokens, by its pixels."""
    pixels = torch.tensor(read_pixels(run.image(variant, prompt, seed)), dtype=torch.float64)
    side = run.record["settings"]["pixels_per_token"]
    rows, cols = (n // side for n in pixels.shape[:2])
    tokens = pixels.reshape(rows, side, cols, side, 3).transpose(1, 2).reshape(1, rows * cols, -1)
    return float(towards(tokens, (rows, cols), [side_of(prompt)]))


def shares(found: Mapping[str, Any], name: str = "place") -> dict[str, dict[str, float]]:
    """Return which share of the sum of sizes each block, step, axis and band of wavelengths has, with intervals.

    Bootstrap over images, 95 %. sites: the share of the sites that it has. Sizes of steps are |derivatives| of single
    steps; others are of their sum over steps.
    """
    single, summed = np.abs(found[name]), np.abs(found[name].sum(1))
    axis, waves = np.array(found["axis"]), np.array(found["wavelength"])
    blocks, _, pairs = summed.shape[1:]
    parts = {f"block {n}": (summed[:, n].sum((1, 2)), 1 / blocks) for n in range(blocks)}
    chosen = {f"axis {key}": axis == key for key in dict.fromkeys(axis)}
    chosen |= {f"wavelength {band}": (waves >= low) & (waves < high) for band, (low, high) in BANDS.items()}
    parts |= {key: (summed[..., some].sum((1, 2, 3)), some.sum() / pairs) for key, some in chosen.items()}
    total, rng = summed.sum((1, 2, 3)), np.random.default_rng(0)
    drawn = rng.integers(len(total), size=(2000, len(total)))
    rows = {
        key: {"n": len(total), **_moments(value / total, drawn), "sites": float(sites)}
        for key, (value, sites) in parts.items()
    }
    of_steps = single.sum((2, 3, 4))
    for n in range(of_steps.shape[1]):
        rows[f"step {n}"] = {"n": len(total), **_moments(of_steps[:, n] / of_steps.sum(1), drawn)}
    return rows


def _moments(values: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def table_rows(found: Mapping[str, Any]) -> list[Row]:
    """Return a row per site (block, head, pair): its axis, wavelength, and size for the place and the denoising loss.

    Sizes are means of `ranking.sizes`. low, high: 95 % over images, mean ± 1.96 standard errors. signed: the mean
    derivative of the place in tokens, positive where the pair moves the content towards the named side.
    """
    place, size, loss = found["place"].sum(1), sizes(found["place"]), sizes(found["denoising"]).mean(0)
    mean, error = size.mean(0), size.std(0, ddof=1) / math.sqrt(len(size)) if len(size) > 1 else 0 * size[0]
    rows = []
    for (block, head, pair), value in np.ndenumerate(mean):
        far = 1.96 * error[block, head, pair]
        row = {"block": block, "head": head, "pair": pair, "axis": found["axis"][pair]}
        row |= {"wavelength": float(found["wavelength"][pair]), "place": float(value)}
        row |= {"place_low": float(value - far), "place_high": float(value + far)}
        row |= {"signed": float(place[:, block, head, pair].mean()), "denoising": float(loss[block, head, pair])}
        rows.append(row)
    return rows


def rounded(value: Any) -> Any:
    """Return numbers with 6 digits, in lists and mappings too, and None for nan."""
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value
