"""Scenes of a single thing without a sign, in smaller images than those of `scene`."""

import numpy as np

from fluxlab.errors import UserError
from fluxlab.scenes.scene import BACKGROUNDS, COLOURS, PLACES, THING_SIZES, Scene, Thing, boxes, pick
from fluxlab.scenes.shapes import THINGS

SMALL_THING_SIZES = (12, 14)  # px, in images of less than 48 px


def sample_thing(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A scene with one thing at a named place and no sign. size: (height, width), multiples of 4 from 32 to 80 pixels.

    The side of the thing is 12 or 14 px below 48 px, else as in `sample_scene`. Raises UserError for another size.
    """
    if len(size) != 2 or any(side % 4 or not 32 <= side <= 80 for side in size):
        raise UserError(f"size={size!r}: expected (height, width), both multiples of 4 from 32 to 80 pixels")
    size = (int(size[0]), int(size[1]))
    name, colour, background = pick(rng, THINGS), pick(rng, tuple(COLOURS)), pick(rng, tuple(BACKGROUNDS))
    place, side = pick(rng, PLACES), pick(rng, THING_SIZES if min(size) >= 48 else SMALL_THING_SIZES)
    row, col = pick(rng, boxes(size, place, side))
    return Scene(size, background, (Thing(name, colour, place, row + side / 2, col + side / 2, side),))
