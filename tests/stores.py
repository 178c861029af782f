"""Finished stores without a model: rendered scenes replace generated images, and edits blur or move them."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from fluxlab.config import ModelRow
from fluxlab.experiment import effects
from fluxlab.experiment.captures import write_index
from fluxlab.experiment.cells import Cell, Settings, cells, references
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment, checked, read_variants
from fluxlab.experiment.store import CELLS, REFERENCES, Store, open_store
from fluxlab.probes import Capture, Captured, Request
from fluxlab.sampling.schedule import Schedule
from fluxlab.scenes import parse, render, sample_scene

PROMPTS = ("A cat holding a sign that says hello world", "a red fox on the left holding a sign that says open cafe")
VARIANTS = {"zero": {"a": {"op": "zero"}}, "half": {"a": {"op": "scale", "factor": 0.5}}}
ARTICLE = {
    **VARIANTS,
    "double": {"a": {"op": "scale", "factor": 2}},
    "stretch": {"a": {"op": "scale", "factor": 1.2}},
    "axis0": {"a": {"op": "set", "value": 1, "axes": "index"}},
}
"""The edits of configs/exp/article.yaml. With four seeds the store has its size."""

VERSIONS = {
    "fluxlab": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "python": "3.11.2",
    "torch": "2.9.0",
    "machine": "Linux x86_64, AVX2",
}


def make_store(
    path: Path,
    variants: Mapping[str, Any] = VARIANTS,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0, 1),
    size: tuple[int, int] = (64, 64),
    attention: Mapping[str, Any] | str | None = None,
    skip: Callable[[Cell], bool] = lambda cell: False,
    **changes: Any,
) -> Path:
    """Write a store as a run does, without grid.png and report.html. Deterministic; takes about a second.

    variants: programs by name; a baseline with none is added where no variant of that name is there. size: (height,
    width) of the pictures in pixels; the scenes are drawn at 64 × 64 and enlarged. changes: other fields of
    `Experiment`, such as name or caption, and versions and command. attention: a capture, whose arrays are made up.
    """
    baseline = changes.get("baseline", "baseline")
    asked = checked(
        Experiment(
            **{
                "name": "test",
                "caption": "edits of scenes",
                "model": ModelRow("tiny", "fluxlab/assets/tiny", scenes=True),
                "model_digest": "0" * 16,
                "variants": read_variants({baseline: {}, **variants}),
                "prompts": tuple(prompts),
                "seeds": tuple(seeds),
                "capture": Capture.from_config(attention),
                **{key: value for key, value in changes.items() if key not in ("versions", "command")},
            }
        )
    )
    how = settings(size)
    with open_store(Path(path)) as store:
        command = changes.get("command", f"python -m fluxlab.run +exp={asked.name}")
        store.write_experiment(asked, how, changes.get("versions", VERSIONS), command)
        for part, folder in ((cells(asked, how), CELLS), (references(asked, how), REFERENCES)):
            for cell in part:
                if not skip(cell):
                    store.put(cell, picture(cell, size), {"height": size[0], "width": size[1]}, folder)
        if attention:
            put_attention(asked, how, store)
        effects.measure(asked, how, store, effects.load_models(asked))
        store.seal()
    return Path(path)


def every_key(store: Path) -> set[str]:
    """Return the keys of a store's cells, from its table."""
    return {row["cell"] for row in read_store(store).metrics}


STREAMS = ("double", "double", "single", "single", "single", "single")


def put_attention(asked: Experiment, how: Settings, store: Store) -> None:
    """Write arrays and their index as a run with a capture does.

    Every word has a spot that attends to it, most in the middle blocks and late steps. Programs widen the spot.
    """
    for cell in cells(asked, how):
        arrays = {name: one for request in asked.capture.requests for name, one in attended(request, cell, how).items()}
        store.put_arrays(cell, asked.captures, arrays)
    write_index(asked, how, store)


def attended(request: Request, cell: Cell, how: Settings) -> dict[str, Captured]:
    """Return made-up arrays for a request of the kind words, concepts, quadrants, entropy or distance."""
    rng = np.random.default_rng([cell.seed, *hashlib.sha256(cell.prompt.encode()).digest()])
    edited = 1 + 2 * hashlib.sha256(cell.program.digest.encode()).digest()[0] / 255 if cell.program else 0
    sides = how.height // how.pixels_per_token, how.width // how.pixels_per_token
    row, col = np.meshgrid(*map(np.arange, sides), indexing="ij")
    steps, blocks = how.steps, len(STREAMS)
    sharp = np.sin(0.8 * np.pi * (np.arange(blocks) + 1) / (blocks + 1)) * np.linspace(0.3, 1, steps)[:, None]
    sigmas = np.linspace(1, 1 / steps, steps).tolist()
    coords = {"step": (("step",), list(range(steps))), "sigma": (("step",), sigmas)}
    coords |= {"block": (("block",), list(range(blocks))), "stream": (("block",), list(STREAMS))}
    both = ("step", "block")

    def made(values: np.ndarray, axes: tuple[str, ...], unit: str, **labels: Sequence) -> Captured:
        labelled = {**coords, **{axis: ((axis,), list(some)) for axis, some in labels.items()}}
        about = {"request": request.to_config(), "unit": unit}
        return Captured(values.astype(np.float32), (*both, *axes), labelled, about)

    if request.kind == "words":
        words = re.findall(r"[\w'-]+", cell.prompt)
        ways = ["image_to_word", "word_to_image"]
        ways = ways if request.arguments["direction"] == "both" else [request.arguments["direction"]]
        wide = (1 + edited) * max(sides) / 10
        spots = rng.uniform(0.1, 0.9, (len(words), 2)) * sides
        far = np.hypot(row - spots[:, 0, None, None], col - spots[:, 1, None, None])
        narrow = sharp[..., None, None, None]
        heat = (
            narrow * rng.uniform(0.02, 0.3, len(words))[:, None, None] * np.exp(-((far / wide * (0.5 + narrow)) ** 2))
        )
        values = np.stack([heat * share for share in (1, 0.1)[: len(ways)]], 2)
        axes = ("direction", "word", "row", "col")
        grid = {"row": range(sides[0]), "col": range(sides[1])}
        return {request.name: made(values, axes, "probability", direction=ways, word=words, **grid)}
    if request.kind == "concepts":
        words = request.arguments["words"]
        values = rng.dirichlet(np.ones(len(words)), (steps, blocks, *sides)).transpose(0, 1, 4, 2, 3)
        grid = {"row": range(sides[0]), "col": range(sides[1])}
        return {request.name: made(values, ("word", "row", "col"), "share", word=words, **grid)}
    if request.kind == "quadrants":
        text = 0.5 * sharp / (1 + edited)
        values = np.stack((np.stack((1 - text, text), -1), np.stack((text, 1 - text), -1)), 2)
        sides = ["text", "image"]
        return {request.name: made(values, ("from", "to"), "probability", **{"from": sides, "to": sides})}
    if request.kind == "entropy":
        values = (np.log(how.tokens) * (1 - sharp / (2 + edited)))[..., None, None] + 0 * row
        return {request.name: made(values, ("tokens_row", "tokens_col"), "nats")}
    down, right = np.arange(1 - sides[0], sides[0]), np.arange(1 - sides[1], sides[1])
    spread = (1 + edited) * (2 - sharp)[..., None, None]
    histogram = np.exp(-((down[:, None] / spread) ** 2) - (right / spread / 2) ** 2)
    histogram *= 0.8 / histogram.sum((2, 3), keepdims=True)
    offset = made(np.zeros((steps, blocks, 3)), ("offset",), "tokens", offset=["row", "col", "distance"])
    far = {"delta_row": down.tolist(), "delta_col": right.tolist()}
    return {
        f"{request.name}.offset": offset,
        f"{request.name}.histogram": made(histogram, ("delta_row", "delta_col"), "tokens, probability", **far),
    }


def settings(size: tuple[int, int] = (64, 64), **changes: Any) -> Settings:
    """Return the settings of a run of the embedded model on a CPU."""
    values = {
        "model_digest": "0" * 16,
        "height": size[0],
        "width": size[1],
        "steps": 16,
        "schedule": Schedule(use_dynamic_shifting=False).config(),
        "guidance": None,
        "true_cfg": None,
        "negative_prompt": None,
        "max_sequence_length": 24,
        "device": "cpu",
        "dtype": "float32",
        "batch_tokens": 4480,
        "threads": 2,
        "kernel": "sdpa",
        "tokens": size[0] * size[1] // 16 + 24,
        "pixels_per_token": 4,
    }
    return Settings(**{**values, **changes})


def picture(cell: Cell, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return the image of a cell: the scene of the prompt, changed in a way that depends on the program."""
    scene = _scene(cell.prompt, cell.seed)
    if cell.variant == REFERENCE_NAMES[0]:
        scene = scene.copy()
        scene[::7, ::5] ^= 1
    image = Image.fromarray(scene).resize(size[::-1], Image.Resampling.BICUBIC if max(size) > 64 else 0)
    if not cell.program or cell.variant == REFERENCE_NAMES[0]:
        return image
    edit = next(iter(cell.program.to_config().values()))
    if edit["op"] == "zero":
        return image.filter(ImageFilter.GaussianBlur(max(size) / 16))
    steps = hashlib.sha256(cell.program.digest.encode()).digest()
    moved = tuple(side // 32 * (1 + step % 4) for side, step in zip(size, steps, strict=False))
    return Image.fromarray(np.roll(np.asarray(image), moved, (0, 1)))


@lru_cache(maxsize=4096)
def _scene(prompt: str, seed: int) -> np.ndarray:
    """Return a scene as a caption says, at a position that depends on the seed; any scene for other prompts."""
    rng = np.random.default_rng([seed, *hashlib.sha256(prompt.encode()).digest()])
    try:
        wanted = parse(prompt)
    except ValueError:
        return render(sample_scene(rng, split="all"))
    while True:
        scene = sample_scene(rng, split="all")
        sign = scene.sign and (len(scene.sign.words), max(map(len, scene.sign.words)))
        alike = sign == (wanted.sign and (len(wanted.sign), max(map(len, wanted.sign))))
        if alike and scene.relation == wanted.relation and wanted.place in (None, scene.things[0].place):
            break
    names = ((wanted.thing, wanted.colour), (wanted.second, wanted.second_colour))
    things = [
        replace(thing, name=name or thing.name, colour=colour or thing.colour)
        for thing, (name, colour) in zip(scene.things, names, strict=False)
    ]
    return render(replace(scene, things=tuple(things), sign=scene.sign and replace(scene.sign, words=wanted.sign)))
