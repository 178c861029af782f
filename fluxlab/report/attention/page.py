"""What a page shows of attention: maps of words to be looked through, contact sheets and figures, within a budget."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fluxlab.drawing import attention as draw
from fluxlab.drawing.pictures import Picture, fitting
from fluxlab.experiment.reading import Run
from fluxlab.probes import Captured
from fluxlab.report.attention.pictures import FOLDER, first_seed, fold, pictures, place, requests, thin, views

MAPS_BUDGET, SHEETS_BUDGET = 2_000_000, 600_000
"""Bytes of all runs' maps, and of sheets and figures; what a page's pictures have less for them."""


MEAN = "mean"


class Rule(NamedTuple):
    """What is kept at most: steps and blocks beside their means, and tokens on a map's longer side."""

    steps: int
    blocks: int
    side: int


LADDER = tuple(map(Rule._make, ((7, 20, 32), (7, 12, 24), (5, 10, 16), (3, 6, 16), (2, 3, 16), (0, 0, 16), (0, 0, 8))))
"""Rules from the finest on: a page takes the first with which its maps are within budget."""


@dataclass(frozen=True)
class Shown:
    """What the template needs. data: for the script, JSON that may stand in a page; "" where no words were captured.

    sheets and figures: pictures with their captions. bytes: what they and the maps take, before base64.
    """

    data: str
    notes: list[str]
    sheets: list[tuple[Picture, str]]
    figures: list[tuple[Picture, str]]
    bytes: int

    def __bool__(self) -> bool:
        return bool(self.data or self.sheets or self.figures)


def shown(runs: Sequence[Run], names: Sequence[str], maps: int = MAPS_BUDGET, sheets: int = SHEETS_BUDGET) -> Shown:
    """Of several runs, named on the page as `names`. Stores without a capture have nothing here."""
    told = [(i, name, run) for i, (name, run) in enumerate(zip(names, runs, strict=True)) if views(requests(run))]
    parts, notes = [], []
    for i, name, run in told:
        part, said = _run(run, maps // len(told))
        parts.append({"table": i, "name": name, **part})
        if said:
            notes.append(f"{name}: {said}" if len(runs) > 1 else said)
    drawn = [pictures(run) for run in runs]
    figures = [(file, text, name) for name, one in zip(names, drawn, strict=True) for file, text in one.figures]
    pages = [(file, text, name) for name, one in zip(names, drawn, strict=True) for file, text in one.sheets]
    embedded = fitting([file for file, *_ in (*figures, *pages)], sheets)

    def captioned(some: Sequence[tuple]) -> list[tuple[Picture, str]]:
        return [
            (embedded[file], f"{name}: {text}" if len(runs) > 1 else text)
            for file, text, name in some
            if file in embedded
        ]

    if len(embedded) < len({file for file, *_ in (*figures, *pages)}):
        left = len({file for file, *_ in pages}), len(captioned(pages))
        notes.append(f"{left[1]} of {left[0]} contact sheets are shown; all lie in the run folder's {FOLDER}/.")
    data = _json({"colours": base64.b64encode(draw.colours().tobytes()).decode(), "runs": parts}) if parts else ""
    size = len(data) * 3 // 4
    size += sum(len(picture.url) for picture in embedded.values()) * 3 // 4
    return Shown(data, notes, captioned(pages), captioned(figures), size)


def reduce(maps: Captured, rule: Rule) -> Captured:
    """Maps `(step, block, word, row, col)` led by their means over steps and over blocks, and thinned by a rule.

    Means are over all that was captured. An axis of one entry is its own mean and stays as it is.
    """
    for axis, most, part in (("step", rule.steps, thin), ("block", rule.blocks, fold)):
        if len(maps.labels(axis)) > 1:
            n = maps.axes.index(axis)
            few = part(maps, max(1, most))
            values = np.concatenate((maps.values.mean(n, keepdims=True), few.values), n)
            coords = few.coords | {axis: ((axis,), [MEAN, *few.labels(axis)])}
            if axis == "step" and "sigma" in coords:
                coords |= {"sigma": (("step",), [None, *few.coords["sigma"][1]])}
            values = values if most else values.take([0], n)
            coords = coords if most else {**coords, axis: ((axis,), [MEAN]), "sigma": (("step",), [None])}
            maps = replace(maps, values=values, coords=coords)
    return replace(maps, values=smaller(maps.values, rule.side))


def smaller(maps: np.ndarray, side: int) -> np.ndarray:
    """`(…, row, col)` with at most `side` entries on the longer side, each the mean of the area that it stands for."""
    rows, cols = maps.shape[-2:]
    share = min(1, side / max(rows, cols))
    down, across = (_areas(n, max(1, round(share * n))) for n in (rows, cols))
    return maps if share == 1 else down @ maps @ across.T


def _areas(before: int, after: int) -> np.ndarray:
    """`(after, before)`: how much of each old entry lies in each new one; rows add up to 1."""
    edges = np.linspace(0, before, after + 1)
    overlap = np.minimum(edges[1:, None], np.arange(1, before + 1)) - np.maximum(edges[:-1, None], np.arange(before))
    return (np.clip(overlap, 0, None) * after / before).astype(np.float32)


def _run(run: Run, budget: int) -> tuple[dict[str, Any], str]:
    """A run's maps for the script, and in words what of them is left out."""
    found, prompts = views(requests(run)), first_seed(run)
    samples = [[view.maps(run.captured(*place(entries[0]))) for view in found] for _, entries in prompts]
    rule, most = _rule(samples, [len(entries) for _, entries in prompts], budget)
    columns = {there: x for x, there in enumerate(run.places)}
    told = []
    for (prompt, entries), sample in zip(prompts[:most], samples, strict=False):
        maps: list[dict[str, str]] = [{} for _ in found]
        for entry in entries:
            captured = run.captured(*place(entry))
            for view, packed in zip(found, maps, strict=True):
                packed[str(run.variants.index(entry["variant"]))] = pack(reduce(view.maps(captured), rule))
        told.append(
            {
                "prompt": prompt,
                "seed": entries[0]["seed"],
                "column": columns[prompt, entries[0]["seed"]],
                "views": [
                    {**_labels(reduce(one, rule)), "maps": packed} for one, packed in zip(sample, maps, strict=True)
                ],
            }
        )
    part = {"variants": run.variants, "views": [view.title for view in found], "prompts": told}
    return part, _note(run, samples[0][0], told, rule)


def pack(maps: Captured) -> str:
    """base64 of each map's largest value (fp32, little endian), then of all maps in 1/255 of it (uint8), word by word,
    step by step, block by block, row by row."""
    values = np.nan_to_num(maps.values.transpose(2, 0, 1, 3, 4))
    tops = values.max((3, 4), initial=0)
    shares = values / np.where(tops > 0, tops, 1)[..., None, None]
    content = tops.astype("<f4").tobytes() + (255 * shares).round().astype(np.uint8).tobytes()
    return base64.b64encode(content).decode()


def _rule(samples: Sequence[Sequence[Captured]], variants: Sequence[int], budget: int) -> tuple[Rule, int]:
    """The finest rule within budget, and how many prompts it is for: all but where even the coarsest is too much."""
    for rule in LADDER:
        sizes = [n * sum(_size(one, rule) for one in some) for some, n in zip(samples, variants, strict=True)]
        if sum(sizes) <= budget:
            return rule, len(sizes)
    return rule, max(1, int((np.cumsum(sizes) <= budget).sum()))


def _size(maps: Captured, rule: Rule) -> int:
    """Bytes of a cell's maps, packed: of a cell that is all 0, so that nothing large is moved about."""
    empty = replace(maps, values=np.broadcast_to(np.float32(0), maps.values.shape))
    steps, blocks = (
        1 if n == 1 or not most else 1 + len(part(replace(empty, values=empty.values[..., :1, :1]), most).labels(axis))
        for axis, most, part in (("step", rule.steps, thin), ("block", rule.blocks, fold))
        for n in [len(maps.labels(axis))]
    )
    rows, cols = maps.values.shape[-2:]
    share = min(1, rule.side / max(rows, cols))
    return len(maps.labels("word")) * steps * blocks * (4 + round(share * rows) * round(share * cols))


def _labels(maps: Captured) -> dict[str, Any]:
    steps, blocks = maps.labels("step"), maps.labels("block")
    sigmas = maps.coords.get("sigma", ((), [None] * len(steps)))[1]
    return {
        "words": maps.labels("word"),
        "steps": [
            f"{step}, σ {sigma:.2f}" if sigma is not None else str(step)
            for step, sigma in zip(steps, sigmas, strict=True)
        ],
        "blocks": [str(block) for block in blocks],
        "size": maps.values.shape[-2:],
    }


def _note(run: Run, maps: Captured, told: Sequence[Mapping[str, Any]], rule: Rule) -> str:
    """What a page leaves out of what was captured; empty for nothing."""
    said = []
    seeds, prompts = ({one[key] for one in run.attention} for key in ("seed", "prompt"))
    steps, blocks = len(maps.labels("step")), len(maps.labels("block"))
    if len(seeds) > 1:
        said.append(f"seed {told[0]['seed']} of {len(seeds)} seeds")
    if len(told) < len(prompts):
        said.append(f"{len(told)} of {len(prompts)} prompts")
    if rule.steps < steps > 1:
        said.append(f"{rule.steps or 'the mean'} of {steps} steps")
    if rule.blocks < blocks > 1:
        said.append(f"{blocks} blocks in means of neighbours" if rule.blocks else f"the mean of {blocks} blocks")
    if rule.side < max(maps.values.shape[-2:]):
        small = told[0]["views"][0]["size"]
        said.append(f"maps of {maps.values.shape[-2]} × {maps.values.shape[-1]} tokens at {small[0]} × {small[1]}")
    if not said:
        return ""
    return f"Shown: {', '.join(said)}. Means are over all; the arrays lie in the run folder's {FOLDER}/."


def _json(value: Any) -> str:
    """JSON that may stand between script tags, whatever a prompt says."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
