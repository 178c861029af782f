"""Scenes in which one thing is exchanged for another one: what `experiments.inpaint` measures, and how."""

from dataclasses import dataclass, replace

import numpy as np

from fluxlab.measure.oracle import inspect
from fluxlab.scenes import COLOURS, THINGS, Thing, render, sample_scene
from fluxlab.scenes.captions import wanted_of, write

SIDE, CELL = 64, 4
"""Side of a scene in pixels. Holes are multiples of `CELL` pixels, which is a whole number of tokens."""

MARGIN = 2
"""Pixels between a thing and the border of its hole, at least."""

MEASURES = {
    "object": "a thing in the hole",
    "colour": "with the colour",
    "asked": "the thing asked for",
    "asked_one": "of scenes with one thing",
    "asked_two": "of scenes with two",
    "psnr_outside": "PSNR outside, dB",
    "seam": "step at the border",
    "spread": "std of known tokens",
}


@dataclass(frozen=True)
class Case:
    """A scene with one thing exchanged. hole: `(SIDE, SIDE)`, True where the image is sampled again.

    given, drawn: of that size, or a multiple of it.
    """

    number: int
    given: np.ndarray
    drawn: np.ndarray
    hole: np.ndarray
    source_prompt: str
    prompt: str
    asked: Thing


def case(number: int, scale: int = 1) -> Case:
    """Return a scene, one of its things as the hole, and the prompt for another thing there. Odd ones have two things.

    The same number gives the same case. The new thing differs in name and colour from every thing of the scene. scale:
    how many times as large the images are drawn.
    """
    rng = np.random.default_rng([64, number])
    while True:
        scene = sample_scene(rng, (SIDE, SIDE), "all")
        if len(scene.things) == 1 + number % 2:
            break
    which = int(rng.integers(len(scene.things)))
    before = scene.things[which]
    others = [
        [name for name in known if name not in used]
        for known, used in (
            (THINGS, [thing.name for thing in scene.things]),
            (COLOURS, [thing.colour for thing in scene.things]),
        )
    ]
    name, colour = (known[int(rng.integers(len(known)))] for known in others)
    asked = replace(before, name=name, colour=colour)
    after = replace(scene, things=(*scene.things[:which], asked, *scene.things[which + 1 :]))
    hole, half = np.zeros((SIDE, SIDE), bool), before.size / 2 + MARGIN
    rows, cols = (
        slice(max(0, int((middle - half) // CELL) * CELL), int(-(-(middle + half) // CELL)) * CELL)
        for middle in (before.row, before.col)
    )
    hole[rows, cols] = True
    given, drawn = (render(one, scale=scale) for one in (scene, after))
    return Case(number, given, drawn, hole, write(wanted_of(scene)), write(wanted_of(after)), asked)


def scores(image: np.ndarray, one: Case, oracle: bool = True) -> dict[str, float]:
    """Return the `MEASURES` that an image has. The oracle reads it at the size of the scene, or not at all."""
    scale = image.shape[0] // SIDE
    outside = ~one.hole.repeat(scale, 0).repeat(scale, 1)
    times = len(image) // len(one.given)
    given = one.given.repeat(times, 0).repeat(times, 1)
    error = max(1e-10, ((image[outside] / 255 - given[outside] / 255) ** 2).mean())  # at most 100 dB
    pixels = {"psnr_outside": float(-10 * np.log10(error)), "seam": seam(image, ~outside)}
    return (_read(image, one, scale) if oracle else {}) | pixels


def _read(image: np.ndarray, one: Case, scale: int) -> dict[str, float]:
    """Return what the oracle finds in the hole."""
    from PIL import Image

    small = np.asarray(Image.fromarray(image).reduce(scale)) if scale > 1 else image
    things = [found for found in inspect(small, one.prompt).things if one.hole[tuple(map(int, found.centre))]]
    coloured = [found for found in things if found.colour == one.asked.colour]
    asked = float(any(found.name == one.asked.name for found in coloured))
    return {
        "object": float(bool(things)),
        "colour": float(bool(coloured)),
        "asked": asked,
        ("asked_two" if one.number % 2 else "asked_one"): asked,
    }


def seam(image: np.ndarray, hole: np.ndarray) -> float:
    """Return the median difference of neighbouring pixels on both sides of the border of a hole, in 0 … 1.

    The median is that of the background, as long as things cross less than half of the border.
    """
    steps = []
    for axis in (0, 1):
        across = np.diff(hole.astype(int), axis=axis) != 0
        steps.append(np.abs(np.diff(image / 255, axis=axis))[across].mean(-1))
    return float(np.median(np.concatenate(steps)))
