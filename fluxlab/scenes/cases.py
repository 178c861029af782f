"""Drawn scenes with what inpainting and upscaling need: an image, a mask, the image to compare with, and a prompt.

Each part of a case has a name such as `scene:exchange/12@1/image`, which stands for a file wherever an experiment takes
the path of an image. The same name gives the same pixels on every machine.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fluxlab.errors import UserError, nearest
from fluxlab.scenes.captions import wanted_of, write
from fluxlab.scenes.scene import COLOURS, Thing, render, sample_scene
from fluxlab.scenes.shapes import THINGS

SIDE, CELL = 64, 4
"""Side of a scene in pixels. Holes are multiples of `CELL` pixels, which is a whole number of tokens."""

MARGIN = 2
"""Pixels between a thing and the border of its hole, at least."""

DOUBLED_SIDE = 48
"""Side in pixels of the scenes of which twice the size is beyond the embedded model's own, `SIDE`."""


@dataclass(frozen=True)
class Case:
    """A scene as images uint8 `(H, W, 3)`, with the caption that asks for `target`.

    image: what is given. mask: boolean `(H, W)`, where it is sampled again; None without inpainting. target: the image
    that the prompt asks for. asked: the thing that the mask asks for. source_prompt: the caption of `image`. side: of
    the scene in pixels, at which its font is one that the oracle reads.
    """

    number: int
    prompt: str
    image: np.ndarray
    target: np.ndarray
    mask: np.ndarray | None = None
    asked: Thing | None = None
    source_prompt: str = ""
    side: int = SIDE


def exchange(number: int, scale: int = 1) -> Case:
    """Return a scene with one thing to exchange for another. Odd numbers have two things, even ones one.

    The mask is the box of the thing. The new thing differs in name and colour from every thing of the scene.
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
    mask, half = np.zeros((SIDE, SIDE), bool), before.size / 2 + MARGIN
    rows, cols = (
        slice(max(0, int((middle - half) // CELL) * CELL), int(-(-(middle + half) // CELL)) * CELL)
        for middle in (before.row, before.col)
    )
    mask[rows, cols] = True
    image, target = (render(one, scale=scale) for one in (scene, after))
    mask = mask.repeat(scale, 0).repeat(scale, 1)
    return Case(number, write(wanted_of(after)), image, target, mask, asked, write(wanted_of(scene)))


def halved(number: int, scale: int = 1) -> Case:
    """Return a scene that was held out from training. image: reduced to half its size by averaging."""
    from PIL import Image

    scene = sample_scene(np.random.default_rng([SIDE, number]), (SIDE, SIDE), "heldout")
    target = render(scene, scale=scale)
    return Case(number, write(wanted_of(scene)), np.asarray(Image.fromarray(target).reduce(2)), target)


def doubled(number: int, scale: int = 1) -> Case:
    """Return a smaller scene that was held out from training. target: the scene drawn at twice its size."""
    scene = sample_scene(np.random.default_rng([DOUBLED_SIDE, number]), (DOUBLED_SIDE, DOUBLED_SIDE), "heldout")
    image, target = (render(scene, scale=times * scale) for times in (1, 2))
    return Case(number, write(wanted_of(scene)), image, target, side=DOUBLED_SIDE)


KINDS: dict[str, Callable[[int, int], Case]] = {"exchange": exchange, "halved": halved, "doubled": doubled}
"""The kinds of cases. The same number gives the same case. scale: how many times as large it is drawn."""

PARTS = ("image", "mask", "target")
_NAME = re.compile(rf"scene:({'|'.join(KINDS)})/(\d+)@([1-9]\d*)/({'|'.join(PARTS)})")


@lru_cache(maxsize=64)
def case(kind: str, number: int, scale: int = 1) -> Case:
    """Return a case. Raises `UserError` for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"scenes.kind={kind}: expected {', '.join(KINDS)}{nearest(kind, KINDS)}")
    return KINDS[kind](number, scale)


def cases(kind: str, count: int, scale: int = 1) -> list[Case]:
    """Return the first `count` cases with different prompts."""
    found: dict[str, Case] = {}
    number = 0
    while len(found) < count:
        one = case(kind, number, scale)
        found.setdefault(one.prompt, one)
        number += 1
    return list(found.values())


def is_name(path: str) -> bool:
    """Return whether a path is the name of a part of a case."""
    return path.startswith("scene:")


def parsed(name: str) -> tuple[str, int, int, str]:
    """Return kind, number, scale and part of a name. Raises `UserError` for a wrong one."""
    found = _NAME.fullmatch(name)
    if not found:
        raise UserError(f"{name}: expected a name such as scene:exchange/12@1/image")
    kind, number, scale, part = found.groups()
    return kind, int(number), int(scale), part


def part_of(name: str) -> np.ndarray:
    """Return the pixels of a name: uint8 `(H, W, 3)`, or boolean `(H, W)` for a mask."""
    kind, number, scale, part = parsed(name)
    values = getattr(case(kind, number, scale), part)
    if values is None:
        raise UserError(f"{name}: scenes of the kind {kind} have no {part}")
    return values


def names_of(kind: str, one: Case, scale: int) -> dict[str, str]:
    """Return the names of the parts that a case has, by part."""
    return {part: f"scene:{kind}/{one.number}@{scale}/{part}" for part in PARTS if getattr(one, part) is not None}
