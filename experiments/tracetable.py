"""The numbers of `experiments.trace`: what of its source does a patched image show, by quadrant, block and step?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.experiment.sources import places_of
from fluxlab.experiment.store import CELLS, REFERENCES
from fluxlab.images import read_pixels
from fluxlab.measure.oracle import inspect
from fluxlab.measure.summary import CONTROLS, summarise
from fluxlab.positions import Program
from fluxlab.scenes import parse

ATTRIBUTES = {"place": "place", "colour": "colour", "letters": "word"}
"""What is scored, with the oracle's name for it. Letters: the sign says exactly the words."""

QUADRANTS = tuple(f"{origin} → {to}" for origin in ("text", "image") for to in ("text", "image"))

SOURCE = "source"
"""The row of the source's own images, which is the most that a patch can transfer."""

COLUMNS = ("variant", "quadrant", "blocks", "steps", "attribute", "n", "source", "source_low", "source_high")
COLUMNS += ("own", "own_low", "own_high")
"""Columns of the CSV. source: the share of images that show the source's attribute; own: that of their own prompt."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Patch:
    """A variant that patches one quadrant. blocks: a number or "all". steps: (from, to) of the schedule, or "all"."""

    variant: str
    quadrant: str
    blocks: int | str
    steps: tuple[float, float] | str

    @property
    def kind(self) -> str:
        """What is patched: one "block", some "steps" in all blocks, or "all"."""
        return "block" if self.blocks != "all" else "steps" if self.steps != "all" else "all"

    @property
    def where(self) -> str:
        blocks = "all blocks" if self.blocks == "all" else f"block {self.blocks}"
        return blocks if self.steps == "all" else f"{self.steps[0]:.0%}-{self.steps[1]:.0%} of the steps"


def patches(run: Run) -> list[Patch]:
    """Return the variants that inject keys and values of text or image for queries of text or image.

    In one block or all, in all steps or a part of the schedule. Raises `UserError` if the run has none.
    """
    found = [patch for name in run.variants if (patch := _patch(name, _program(run, name)))]
    if not found:
        raise UserError(
            f"{run.path}: no variant injects keys and values that only text or only image sees; "
            "expected a run of +exp=trace"
        )
    return found


def _program(run: Run, variant: str) -> Program:
    return Program.from_config(run.record["variants"][variant]["program"])


def _patch(name: str, program: Program) -> Patch | None:
    if len(program.edits) != 1 or program.edits[0].op != "inject":
        return None
    given, where = program.edits[0].arguments, program.edits[0].where
    sides, blocks, steps = (where["tokens"], where["seen_by"]), where["blocks"], where["steps"]
    if set(given["what"]) != {"keys", "values"} or any(side not in ("text", "image") for side in sides):
        return None
    numbers = blocks.get("through", []) if isinstance(blocks, dict) else []
    in_block, in_window = len(numbers) == 1 and steps == "all", isinstance(steps, dict) and set(steps) == {"fraction"}
    if not (in_block or (blocks == "all" and (in_window or steps == "all"))):
        return None
    return Patch(
        name,
        f"{sides[0]} → {sides[1]}",
        "all" if blocks == "all" else numbers[0],
        "all" if steps == "all" else tuple(steps["fraction"]),
    )


def source_prompts(run: Run, variants: Sequence[str]) -> dict[tuple[str, int], tuple[str, int]]:
    """Return the (prompt, seed) of each cell's source. Raises `UserError` if it differs between variants."""
    listed = tuple(list(dict.fromkeys(place[i] for place in run.places)) for i in (0, 1))
    sources: dict[tuple[str, int], tuple[str, int]] = {}
    for variant in variants:
        program = _program(run, variant)
        for place in run.places:
            ((name, *source),) = places_of(program, (variant, *place), run.baseline, listed)
            if name != run.baseline or sources.setdefault(place, tuple(source)) != tuple(source):
                raise UserError(f"{run.path}: variant {variant} has another source than {variants[0]}; expected one")
    return sources


def scores(run: Run, found: Sequence[Patch]) -> list[Row]:
    """Return a row per image: for each attribute, 1 where it is the source's ("place/source") or its own ("/own").

    The baseline and the two controls are scored against the same prompts, and `SOURCE` is the source's image itself.
    """
    sources = source_prompts(run, [patch.variant for patch in found])
    prompts = {prompt for place in run.places for prompt in (place[0], sources[place][0])}
    try:
        wanted = {prompt: parse(prompt) for prompt in prompts}
    except UserError as error:
        raise UserError(f"{run.path}: the scene oracle scores captions of scenes only: {error}") from None
    rows = []
    for variant in (run.baseline, *(patch.variant for patch in found)):
        for place in run.places:
            rows.append(_scored(run.image(variant, *place), variant, place, sources[place], wanted))
    for place in run.places:
        rows.append(_scored(run.image(run.baseline, *sources[place]), SOURCE, place, sources[place], wanted))
    for row in run.references:
        place = row["prompt"], row["seed"]
        files = [run.path / folder / f"{row['cell']}.png" for folder in (CELLS, REFERENCES)]
        file = next((file for file in files if file.exists()), files[0])
        rows.append(_scored(file, row["variant"], place, sources[place], wanted))
    return rows


def _scored(file: Any, variant: str, place: tuple[str, int], source: tuple[str, int], wanted: dict) -> Row:
    pixels, row = read_pixels(file), {"variant": variant, "prompt": place[0], "seed": place[1]}
    for name, prompt in (("source", source[0]), ("own", place[0])):
        report = inspect(pixels, wanted[prompt])
        for attribute, verdict in ATTRIBUTES.items():
            value = getattr(report, verdict)
            row[f"{attribute}/{name}"] = math.nan if value is None else float(value)
    return row


def table_rows(run: Run, found: Sequence[Patch]) -> list[Row]:
    """Return a row of `COLUMNS` for every attribute of every patch, the baseline, the source and the controls.

    Means over cells with bootstrap 95 % intervals.
    """
    metrics = [f"{attribute}/{name}" for attribute in ATTRIBUTES for name in ("source", "own")]
    summary = {(row["variant"], row["metric"]): row for row in summarise(scores(run, found), run.baseline, metrics)}
    others = [Patch(name, "", "", "") for name in (run.baseline, SOURCE, *CONTROLS)]
    rows = []
    for patch in (*others, *found):
        steps = patch.steps if isinstance(patch.steps, str) else f"{patch.steps[0]:g}-{patch.steps[1]:g}"
        for attribute in ATTRIBUTES:
            source, own = (summary[patch.variant, f"{attribute}/{name}"] for name in ("source", "own"))
            values = [part[end] for part in (source, own) for end in ("mean", "low", "high")]
            start = (patch.variant, patch.quadrant, patch.blocks, steps, attribute, source["n"])
            rows.append(dict(zip(COLUMNS, (*start, *values), strict=True)))
    return rows
