"""The numbers of `experiments.relocation`: where is a thing when its phrase is moved to a box, or seen from it only?"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.images import read_pixels
from fluxlab.measure.oracle import inspect
from fluxlab.positions import Program

NAMES = {"relocate": "positions", "mask": "mask"}
"""What the figure calls the ops that are applied to a phrase. Others keep their name."""

DRAWS = 2000
MEASURES = ("object", "shape", "letters")
COLUMNS = ("slope", "slope_row", "slope_col", "in_box", "in_box_gain", "distance", "distance_gain", "single", *MEASURES)
"""What `conditions` measures, each with `_low` and `_high`.

slope: by how much the thing's centre moves when the box moves by 1, within the boxes of one prompt and seed; rows and
columns together, or one of them. Another seed moves a thing too, but by the same for all boxes.
in_box: the share of images whose thing has its centre in the box. distance: of its centre to that of the box, as a
share of the image's side. gain: the difference to the baseline's thing at equal prompt, seed and box. single: the share
of images with one thing and no more; with several, the largest is the thing. object, shape, letters: means of the
metrics of these names.
"""


@dataclass(frozen=True)
class Target:
    """A variant with a box for a phrase. condition: its name without the number of the box.

    what: the ops applied, in words. steps: "all", or (from, to) of the schedule. box: (top, left, bottom, right) as
    shares of the image.
    """

    variant: str
    what: str
    steps: str | tuple[float, float]
    box: tuple[float, float, float, float]

    @property
    def condition(self) -> str:
        return re.sub(r"_\d+$", "", self.variant)

    @property
    def centre(self) -> tuple[float, float]:
        top, left, bottom, right = self.box
        return (top + bottom) / 2, (left + right) / 2


def targets(run: Run) -> dict[str, list[Target]]:
    """Return the variants that move words to a box, or mask them outside of it, by condition.

    Raises `UserError` if there are none, and if the scene oracle found nothing in the baseline.
    """
    found = targets_of({name: Program.from_config(run.record["variants"][name]["program"]) for name in run.variants})
    if not found:
        raise UserError(
            f"{run.path}: no variant moves words to a box in fractions, or masks them outside of one; "
            "expected a run of +exp=relocation"
        )
    first = run.metrics[0] if run.metrics else {}
    if not any(math.isfinite(row.get("thing_row", math.nan)) for row in run.metrics if row["variant"] == run.baseline):
        reason = "its images show no thing" if "thing_row" in first else "its model is not one of scenes"
        raise UserError(f"{run.path}: {reason}; the figure needs the scene oracle, which reads the embedded models")
    return found


def targets_of(programs: Mapping[str, Program]) -> dict[str, list[Target]]:
    """Return the programs that move words to a box, or mask them outside of it, by condition."""
    found: dict[str, list[Target]] = {}
    for name, program in programs.items():
        if target := _target(name, program):
            found.setdefault(target.condition, []).append(target)
    return found


def _target(name: str, program: Program) -> Target | None:
    ops, steps, boxes = [], [], []
    for edit in program.edits:
        given, where = edit.arguments, edit.where
        phrase = given.get("to") if edit.op == "mask" else where["tokens"]
        if not (isinstance(phrase, Mapping) and "words" in phrase):
            return None
        ops.append(NAMES.get(edit.op, edit.op))
        steps.append(where["steps"])
        if edit.op == "relocate":
            boxes.append(given["to"])
        elif edit.op == "mask" and isinstance(given["from"], Mapping):
            boxes.append(given["from"].get("outside"))
    boxes = [box for box in boxes if isinstance(box, Mapping) and "box" in box and box["unit"] == "fraction"]
    if not boxes or any(box != boxes[0] for box in boxes) or any(part != steps[0] for part in steps):
        return None
    window = steps[0] if isinstance(steps[0], str) else steps[0].get("fraction") if isinstance(steps[0], dict) else None
    if window is None:
        return None
    what = " + ".join(dict.fromkeys(ops))
    return Target(name, what, window if isinstance(window, str) else tuple(window), tuple(boxes[0]["box"]))


def wherever(target: Target) -> str:
    """Return the steps of a target in words."""
    return (
        "all steps" if target.steps == "all" else f"{100 * target.steps[0]:g}-{100 * target.steps[1]:g} % of the steps"
    )


@dataclass(frozen=True)
class Found:
    """What the oracle read under a condition, arrays (pairs, boxes): pairs of prompt and seed. Lengths are shares."""

    wanted: np.ndarray  # (boxes, 2)
    boxes: np.ndarray  # (boxes, 4)
    at: np.ndarray  # (pairs, boxes, 2), nan without a thing
    before: np.ndarray  # (pairs, 2), of the baseline
    measured: dict[str, np.ndarray]


def read(run: Run, chosen: Sequence[Target], count: bool = False) -> Found:
    """Return what the store's metrics say about the variants of a condition. count: read the images to count things."""
    rows = {(row["variant"], row["prompt"], row["seed"]): row for row in run.metrics}
    settings = run.record["settings"]
    sides = np.array([settings["height"], settings["width"]], dtype=float)

    def of(variant: str, *names: str) -> np.ndarray:
        return np.array([[float(rows[variant, *place][name]) for name in names] for place in run.places])

    at = np.stack([of(target.variant, "thing_row", "thing_col") for target in chosen], 1) / sides
    measured = {name: np.stack([of(target.variant, name)[:, 0] for target in chosen], 1) for name in MEASURES}
    if count:
        measured["single"] = np.stack([things(run, target.variant) == 1 for target in chosen], 1).astype(float)
    return Found(
        np.array([target.centre for target in chosen]),
        np.array([target.box for target in chosen]),
        at,
        of(run.baseline, "thing_row", "thing_col") / sides,
        measured,
    )


def things(run: Run, variant: str) -> np.ndarray:
    """Return how many things the scene oracle finds in each image of a variant, `(pairs,)`."""
    files = [(run.image(variant, *place), place[0]) for place in run.places]
    return np.array([len(inspect(read_pixels(file), prompt).things) for file, prompt in files])


def conditions(run: Run, found: Mapping[str, Sequence[Target]]) -> list[dict[str, Any]]:
    """Return a row per condition: `COLUMNS` with bootstrap 95 % intervals over pairs of prompt and seed.

    A pair is drawn with all its boxes, since these images share their noise. chance_low, chance_high: where 95 % of the
    slopes are when the boxes of each pair are exchanged at random. seeds_low, seeds_high: the smallest and the largest
    slope of one seed with all prompts, since prompts at one seed share their noise too.
    """
    seeds = np.array([seed for _, seed in run.places])
    made = []
    for name, chosen in found.items():
        seen = read(run, chosen, count=True)
        row = {"condition": name, "what": chosen[0].what, "steps": wherever(chosen[0])}
        row |= {"boxes": len(chosen), "pairs": len(seen.at), "n": seen.at.shape[0] * seen.at.shape[1]}
        for column, (above, below) in _ratios(seen).items():
            row |= dict(zip((column, f"{column}_low", f"{column}_high"), _interval(above, below), strict=True))
        row |= dict(zip(("chance_low", "chance_high"), _chance(seen), strict=True))
        made.append(row | dict(zip(("seeds_low", "seeds_high"), _by_seed(seen, seeds), strict=True)))
    return made


def _ratios(seen: Found) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what each of `COLUMNS` is the ratio of: a numerator and a denominator for each pair."""
    above, below = _products(seen.wanted, seen.at)
    shown = np.isfinite(seen.at[..., 0])
    inside = _inside(seen.at, seen.boxes)
    gone = _distance(seen.at, seen.wanted)
    before = np.broadcast_to(seen.before[:, None], seen.at.shape)
    both = shown & np.isfinite(before[..., 0])
    every = np.ones_like(gone)
    ratios = {
        "slope": (above.sum(1), below.sum(1)),
        "slope_row": (above[:, 0], below[:, 0]),
        "slope_col": (above[:, 1], below[:, 1]),
        "in_box": _sums(inside, every),
        "in_box_gain": _sums(inside - _inside(before, seen.boxes), every),
        "distance": _sums(gone, shown),
        "distance_gain": _sums(gone - _distance(before, seen.wanted), both),
    }
    for name, values in seen.measured.items():
        ratios[name] = _sums(values, np.isfinite(values))
    return ratios


def _products(wanted: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Σ (w - w̄)(p - p̄) and Σ (w - w̄)² of each pair and axis, over the boxes with a thing. `(pairs, 2)`."""
    known = np.isfinite(at)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    place, box = np.where(known, at, 0), np.where(known, wanted, 0)
    place = np.where(known, place - place.sum(1, keepdims=True) / count, 0)
    box = np.where(known, box - box.sum(1, keepdims=True) / count, 0)
    return (box * place).sum(1), (box * box).sum(1)


def _inside(at: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return 1 where a centre is in its box. Without a thing it is not."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return ((at >= low) & (at <= high)).all(-1).astype(float)


def _distance(at: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.hypot(at[..., 0] - wanted[:, 0], at[..., 1] - wanted[:, 1])


def _sums(values: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counted = counted.astype(bool)
    return np.where(counted, values, 0).sum(1), counted.sum(1).astype(float)


def _interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float, float]:
    """Return the ratio of two sums over pairs, and its bootstrap 95 % interval; nan where both sums are 0."""
    if below.sum() <= 1e-12:
        return math.nan, math.nan, math.nan
    pairs = len(above)
    value = float(above.sum() / below.sum())
    if pairs < 2:
        return value, math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, pairs, (DRAWS, pairs))
    tops, bottoms = above[drawn].sum(1), below[drawn].sum(1)
    low, high = np.percentile((tops / np.where(bottoms > 0, bottoms, np.nan))[bottoms > 0], (2.5, 97.5))
    return value, float(low), float(high)


def _by_seed(seen: Found, seeds: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest slope of the pairs of one seed, nan without any."""
    above, below = (part.sum(1) for part in _products(seen.wanted, seen.at))
    sums = [(above[seeds == seed].sum(), below[seeds == seed].sum()) for seed in np.unique(seeds)]
    slopes = [float(up / down) for up, down in sums if down > 1e-12]
    return (min(slopes), max(slopes)) if slopes else (math.nan, math.nan)


def _chance(seen: Found) -> tuple[float, float]:
    """Return the ends of 95 % of the slopes with the boxes of each pair exchanged at random."""
    if len(seen.wanted) < 2:
        return math.nan, math.nan
    rng, slopes = np.random.default_rng(0), []
    for _ in range(DRAWS // 4):
        order = rng.permuted(np.broadcast_to(np.arange(len(seen.wanted)), seen.at.shape[:2]), axis=1)
        above, below = _products(seen.wanted[order], seen.at)
        slopes.append(above.sum() / max(below.sum(), 1e-12))
    low, high = np.percentile(slopes, (2.5, 97.5))
    return float(low), float(high)


def by_box(run: Run, found: Mapping[str, Sequence[Target]]) -> list[dict[str, Any]]:
    """Return a row per condition and box: where the box and the thing are, and how far from the baseline's thing.

    Means over the images with a thing. Lengths are shares of the image's side.
    """
    made = []
    for name, chosen in found.items():
        seen = read(run, chosen)
        for i, target in enumerate(chosen):
            known = np.isfinite(seen.at[:, i, 0]) & np.isfinite(seen.before[:, 0])
            row = {"condition": name, "variant": target.variant, "images": len(known), "n": int(known.sum())}
            at, before = (_mean(values[known]) for values in (seen.at[:, i], seen.before))
            for axis, side in enumerate(("row", "col")):
                row |= {f"box_{side}": target.centre[axis], f"box_from_{side}": target.centre[axis] - before[axis]}
                row |= {f"thing_{side}": at[axis], f"moved_{side}": at[axis] - before[axis]}
            made.append(row)
    return made


def _mean(values: np.ndarray) -> tuple[float, float]:
    return tuple(map(float, values.mean(0))) if len(values) else (math.nan, math.nan)
