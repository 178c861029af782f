"""Scenes: the content of an image, sampled with a seeded generator, and its rendering.

A scene has one thing, with or without a sign, or two things in a relation. Positions are on a grid of 2 px and text on
a grid of 4 px, to limit variation that the model would have to learn but that no caption describes.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fluxlab.errors import UserError
from fluxlab.scenes.font import WORDS, text_mask, text_size
from fluxlab.scenes.shapes import THINGS, thing_mask

COLOURS = {
    "red": (220, 35, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 225),
    "yellow": (250, 220, 40),
    "purple": (150, 45, 190),
    "orange": (250, 130, 20),
}
BACKGROUNDS = {
    "slate": (84, 96, 112),
    "mist": (160, 182, 200),
    "sage": (150, 170, 150),
    "sand": (198, 184, 160),
    "stone": (128, 128, 128),
}
BOARD, INK = (250, 248, 240), (24, 22, 30)
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("above", "below", "left of", "right of")
SPLITS = ("train", "heldout", "all")
SIZES = ((64, 64), (48, 80), (80, 48), (64, 48), (48, 64), (80, 64), (64, 80), (72, 56), (56, 72), (48, 48))
THING_SIZES = (20, 22, 24)  # px, side of the bounding box
BORDER = 2  # px from the text to the edge of the board: 1 px margin, 1 px outline


@dataclass(frozen=True)
class Thing:
    """A coloured thing: the centre (row, col) and side of its box in pixels. `place` is None in a scene with two."""

    name: str
    colour: str
    place: str | None
    row: float
    col: float
    size: int


@dataclass(frozen=True)
class Sign:
    """A sign with one word per line. row, col: top left corner of the text. stick: (top, bottom, left), 2 px wide.

    All are in pixels.
    """

    words: tuple[str, ...]
    row: int
    col: int
    stick: tuple[int, int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The board as (top, left, bottom, right) in pixels. Bottom and right are exclusive."""
        height, width = text_size(self.words)
        return self.row - BORDER, self.col - BORDER, self.row + height + BORDER, self.col + width + BORDER


@dataclass(frozen=True)
class Scene:
    """The content of an image. size: (height, width) in pixels. relation: position of thing 1 relative to thing 2."""

    size: tuple[int, int]
    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    sign: Sign | None = None


def check_size(size: tuple[int, int]) -> None:
    """Raise `UserError` unless size is (height, width), both multiples of 4 from 48 to 80."""
    if len(size) != 2 or any(side % 4 or not 48 <= side <= 80 for side in size):
        raise UserError(f"size={size!r}: expected (height, width), both multiples of 4 from 48 to 80 pixels")


@lru_cache(maxsize=65536)
def _hashed_out(*words: str) -> bool:
    return hashlib.sha256(" ".join(words).encode()).digest()[0] % 8 == 0


def held_out(scene: Scene) -> bool:
    """Return whether a scene is held out from training: 1/8 of (colour, thing, first word of the sign), and of pairs.

    The decision is a hash of these words (in a pair: of both colours and things), so that it does not depend on seeds
    or versions. A single thing without a sign is never held out.
    """
    first = scene.things[0]
    if scene.sign:
        return _hashed_out(first.colour, first.name, scene.sign.words[0])
    if len(scene.things) == 2:
        second = scene.things[1]
        return _hashed_out(first.colour, first.name, second.colour, second.name)
    return False


def place_of(row: float, col: float, size: tuple[int, int]) -> str:
    """Return the named place of a point in pixels: centre within 1/8 of the image, else the side nearest to it."""
    down, right = row / size[0] - 0.5, col / size[1] - 0.5
    if max(abs(down), abs(right)) <= 0.125:
        return "centre"
    if abs(down) > abs(right):
        return "top" if down < 0 else "bottom"
    return "left" if right < 0 else "right"


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Return the position of the first (row, col) point relative to the second."""
    down, right = first[0] - second[0], first[1] - second[1]
    if abs(down) > abs(right):
        return "above" if down < 0 else "below"
    return "left of" if right < 0 else "right of"


def _clear(row: float, col: float, size: tuple[int, int], place: str) -> bool:
    """Return whether a point, and every point within 1.5 px of it, has this named place."""
    return all(place_of(row + dr, col + dc, size) == place for dr in (-1.5, 0, 1.5) for dc in (-1.5, 0, 1.5))


@lru_cache(maxsize=4096)
def boxes(size: tuple[int, int], place: str, side: int) -> tuple[tuple[int, int], ...]:
    """Return the top left corners of square boxes of `side` pixels at a named place, on a grid of 2 px."""
    height, width = size
    middle_row, middle_col = (height - side) // 4 * 2, (width - side) // 4 * 2
    around = (-4, -2, 0, 2, 4)
    rows, cols = [middle_row + d for d in around], [middle_col + d for d in around]
    near = (2, 4, 6)
    if place in ("left", "right"):
        cols = [d if place == "left" else width - side - d for d in near]
    elif place in ("top", "bottom"):
        rows = [d if place == "top" else height - side - d for d in near]
    else:
        rows = [middle_row - 6, *rows]
    return tuple((r, c) for r in rows for c in cols if _clear(r + side / 2, c + side / 2, size, place))


@lru_cache(maxsize=65536)
def _layouts(
    size: tuple[int, int], place: str, side: int, lines: int, letters: int
) -> tuple[tuple[int, int, int, int, tuple], ...]:
    """Return every (box row, box col, text row, text col, stick) of a thing and its sign at a place."""
    height, width = size
    text_h, text_w = 8 * lines - 1, 4 * letters - 1
    layouts = []
    for r, c in boxes(size, place, side):
        if place in ("left", "right"):  # next to the thing, slightly raised
            x = -(-(c + side + BORDER) // 4) * 4 if place == "left" else (c - BORDER - text_w) // 4 * 4
            y = round((r + side - 6 - BORDER - text_h) / 4) * 4
            stick_col = x + 2 if place == "left" else x + text_w - 4
            stick = (y + text_h + BORDER, r + side, stick_col)
        elif place == "bottom":  # above the thing
            x, y = round((c + side / 2 - text_w / 2) / 4) * 4, (r - 2 - BORDER - text_h) // 4 * 4
            stick = (y + text_h + BORDER, r + side // 2 - 2, c + side // 2 - 1)
        else:  # below the thing
            x, y = round((c + side / 2 - text_w / 2) / 4) * 4, -(-(r + side + 2 + BORDER) // 4) * 4
            stick = (r + side // 2 + 4, y - BORDER, c + side // 2 - 1)
        x = min(max(x, 4), (width - text_w - BORDER) // 4 * 4) if place not in ("left", "right") else x
        inside = x >= BORDER and y >= BORDER and x + text_w + BORDER <= width and y + text_h + BORDER <= height
        if inside and stick[0] < stick[1] <= height:
            layouts.append((r, c, y, x, stick))
    return tuple(layouts)


@lru_cache(maxsize=4096)
def _pair_boxes(
    size: tuple[int, int], axis: int, side: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Return corners in the first and in the second half of an axis (0 rows, 1 columns), at least 2 px apart."""
    along, across = size[axis], size[1 - axis]
    free = (along - 2 * side - 2) // 2  # px that are free in each half
    steps = [d for d in (0, 2, 4, 6) if d <= free]
    start = max(0, (along // 2 - side - 1) // 2 // 2 * 2 - 4)
    firsts = [start + d for d in steps if start + d + side + 1 <= along // 2]
    seconds = [along - side - p for p in firsts]
    middles = [(across - side) // 4 * 2 + d for d in (-4, -2, 0, 2, 4)]

    def corners(positions):
        return tuple((p, m) if axis == 0 else (m, p) for p in positions for m in middles)

    return corners(firsts), corners(seconds)


def pick(rng: np.random.Generator, options):
    return options[int(rng.random() * len(options))]


_COLOUR_NAMES, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)


def _sample_pair(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    relation, side = pick(rng, RELATIONS), pick(rng, (20, 22))
    axis = 0 if relation in ("above", "below") else 1
    if 2 * side + 4 > size[axis]:
        side = 20
    low, high = (pick(rng, corners) for corners in _pair_boxes(size, axis, side))
    corners = (low, high) if relation in ("above", "left of") else (high, low)
    names, colours = [pick(rng, THINGS)], [pick(rng, _COLOUR_NAMES)]
    names.append(pick(rng, [n for n in THINGS if n != names[0]]))
    colours.append(pick(rng, [c for c in _COLOUR_NAMES if c != colours[0]]))
    things = tuple(
        Thing(n, k, None, r + side / 2, c + side / 2, side)
        for n, k, (r, c) in zip(names, colours, corners, strict=True)
    )
    return Scene(size, pick(rng, _BACKGROUND_NAMES), things, relation)


def _sample_words(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    if count == 1:
        return (pick(rng, WORDS),)
    if rng.random() < 0.4:
        return ("hello", "world")
    first = pick(rng, WORDS)
    return first, pick(rng, [w for w in WORDS if w != first])


def _sample_one(rng: np.random.Generator, size: tuple[int, int], words: tuple[str, ...]) -> Scene:
    name, colour, background = pick(rng, THINGS), pick(rng, _COLOUR_NAMES), pick(rng, _BACKGROUND_NAMES)
    while True:  # a large or centred thing leaves no room for some signs at some image sizes
        place, side = pick(rng, PLACES), pick(rng, THING_SIZES)
        if not words:
            r, c = pick(rng, boxes(size, place, side))
            sign = None
            break
        layouts = _layouts(size, place, side, len(words), max(map(len, words)))
        if layouts:
            r, c, y, x, stick = pick(rng, layouts)
            sign = Sign(words, y, x, stick)
            break
    return Scene(size, background, (Thing(name, colour, place, r + side / 2, c + side / 2, side),), None, sign)


def sample_scene(rng: np.random.Generator, size: tuple[int, int] = (64, 64), split: str = "train") -> Scene:
    """A scene at random: 52 % a thing with a one-word sign, 25 % with two words (of these 40 % "hello world"), 9 % a
    lone thing, 14 % two things in a relation.

    size is (height, width) in pixels; split is "train" (nothing held out), "heldout" (nothing else) or "all".
    Raises UserError for a size that is not a multiple of 4 from 48 to 80 and for an unknown split.
    """
    size = (int(size[0]), int(size[1])) if len(size) == 2 else size
    check_size(size)
    if split not in SPLITS:
        raise UserError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    while True:
        kind = rng.random()
        if kind < 0.14:
            scene = _sample_pair(rng, size)
        else:
            scene = _sample_one(rng, size, () if kind < 0.23 else _sample_words(rng, 1 if kind < 0.75 else 2))
        if split == "all" or held_out(scene) == (split == "heldout"):
            return scene


def render(scene: Scene, small_d: bool = False, scale: int = 1) -> np.ndarray:
    """Return the image of a scene: uint8 (height, width, 3), RGB, flat colours, without antialiasing.

    small_d: as for `text_mask`. scale: draw the scene at this many times its size, a whole number. Things are drawn
    anew, with finer outlines; the pixels of the sign become larger.

    Raises `UserError` if a thing or the sign is not completely inside the image, and for an unknown name.
    """
    height, width = (side * scale for side in scene.size)
    if scene.background not in BACKGROUNDS:
        raise UserError(f"background={scene.background!r}: expected one of {', '.join(BACKGROUNDS)}")
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    if scene.sign:
        top, left, bottom, right = scene.sign.box
        if top < 0 or left < 0 or bottom > scene.size[0] or right > scene.size[1]:
            raise UserError(f"sign={scene.sign!r}: not completely inside the image of {height} x {width} pixels")
        start, stop, col = scene.sign.stick
        image[start * scale : stop * scale, col * scale : (col + 2) * scale] = INK
    for thing in scene.things:
        if thing.colour not in COLOURS:
            raise UserError(f"colour={thing.colour!r}: expected one of {', '.join(COLOURS)}")
        side = thing.size * scale
        mask = thing_mask(thing.name, side)
        r, c = (round(middle - thing.size / 2) * scale for middle in (thing.row, thing.col))
        if r < 0 or c < 0 or r + side > height or c + side > width:
            raise UserError(f"thing={thing!r}: not completely inside the image of {height} x {width} pixels")
        image[r : r + side, c : c + side][mask] = COLOURS[thing.colour]
    if scene.sign:
        board = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
        board[:] = INK
        board[1:-1, 1:-1] = BOARD
        board[BORDER:-BORDER, BORDER:-BORDER][text_mask(scene.sign.words, small_d)] = INK
        large = board.repeat(scale, 0).repeat(scale, 1)
        image[top * scale : bottom * scale, left * scale : right * scale] = large
    return image
