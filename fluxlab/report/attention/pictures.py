"""Images of a store's captured attention: contact sheets, GIFs over steps, and figures.

    attention/<cell key>.png    words × blocks over the cell's image, mean over steps; for cells of the first seed
    attention/steps-<n>.gif     words × variants for the n-th prompt, mean over blocks; one frame per step
    attention/<request>.png     distance, entropy and quadrants by block and variant

The first word maps have these names. Those of further `words` requests, and of the second direction, have the request's
name appended to the cell's or the prompt's. Other kinds of request have no image.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxlab.drawing import attention as draw
from fluxlab.drawing.pictures import open_cell, put
from fluxlab.experiment.reading import Run
from fluxlab.probes import Captured, index

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "attention"
MOST_BLOCKS, MOST_FRAMES = 20, 30
CELL = 96  # px, approximate side of a square map
FIGURES = {
    "distance": "distance from an image query to the image keys that it attends to",
    "entropy": "entropy of attention: 0 for a single key, high for evenly spread attention",
    "quadrants": "attention within and between text and image, query → key",
}
"""The kinds of request that have a figure, with its caption."""
SECONDS = 0.4  # per frame
ALL = "all"
"""The label of an axis that the capture averaged over."""


@dataclass(frozen=True)
class WordMaps:
    """The maps of one `words` request in one direction, or of a `concepts` request, whose direction is "".

    `suffix` ends the names of their files; the first has none.
    """

    request: str
    direction: str
    suffix: str

    @property
    def title(self) -> str:
        directions = {
            "image_to_word": "attention from image tokens to words",
            "word_to_image": "attention from words to image tokens",
            "": "words compared by attention outputs, shares at each image token",
        }
        return f"{self.request}: {directions[self.direction]}"

    @property
    def highest(self) -> float | None:
        """The value with the brightest colour. None: the largest one of a word in all variants."""
        return None if self.direction else 1.0

    def maps(self, captured: Mapping[str, Captured]) -> Captured:
        """Return the maps with axes (step, block, word, row, col), mean over heads.

        An axis that the capture averaged over has one entry with the label "all".
        """
        maps = captured[self.request]
        maps = maps.sel(direction=self.direction) if self.direction else maps
        maps = maps.mean("head") if "head" in maps.axes else maps
        for axis in ("block", "step"):
            if axis not in maps.axes:
                coords = {**maps.coords, axis: ((axis,), [ALL])}
                maps = replace(maps, values=maps.values[None], axes=(axis, *maps.axes), coords=coords)
        order = ("step", "block", "word", "row", "col")
        return replace(maps, values=maps.values.transpose([maps.axes.index(axis) for axis in order]), axes=order)


@dataclass(frozen=True)
class Pictures:
    """The image files that exist, each with its caption."""

    sheets: list[tuple[Path, str]]
    gifs: list[tuple[Path, str]]
    figures: list[tuple[Path, str]]


def requests(run: Run) -> dict[str, dict[str, Any]]:
    """Return the requests of a store's capture by name; none if it has no capture."""
    loaded = index(run.path)
    return {name: request for name, request in loaded["capture"].items() if name != "max_mb"} if loaded else {}


def word_maps(requests: Mapping[str, Mapping[str, Any]]) -> list[WordMaps]:
    """Return the word maps of the requests: one per `words` request and direction, and per `concepts` request."""
    maps: list[WordMaps] = []
    for name, request in requests.items():
        if request["kind"] == "words":
            direction = request.get("direction", "both")
            directions = ("image_to_word", "word_to_image") if direction == "both" else (direction,)
            for direction in directions:
                suffix = "" if not maps else f"-{name}" if len(directions) == 1 else f"-{name}-{direction}"
                maps.append(WordMaps(name, direction, suffix))
        elif request["kind"] == "concepts":
            maps.append(WordMaps(name, "", f"-{name}" if maps else ""))
    return maps


def first_seed(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the prompts in order, each with the captured cells of its first seed in the order of the variants."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for entry in run.attention:
        prompts.setdefault(entry["prompt"], []).append(entry)
    return [
        (prompt, [entry for entry in entries if entry["seed"] == entries[0]["seed"]])
        for prompt, entries in prompts.items()
    ]


def write_pictures(run: Run) -> list[Path]:
    """Draw everything that a store has captured and return the files.

    The bytes of an image depend on the captured arrays only. A file that has them already is not written again.
    """
    requested = requests(run)
    maps = word_maps(requested)
    written: dict[Path, None] = {}
    for n, (prompt, entries) in enumerate(first_seed(run) if maps else (), 1):
        for file, content in _drawn(run, maps, n, prompt, entries):
            if file not in written:  # variants with equal programs share a cell
                written[put(file, content)] = None
    for name, request in requested.items():
        from fluxlab.report.attention.figures import figure

        content = figure(run, name, request)
        if content is not None:
            written[put(run.path / FOLDER / f"{name}.png", content)] = None
    return list(written)


def pictures(run: Run) -> Pictures:
    """Return the files that `write_pictures` has written for the current experiment."""
    requested = requests(run)
    folder, prompts = run.path / FOLDER, first_seed(run) if requested else []
    maps = word_maps(requested)
    sheets = {
        folder / f"{entry['cell']}{part.suffix}.png": f"{cell_title(entry)} · {part.title}"
        for part in maps
        for _, entries in prompts
        for entry in entries
    }
    gifs = {
        folder / f"steps-{n}{part.suffix}.gif": f"{prompt} · seed {entries[0]['seed']} · {part.title}"
        for part in maps
        for n, (prompt, entries) in enumerate(prompts, 1)
    }
    kinds = {name: request["kind"] for name, request in requested.items()}
    figures = {folder / f"{name}.png": f"{name}: {FIGURES[kind]}" for name, kind in kinds.items() if kind in FIGURES}
    groups = [[(file, text) for file, text in files.items() if file.is_file()] for files in (sheets, gifs, figures)]
    return Pictures(*groups)


def summary(run: Run) -> dict[str, float]:
    """Return one number per variant and request under the key `attention.<variant>.<request>`.

    - words: the part of the image queries' attention that goes to the words, mean over the cells of the first seed
    - entropy: its mean in nats
    - distance: its mean in tokens
    - quadrants: the part of the image queries' attention that goes to text

    The last three are means over all cells.
    """
    from fluxlab.report.attention.figures import PANELS, headline

    requested, values = requests(run), {}
    names = [name for name, request in requested.items() if request["kind"] in PANELS]
    to_words = [part for part in word_maps(requested) if part.direction == "image_to_word"]
    first = {entry["cell"] for _, entries in first_seed(run) for entry in entries}
    for entry in run.attention if names or to_words else ():
        if not names and entry["cell"] not in first:
            continue
        captured = run.captured(*cell_key(entry))
        numbers = {name: headline(captured, name, requested[name]["kind"]) for name in names}
        if entry["cell"] in first:
            for part in to_words:
                numbers[part.request] = float(np.nansum(part.maps(captured).values.mean((0, 1, 3, 4))))
        for name, value in numbers.items():
            values.setdefault(f"attention.{entry['variant']}.{name}", []).append(value)
    means = {key: math.fsum(numbers) / len(numbers) for key, numbers in values.items()}
    return {key: value for key, value in means.items() if math.isfinite(value)}


def average_blocks(maps: Captured, most: int = MOST_BLOCKS) -> Captured:
    """Average neighbouring blocks until at most `most` remain. "3-5" labels the mean of blocks 3, 4 and 5.

    Double and single blocks are not averaged together, so that at least one of each remains.
    """
    axis, labels = maps.axes.index("block"), maps.labels("block")
    count = len(labels)
    if count <= most:
        return maps
    along, streams = maps.coords.get("stream", (("block",), [""] * count))
    for width in range(2, count + 1):
        groups = [
            part[i : i + width]
            for stream in dict.fromkeys(streams)
            for part in [[n for n in range(count) if streams[n] == stream]]
            for i in range(0, len(part), width)
        ]
        if len(groups) <= max(most, len(set(streams))):
            break
    values = np.stack([maps.values.take(group, axis).mean(axis) for group in groups], axis)
    names = [str(labels[g[0]]) if len(g) == 1 else f"{labels[g[0]]}-{labels[g[-1]]}" for g in groups]
    coords = {key: value for key, value in maps.coords.items() if "block" not in value[0]}
    coords |= {"block": (("block",), names), "stream": (along, [streams[group[0]] for group in groups])}
    return replace(maps, values=values, coords=coords)


def select_steps(maps: Captured, most: int) -> Captured:
    """Select at most `most` steps at even intervals, including the first and the last."""
    count = maps.values.shape[maps.axes.index("step")]
    kept = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    coords = {
        name: (along, [values[i] for i in kept] if along == ("step",) else values)
        for name, (along, values) in maps.coords.items()
    }
    return replace(maps, values=maps.values.take(kept, maps.axes.index("step")), coords=coords)


def cell_length(rows: int, cols: int) -> int:
    """Return the length in pixels of a map's longer side: a whole number of pixels per token.

    Maps of all shapes have about the area of a square of side `CELL`, so that wide ones stay readable, but none is
    longer than twice that.
    """
    longest = max(rows, cols)
    return longest * max(1, int(min(CELL / math.sqrt(rows * cols), 2 * CELL / longest)))


def cell_key(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    return entry["variant"], entry["prompt"], entry["seed"]


def cell_title(entry: Mapping[str, Any]) -> str:
    return f"{entry['variant']} · {entry['prompt']} · seed {entry['seed']}"


def cell_image(run: Run, entry: Mapping[str, Any]) -> "Image.Image | None":
    """Return the image of a cell in RGB, or None if its file is missing. Raises `UserError` for a damaged file."""
    file = run.image(*cell_key(entry))
    return open_cell(file) if file.is_file() else None


def _drawn(
    run: Run, parts: Sequence[WordMaps], n: int, prompt: str, entries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Path, bytes]]:
    """Yield the sheets and GIFs of a prompt. Each file of arrays is read once, and only means of them are kept."""
    images = [cell_image(run, entry) for entry in entries]
    by_block: dict[WordMaps, list[Captured]] = {part: [] for part in parts}
    by_step: dict[WordMaps, list[Captured]] = {part: [] for part in parts}
    for entry in entries:
        captured = run.captured(*cell_key(entry))
        for part in parts:
            maps = part.maps(captured)
            by_block[part].append(average_blocks(maps.mean("step")))
            by_step[part].append(select_steps(maps, MOST_FRAMES).mean("block"))
    for part in parts:
        # All variants share one scale per word: their sheets can be compared.
        highest = np.max([np.nan_to_num(maps.values).max((0, 2, 3)) for maps in by_block[part]], 0)
        highest = highest if part.highest is None else np.full_like(highest, part.highest)
        cell = cell_length(*by_block[part][0].values.shape[2:])
        for entry, maps, image in zip(entries, by_block[part], images, strict=True):
            title = f"{cell_title(entry)}\n{part.title}, mean over steps"
            page = draw.sheet(maps, image=image, highest=highest, cell=cell, title=title)
            yield run.path / FOLDER / f"{entry['cell']}{part.suffix}.png", _png(page)
        if len(by_step[part][0].labels("step")) > 1:
            stacked = _stacked(by_step[part], [entry["variant"] for entry in entries])
            title = f"{prompt} · seed {entries[0]['seed']}\n{part.title}, mean over blocks"
            under = [images] * len(stacked.labels("step"))
            frames = draw.frames(stacked, columns="variant", images=under, cell=cell, title=title)
            yield run.path / FOLDER / f"steps-{n}{part.suffix}.gif", draw.gif_bytes(frames, seconds=SECONDS)


def _stacked(parts: Sequence[Captured], variants: Sequence[str]) -> Captured:
    """Stack arrays of equal shape along a new first axis, `variant`."""
    first = parts[0]
    coords = {**first.coords, "variant": (("variant",), list(variants))}
    return replace(
        first, values=np.stack([part.values for part in parts]), axes=("variant", *first.axes), coords=coords
    )


def _png(image: "Image.Image") -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()
