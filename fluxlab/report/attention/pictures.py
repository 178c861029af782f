"""Pictures of a store's captured attention: a contact sheet a cell, a film over steps a prompt, a figure a request.

    attention/<cell key>.png    words × blocks over the cell's picture, mean over steps; cells of the first seed
    attention/steps-<n>.gif     of the n-th prompt: words × variants, mean over blocks, a frame a step
    attention/<request>.png     distance, entropy and quadrants, block by block and variant by variant

A request for words both ways, and every request for words after the first, has sheets and films of its own, with its
name after the cell's or the prompt's. Other kinds of request have no picture.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxlab.drawing import attention as draw
from fluxlab.drawing.pictures import put
from fluxlab.experiment.reading import Run
from fluxlab.probes import Captured, index

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "attention"
MOST_BLOCKS, MOST_FRAMES = 20, 30
CELL = 96  # px of a map, about: a whole number a token
FIGURES = {
    "distance": "how far image tokens look within the image",
    "entropy": "how evenly tokens look at all the others",
    "quadrants": "how much text and image look at themselves and at each other",
}
SECONDS = 0.4  # a frame
ALL = "all"  # the one label of an axis that the capture has averaged over


@dataclass(frozen=True)
class View:
    """Maps of words that are looked at together: a request, and which way it looks.

    suffix tells its pictures from those of the first view, which has none.
    """

    request: str
    direction: str
    suffix: str

    @property
    def title(self) -> str:
        way = "how much image tokens look at words" if self.direction == "image_to_word" else "where words look"
        return f"{self.request}: {way}"

    def maps(self, captured: Mapping[str, Captured]) -> Captured:
        """Axes (step, block, word, row, col), mean over heads; an axis that was averaged over has the label "all"."""
        one = captured[self.request].sel(direction=self.direction)
        one = one.mean("head") if "head" in one.axes else one
        for axis in ("block", "step"):
            if axis not in one.axes:
                coords = {**one.coords, axis: ((axis,), [ALL])}
                one = replace(one, values=one.values[None], axes=(axis, *one.axes), coords=coords)
        order = ("step", "block", "word", "row", "col")
        return replace(one, values=one.values.transpose([one.axes.index(axis) for axis in order]), axes=order)


@dataclass(frozen=True)
class Pictures:
    """Files with captions: those that are there."""

    sheets: list[tuple[Path, str]]
    films: list[tuple[Path, str]]
    figures: list[tuple[Path, str]]


def requests(run: Run) -> dict[str, dict[str, Any]]:
    """What was asked of the attention, by name; nothing for a store without a capture."""
    told = index(run.path)
    return {name: request for name, request in told["capture"].items() if name != "max_mb"} if told else {}


def views(asked: Mapping[str, Mapping[str, Any]]) -> list[View]:
    """The requests for words, each way that they look."""
    found: list[View] = []
    for name, request in asked.items():
        if request["kind"] == "words":
            direction = request.get("direction", "both")
            ways = ("image_to_word", "word_to_image") if direction == "both" else (direction,)
            for way in ways:
                suffix = "" if not found else f"-{name}" if len(ways) == 1 else f"-{name}-{way}"
                found.append(View(name, way, suffix))
    return found


def first_seed(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """Prompts in order, each with the captured cells of its first seed in the order of the variants."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for entry in run.attention:
        prompts.setdefault(entry["prompt"], []).append(entry)
    return [
        (prompt, [one for one in entries if one["seed"] == entries[0]["seed"]]) for prompt, entries in prompts.items()
    ]


def write_pictures(run: Run) -> list[Path]:
    """Draw what a store has captured, the same bytes every time; a file that holds just that is left alone."""
    asked = requests(run)
    found = views(asked)
    written: dict[Path, None] = {}
    for n, (prompt, entries) in enumerate(first_seed(run) if found else (), 1):
        for file, content in _drawn(run, found, n, prompt, entries):
            if file not in written:  # variants may come to the same program, and so to the same cell
                written[put(file, content)] = None
    for name, request in asked.items():
        from fluxlab.report.attention.figures import figure

        content = figure(run, name, request)
        if content is not None:
            written[put(run.path / FOLDER / f"{name}.png", content)] = None
    return list(written)


def pictures(run: Run) -> Pictures:
    """What `write_pictures` has drawn of the current experiment."""
    asked = requests(run)
    folder, prompts = run.path / FOLDER, first_seed(run) if asked else []
    found = views(asked)
    sheets = {
        folder / f"{entry['cell']}{view.suffix}.png": f"{told(entry)} · {view.title}"
        for view in found
        for _, entries in prompts
        for entry in entries
    }
    films = {
        folder / f"steps-{n}{view.suffix}.gif": f"{prompt} · seed {entries[0]['seed']} · {view.title}"
        for view in found
        for n, (prompt, entries) in enumerate(prompts, 1)
    }
    kinds = {name: request["kind"] for name, request in asked.items()}
    figures = {folder / f"{name}.png": f"{name}: {FIGURES[kind]}" for name, kind in kinds.items() if kind in FIGURES}
    there = [[(file, text) for file, text in some.items() if file.is_file()] for some in (sheets, films, figures)]
    return Pictures(*there)


def summary(run: Run) -> dict[str, float]:
    """`attention.<variant>.<request>`: of words, the share of what image tokens look at that goes to them, over cells
    of the first seed; of entropy its mean in nats; of distance the mean distance in tokens; of quadrants the share of
    the text in what the image looks at. The last three over all cells.
    """
    from fluxlab.report.attention.figures import KINDS, headline

    asked, values = requests(run), {}
    wanted = [name for name, request in asked.items() if request["kind"] in KINDS]
    towards = [view for view in views(asked) if view.direction == "image_to_word"]
    first = {entry["cell"] for _, entries in first_seed(run) for entry in entries}
    for entry in run.attention if wanted or towards else ():
        if not wanted and entry["cell"] not in first:
            continue
        captured = run.captured(*place(entry))
        numbers = {name: headline(captured, name, asked[name]["kind"]) for name in wanted}
        if entry["cell"] in first:
            for view in towards:
                numbers[view.request] = float(np.nansum(view.maps(captured).values.mean((0, 1, 3, 4))))
        for name, value in numbers.items():
            values.setdefault(f"attention.{entry['variant']}.{name}", []).append(value)
    means = {key: math.fsum(some) / len(some) for key, some in values.items()}
    return {key: value for key, value in means.items() if math.isfinite(value)}


def fold(one: Captured, most: int = MOST_BLOCKS) -> Captured:
    """Neighbouring blocks as their mean, so that at most so many are left where the streams allow; "3-5" for three.

    Blocks of the two streams are not mixed.
    """
    axis, labels = one.axes.index("block"), one.labels("block")
    count = len(labels)
    if count <= most:
        return one
    along, streams = one.coords.get("stream", (("block",), [""] * count))
    for width in range(2, count + 1):
        groups = [
            part[i : i + width]
            for stream in dict.fromkeys(streams)
            for part in [[n for n in range(count) if streams[n] == stream]]
            for i in range(0, len(part), width)
        ]
        if len(groups) <= max(most, len(set(streams))):
            break
    values = np.stack([one.values.take(group, axis).mean(axis) for group in groups], axis)
    names = [str(labels[g[0]]) if len(g) == 1 else f"{labels[g[0]]}-{labels[g[-1]]}" for g in groups]
    coords = {key: value for key, value in one.coords.items() if "block" not in value[0]}
    coords |= {"block": (("block",), names), "stream": (along, [streams[group[0]] for group in groups])}
    return replace(one, values=values, coords=coords)


def thin(one: Captured, most: int) -> Captured:
    """At most so many steps, evenly, the first and the last among them."""
    count = one.values.shape[one.axes.index("step")]
    kept = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))
    coords = {
        name: (along, [values[i] for i in kept] if along == ("step",) else values)
        for name, (along, values) in one.coords.items()
    }
    return replace(one, values=one.values.take(kept, one.axes.index("step")), coords=coords)


def place(entry: Mapping[str, Any]) -> tuple[str, str, int]:
    return entry["variant"], entry["prompt"], entry["seed"]


def told(entry: Mapping[str, Any]) -> str:
    return f"{entry['variant']} · {entry['prompt']} · seed {entry['seed']}"


def opened(file: Path) -> "Image.Image | None":
    """A picture in RGB, None for one that is missing."""
    from PIL import Image

    if not file.is_file():
        return None
    with Image.open(file) as image:
        return image.convert("RGB")


def _drawn(
    run: Run, found: Sequence[View], n: int, prompt: str, entries: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Path, bytes]]:
    """Sheets and films of a prompt. Every file of arrays is opened once, and only means of it are kept."""
    images = [opened(run.image(*place(entry))) for entry in entries]
    sheets: dict[View, list[Captured]] = {view: [] for view in found}
    films: dict[View, list[Captured]] = {view: [] for view in found}
    for entry in entries:
        captured = run.captured(*place(entry))
        for view in found:
            maps = view.maps(captured)
            sheets[view].append(fold(maps.mean("step")))
            films[view].append(thin(maps, MOST_FRAMES).mean("block"))
    for view in found:
        # one scale a word for all variants, or their sheets could not be laid beside each other
        highest = np.max([np.nan_to_num(one.values).max((0, 2, 3)) for one in sheets[view]], 0)
        side = max(sheets[view][0].values.shape[2:])
        cell = side * max(1, CELL // side)
        for entry, one, image in zip(entries, sheets[view], images, strict=True):
            title = f"{told(entry)}\n{view.title}, mean over steps"
            page = draw.sheet(one, image=image, highest=highest, cell=cell, title=title)
            yield run.path / FOLDER / f"{entry['cell']}{view.suffix}.png", _png(page)
        if len(films[view][0].labels("step")) > 1:
            film = _beside(films[view], [entry["variant"] for entry in entries])
            title = f"{prompt} · seed {entries[0]['seed']}\n{view.title}, mean over blocks"
            under = [images] * len(film.labels("step"))
            frames = draw.frames(film, columns="variant", images=under, cell=cell, title=title)
            yield run.path / FOLDER / f"steps-{n}{view.suffix}.gif", draw.gif_bytes(frames, seconds=SECONDS)


def _beside(parts: Sequence[Captured], variants: Sequence[str]) -> Captured:
    first = parts[0]
    coords = {**first.coords, "variant": (("variant",), list(variants))}
    return replace(first, values=np.stack([one.values for one in parts]), axes=("variant", *first.axes), coords=coords)


def _png(picture: "Image.Image") -> bytes:
    content = io.BytesIO()
    picture.save(content, "png")
    return content.getvalue()
