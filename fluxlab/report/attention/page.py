"""The attention section of a report page: word maps with sliders, contact sheets and figures, within a size limit."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fluxlab.drawing import attention as draw
from fluxlab.drawing.greyscale import grey_formula
from fluxlab.drawing.pictures import Picture, fitting
from fluxlab.experiment.reading import Run
from fluxlab.probes import Captured
from fluxlab.report.attention.pictures import (
    FOLDER,
    average_blocks,
    cell_image,
    cell_key,
    first_seed,
    pictures,
    requests,
    select_steps,
    word_maps,
)

MAPS_BUDGET, SHEETS_BUDGET = 2_000_000, 600_000
"""Bytes for the maps of all runs, and for sheets and figures. The page has that much less for its other images."""

MEAN = "mean"


class Resolution(NamedTuple):
    """How much of the maps a page contains: steps and blocks in addition to their means, tokens on the longer side."""

    steps: int
    blocks: int
    side: int


RESOLUTIONS = tuple(
    map(Resolution._make, ((7, 20, 32), (7, 12, 24), (5, 10, 16), (3, 6, 16), (2, 3, 16), (0, 0, 16), (0, 0, 8)))
)
"""From fine to coarse. A page uses the first one whose maps are within the size limit."""


@dataclass(frozen=True)
class Section:
    """What the template needs.

    data: JSON for the script, escaped for a page; "" if no words were captured. sheets, figures: images with captions.
    bytes: the size of all of it, before base64.
    """

    data: str
    notes: list[str]
    sheets: list[tuple[Picture, str]]
    figures: list[tuple[Picture, str]]
    bytes: int

    def __bool__(self) -> bool:
        return bool(self.data or self.sheets or self.figures)


def shown(runs: Sequence[Run], names: Sequence[str], maps: int = MAPS_BUDGET, sheets: int = SHEETS_BUDGET) -> Section:
    """Return the section for several runs, which the page calls `names`. Stores without a capture add nothing.

    maps, sheets: size limits in bytes.
    """
    with_words = [(i, name, run) for i, (name, run) in enumerate(zip(names, runs, strict=True)) if _has_words(run)]
    parts, notes = [], []
    for i, name, run in with_words:
        part, note = _run(run, maps // len(with_words))
        parts.append({"table": i, "name": name, **part})
        if note:
            notes.append(f"{name}: {note}" if len(runs) > 1 else note)
    drawn = [pictures(run) for run in runs]
    figures = [(file, text, name) for name, files in zip(names, drawn, strict=True) for file, text in files.figures]
    pages = [(file, text, name) for name, files in zip(names, drawn, strict=True) for file, text in files.sheets]
    embedded = fitting([file for file, *_ in (*figures, *pages)], sheets)

    def captioned(files: Sequence[tuple]) -> list[tuple[Picture, str]]:
        return [
            (embedded[file], f"{name}: {text}" if len(runs) > 1 else text)
            for file, text, name in files
            if file in embedded
        ]

    if len(embedded) < len({file for file, *_ in (*figures, *pages)}):
        total = len({file for file, *_ in pages})
        notes.append(
            f"This page shows {len(captioned(pages))} of {total} contact sheets. All are in the run folder's {FOLDER}/."
        )
    data = _json({"colours": base64.b64encode(draw.colours().tobytes()).decode(), "runs": parts}) if parts else ""
    size = len(data) * 3 // 4
    size += sum(len(picture.url) for picture in embedded.values()) * 3 // 4
    return Section(data, notes, captioned(pages), captioned(figures), size)


def _has_words(run: Run) -> bool:
    return bool(word_maps(requests(run)))


def reduce(maps: Captured, resolution: Resolution) -> Captured:
    """Reduce maps `(step, block, word, row, col)` to a resolution. Entry 0 of steps and blocks is the mean.

    Means are over all captured steps and blocks. An axis of length 1 stays as it is.
    """
    for axis, most, part in (("step", resolution.steps, select_steps), ("block", resolution.blocks, average_blocks)):
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
    return replace(maps, values=downsample(maps.values, resolution.side))


def downsample(maps: np.ndarray, side: int) -> np.ndarray:
    """Downsample `(…, row, col)` to at most `side` entries on the longer side, by averaging over areas."""
    rows, cols = maps.shape[-2:]
    share = min(1, side / max(rows, cols))
    down, across = (_area_weights(n, max(1, round(share * n))) for n in (rows, cols))
    return maps if share == 1 else down @ maps @ across.T


def _area_weights(before: int, after: int) -> np.ndarray:
    """Return `(after, before)`: the part of each new entry that each old entry covers. Rows sum to 1."""
    edges = np.linspace(0, before, after + 1)
    overlap = np.minimum(edges[1:, None], np.arange(1, before + 1)) - np.maximum(edges[:-1, None], np.arange(before))
    return (np.clip(overlap, 0, None) * after / before).astype(np.float32)


def _run(run: Run, budget: int) -> tuple[dict[str, Any], str]:
    """Return a run's maps for the script, and a note that says what is left out."""
    parts, prompts = word_maps(requests(run)), first_seed(run)
    samples = [[part.maps(run.captured(*cell_key(entries[0]))) for part in parts] for _, entries in prompts]
    resolution, most = _resolution(samples, [len(entries) for _, entries in prompts], budget)
    columns = {place: column for column, place in enumerate(run.places)}
    shown = []
    for (prompt, entries), sample in zip(prompts[:most], samples, strict=False):
        packed: list[dict[str, str]] = [{} for _ in parts]
        greys: dict[str, list[float]] = {}
        for entry in entries:
            captured, variant = run.captured(*cell_key(entry)), str(run.variants.index(entry["variant"]))
            for part, by_variant in zip(parts, packed, strict=True):
                by_variant[variant] = pack(reduce(part.maps(captured), resolution))
            image = cell_image(run, entry)
            if image is not None:
                greys[variant] = [round(number, 4) for number in grey_formula(image)]
        labels = [_labels(reduce(maps, resolution)) for maps in sample]
        shown.append(
            {
                "prompt": prompt,
                "seed": entries[0]["seed"],
                "column": columns[prompt, entries[0]["seed"]],
                "greys": greys,
                "views": [{**part, "maps": by_variant} for part, by_variant in zip(labels, packed, strict=True)],
            }
        )
    views = {"views": [part.title for part in parts], "highest": [part.highest for part in parts]}
    data = {"variants": run.variants, **views, "prompts": shown}
    return data, _note(run, samples[0][0], shown, resolution)


def pack(maps: Captured) -> str:
    """Return base64 of the maximum of each map (fp32, little endian), then of all maps relative to it (uint8, 255 = 1).

    The order is word, step, block, row, col.
    """
    values = np.nan_to_num(maps.values.transpose(2, 0, 1, 3, 4))
    tops = values.max((3, 4), initial=0)
    shares = values / np.where(tops > 0, tops, 1)[..., None, None]
    content = tops.astype("<f4").tobytes() + (255 * shares).round().astype(np.uint8).tobytes()
    return base64.b64encode(content).decode()


def _resolution(samples: Sequence[Sequence[Captured]], variants: Sequence[int], budget: int) -> tuple[Resolution, int]:
    """Return the finest resolution within the budget and the number of prompts that fit.

    All prompts fit, unless even the coarsest resolution is too large. At least one prompt is always shown.
    """
    for resolution in RESOLUTIONS:
        sizes = [
            n * sum(_size(maps, resolution) for maps in sample) for sample, n in zip(samples, variants, strict=True)
        ]
        if sum(sizes) <= budget:
            return resolution, len(sizes)
    return resolution, max(1, int((np.cumsum(sizes) <= budget).sum()))


def _size(maps: Captured, resolution: Resolution) -> int:
    """Return the bytes of one cell's packed maps, without computing them."""
    empty = replace(maps, values=np.broadcast_to(np.float32(0), maps.values.shape)[..., :1, :1])
    steps, blocks = (
        1 if n == 1 or not most else 1 + len(part(empty, most).labels(axis))
        for axis, most, part in (
            ("step", resolution.steps, select_steps),
            ("block", resolution.blocks, average_blocks),
        )
        for n in [len(maps.labels(axis))]
    )
    rows, cols = maps.values.shape[-2:]
    share = min(1, resolution.side / max(rows, cols))
    return len(maps.labels("word")) * steps * blocks * (4 + max(1, round(share * rows)) * max(1, round(share * cols)))


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


def _note(run: Run, maps: Captured, shown: Sequence[Mapping[str, Any]], resolution: Resolution) -> str:
    """Return a sentence that says what the page leaves out; "" if it shows everything that was captured."""
    parts = []
    seeds, prompts = ({entry[key] for entry in run.attention} for key in ("seed", "prompt"))
    steps, blocks = len(maps.labels("step")), len(maps.labels("block"))
    if len(seeds) > 1:
        parts.append(f"seed {shown[0]['seed']} of {len(seeds)} seeds")
    if len(shown) < len(prompts):
        parts.append(f"{len(shown)} of {len(prompts)} prompts")
    if resolution.steps < steps > 1:
        parts.append(f"{resolution.steps or 'the mean'} of {steps} steps")
    if resolution.blocks < blocks > 1:
        parts.append(f"{blocks} blocks as means of neighbours" if resolution.blocks else f"the mean of {blocks} blocks")
    if resolution.side < max(maps.values.shape[-2:]):
        small = shown[0]["views"][0]["size"]
        parts.append(f"maps of {maps.values.shape[-2]} × {maps.values.shape[-1]} tokens at {small[0]} × {small[1]}")
    if not parts:
        return ""
    return (
        f"Shown: {', '.join(parts)}. Means are over everything captured; the arrays are in the run folder's {FOLDER}/."
    )


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element around it, whatever the prompts contain."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
