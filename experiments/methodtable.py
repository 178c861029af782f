"""The numbers of `experiments.methods`: what the oracle reads in enlarged images, method by method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.results import every_image
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.images import read_pixels
from fluxlab.measure.oracle import inspect
from fluxlab.measure.summary import CONTROLS, summarise
from fluxlab.positions import OPS, Program
from fluxlab.scenes import Wanted, parse

PARTS = ("things", "colour", "shape", "place", "letters")
"""What is read. things: there are exactly as many as the caption names. letters: the share of right letters.

The others are those of the oracle: the largest thing has the colour, the shape and the place of the caption.
"""

METRICS = (*PARTS, "score", "all_right", "size", "sharpness")
"""Columns of `table_rows`. score: the mean of `PARTS`. size: of the largest thing in px, nan without one."""

KINDS = ("reference", "frequencies", "attention", "composed")
"""What a variant is: the baseline or resized images, one op on frequencies, one on attention, or several."""

CONTROL = "control"
"""The kind of the noise floor and of another seed."""

Row = dict[str, Any]


class HeldOut(NamedTuple):
    """The best composition against the best method alone, each chosen on other prompts than those of the score.

    chosen: (alone, composed) by the score on the first and on the second half of the prompts; difference: (mean, low,
    high) of the paired differences composed - alone on the other half; counts: their numbers. pooled and n: the same
    over both halves. above: the compositions whose difference to the best method alone has an interval above 0, over
    all prompts, and below: those whose interval is below 0. compared: the number of compositions.
    """

    chosen: tuple[tuple[str, str], tuple[str, str]]
    difference: tuple[tuple[float, float, float], tuple[float, float, float]]
    counts: tuple[int, int]
    pooled: tuple[float, float, float]
    n: int
    best: str
    above: tuple[str, ...]
    below: tuple[str, ...]
    compared: int


def kind_of(run: Run, variant: str) -> str:
    """Return one of `KINDS`, or `CONTROL`."""
    if variant in CONTROLS:
        return CONTROL
    edits = Program.from_config(run.record["variants"][variant]["program"]).edits
    acts = [OPS[edit.op].acts_on for edit in edits]
    if not acts or acts == ["size"]:
        return KINDS[0]
    return KINDS[3] if len(acts) > 1 else KINDS[1] if acts == ["frequencies"] else KINDS[2]


def enlarged(run: Run) -> float:
    """Return the height of the images over the trained one. Raises `UserError` if the images are not larger."""
    times = run.record["settings"]["height"] / _trained(run)[0]
    if times <= 1:
        raise UserError(f"{run.path}: images of the trained size, expected larger ones, such as those of +exp=methods")
    return times


def _trained(run: Run) -> tuple[int, int]:
    settings, model = run.record["settings"], run.record["request"]["model"]
    if settings.get("trained"):
        height, width = (side * settings["pixels_per_token"] for side in settings["trained"][:2])
        return height, width
    if not model.get("size"):
        raise UserError(f"{run.path}: the trained size is not known; give the model's row a size and run it again")
    return tuple(model["size"])


def scores(run: Run) -> list[Row]:
    """Return a row per image of every variant and control: variant, prompt, seed and `METRICS`."""
    try:
        wanted = {prompt: parse(prompt) for prompt in dict.fromkeys(place[0] for place in run.places)}
    except UserError as error:
        raise UserError(f"{run.path}: the scene oracle scores captions of scenes only: {error}") from None
    size, rows = _trained(run), []
    for row, file in every_image(run):
        keys = {key: row[key] for key in ("variant", "prompt", "seed", "sharpness")}
        rows.append(keys | read(read_pixels(file), wanted[row["prompt"]], size))
    return rows


def read(pixels: np.ndarray, wanted: Wanted, trained: tuple[int, int]) -> Row:
    """Return what the oracle reads in an image: `PARTS`, score, all_right and size.

    The oracle reads letters of one size only, that of the trained images. So they are read twice, in the image as it
    is and in the image resized to the trained (height, width), and the larger share counts.
    """
    small = np.asarray(Image.fromarray(pixels).resize(trained[::-1], Image.Resampling.BICUBIC))
    report, resized = inspect(pixels, wanted), inspect(small, wanted)
    named = 0 if wanted.thing is None else 2 if wanted.relation else 1
    found = {
        "things": len(report.things) == named if named else None,
        "colour": report.colour,
        "shape": report.shape,
        "place": report.place,
        "letters": max(report.letter_accuracy, resized.letter_accuracy) if wanted.sign else None,
    }
    row = {name: math.nan if value is None else float(value) for name, value in found.items()}
    said = [value for value in row.values() if not math.isnan(value)]
    row["score"] = sum(said) / len(said) if said else math.nan
    row["all_right"] = float(all(value == 1 for value in said)) if said else math.nan
    row["size"] = float(report.things[0].size) if report.things else math.nan
    return row


def table_rows(run: Run, rows: Sequence[Row]) -> list[Row]:
    """Return a row per variant and control: kind, n, and mean, low and high of each of `METRICS`, 95 % over images."""
    table: dict[str, Row] = {}
    for row in summarise(rows, run.baseline, METRICS):
        name = row["variant"]
        start = {"enlarge": enlarged(run), "variant": name, "kind": kind_of(run, name), "n": 0}
        line = table.setdefault(name, start)
        line["n"] = max(line["n"], row["n"])
        line |= {row["metric"] + end: row[key] for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))}
    return list(table.values())


def held_out(run: Run, rows: Sequence[Row], metric: str = "score") -> HeldOut:
    """Return whether the best composition is better than the best method alone on prompts that chose neither.

    Both halves of the prompts choose, in turn, for the other half. Raises `UserError` for fewer than two prompts and
    without a composition or a method alone.
    """
    prompts = list(dict.fromkeys(place[0] for place in run.places))
    kinds = {name: kind_of(run, name) for name in run.variants}
    alone = [name for name, kind in kinds.items() if kind in KINDS[1:3]]
    composed = [name for name, kind in kinds.items() if kind == KINDS[3]]
    if len(prompts) < 2 or not alone or not composed:
        raise UserError(
            f"{run.path}: {len(prompts)} prompts, {len(alone)} methods alone, {len(composed)} composed; expected at "
            "least two prompts, and variants of both kinds, such as those of +exp=methods"
        )
    halves = prompts[: len(prompts) // 2], prompts[len(prompts) // 2 :]
    value = {(row["variant"], row["prompt"], row["seed"]): row[metric] for row in rows}

    def best(names: Sequence[str], among: Sequence[str]) -> str:
        means = {
            name: np.mean([v for (n, prompt, _), v in value.items() if n == name and prompt in among]) for name in names
        }
        return max(means, key=lambda name: means[name])  # the first listed wins a tie

    chosen = tuple((best(alone, half), best(composed, half)) for half in halves)
    pairs: list[list[Row]] = []
    for (single, pair), others in zip(chosen, reversed(halves), strict=True):
        places = [place for place in run.places if place[0] in others]
        pairs.append(
            [
                _row(name, place, value[own, *place])
                for name, own in (("alone", single), ("composed", pair))
                for place in places
            ]
        )
    first = best(alone, prompts)
    against = [_row(name, place, value[name, *place]) for name in (first, *composed) for place in run.places]
    ends = {row["variant"]: row for row in summarise(against, first, ["value"])}
    return HeldOut(
        chosen,
        tuple(_difference(rows) for rows in pairs),
        tuple(len(rows) // 2 for rows in pairs),
        _difference([row for rows in pairs for row in rows]),
        sum(len(rows) // 2 for rows in pairs),
        first,
        tuple(name for name in composed if ends[name]["paired_low"] > 0),
        tuple(name for name in composed if ends[name]["paired_high"] < 0),
        len(composed),
    )


def _row(variant: str, place: tuple[str, int], value: float) -> Row:
    return {"variant": variant, "prompt": place[0], "seed": place[1], "value": value}


def _difference(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    (found,) = (row for row in summarise(rows, "alone", ["value"]) if row["variant"] == "composed")
    return found["paired_mean"], found["paired_low"], found["paired_high"]
