"""The scene oracle: what a picture shows, against what its caption asks for. No learning in it.

Every pixel takes the nearest colour of the palette the scenes are drawn in. Coloured pixels that hang together are a
thing; its name is the silhouette it overlaps most at its own size. The largest light board is the sign; its lines are
matched with every word the signs can say, and cell by cell with every letter.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fluxlab.measure.palette import COLOUR_LABELS, labels_of, pixels_of
from fluxlab.measure.regions import Box, areas, bounds, components, middle
from fluxlab.measure.sign import FoundSign, find_sign
from fluxlab.scenes.captions import Wanted, parse
from fluxlab.scenes.scene import COLOURS, place_of, relation_of
from fluxlab.scenes.shapes import THINGS, thing_mask

ATTRIBUTES = ("object", "colour", "shape", "place", "relation", "sign", "word")
MIN_AREA = 40  # px of a coloured patch to be looked at: a fifth of the smallest thing's silhouette
MIN_IOU = 0.55  # overlap with the best silhouette for a patch to count as a thing; a render has 1, a blob about 0.5

_COLOUR_NAMES = tuple(COLOURS)
_CANVAS = 48  # side in px on which silhouettes are compared


@dataclass(frozen=True)
class FoundThing:
    """A coloured thing in a picture; all lengths in pixels.

    row and col are its centroid; box is (top, left, bottom, right), ends excluded; size is the box's longer side; place
    is named by the middle of the box; iou is the overlap with the silhouette of `name`, at most 1.
    """

    name: str
    colour: str
    place: str
    row: float
    col: float
    size: int
    area: int
    iou: float
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (row, col)."""
        return middle(self.box)


@dataclass(frozen=True)
class Report:
    """What was found, and for each attribute whether it is as asked: None where the caption does not say.

    object: as many things are there as asked for; shape: they are the ones asked for; colour: theirs; place: the one
    thing is where it should be; relation: the first is on the right side of the second; sign: there is a board if and
    only if one is asked for; word: it says exactly the words asked for; words: the same for each word; letter_accuracy:
    the share of letters that are right on their own, unaided by the list of words. Without a thing, colour, shape,
    place and relation are False; without a board, word is False and letter_accuracy 0.
    things are sorted as asked for (first, then second), any others after them, largest first.
    """

    wanted: Wanted
    things: tuple[FoundThing, ...]
    board: FoundSign | None
    object: bool | None
    colour: bool | None
    shape: bool | None
    place: bool | None
    relation: bool | None
    sign: bool | None
    word: bool | None
    words: tuple[bool, ...]
    letter_accuracy: float | None

    @property
    def wrong(self) -> tuple[str, ...]:
        """The names of the attributes that are not as asked."""
        return tuple(name for name in ATTRIBUTES if getattr(self, name) is False)


def _centred(mask: np.ndarray) -> np.ndarray:
    """A mask, cropped to what it holds, in the middle of the canvas; it must fit."""
    top, left, bottom, right = bounds(mask)
    canvas = np.zeros((_CANVAS, _CANVAS), dtype=np.float32)
    y, x = (_CANVAS - bottom + top) // 2, (_CANVAS - right + left) // 2
    canvas[y : y + bottom - top, x : x + right - left] = mask[top:bottom, left:right]
    return canvas


@lru_cache(maxsize=64)
def _silhouettes(longer: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Silhouettes about `longer` px in their longer side, (n, canvas²), and the thing each is of."""
    masks, names = [], []
    for name in THINGS:
        for side in range(longer - 1, longer + 4):
            mask = thing_mask(name, side)
            top, left, bottom, right = bounds(mask)
            if abs(max(bottom - top, right - left) - longer) <= 1:
                masks.append(_centred(mask).ravel())
                names.append(name)
    return np.stack(masks), tuple(names)


def _name(mask: np.ndarray) -> tuple[str, float]:
    """The thing whose silhouette a mask overlaps most, and the overlap as intersection over union."""
    top, left, bottom, right = bounds(mask)
    mask, longer = mask[top:bottom, left:right], max(bottom - top, right - left)
    if not 12 <= longer <= 40:  # to a common size, nearest pixel
        scale, longer = longer / 24, 24
        rows, cols = (np.arange(max(1, round(side / scale))) for side in mask.shape)
        pick = ((np.arange(len(k)) + 0.5) * side / len(k) for k, side in zip((rows, cols), mask.shape, strict=True))
        mask = mask[np.ix_(*(p.astype(int) for p in pick))]
        if not mask.any():
            return THINGS[0], 0.0
    canvas = _centred(mask)
    shifted = np.stack([np.roll(canvas, (dy, dx), (0, 1)).ravel() for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    templates, names = _silhouettes(longer)
    both = shifted @ templates.T
    overlap = both / (shifted.sum(1)[:, None] + templates.sum(1)[None] - both)
    best = int(overlap.max(0).argmax())
    return names[best], float(overlap[:, best].max())


def _patches(labels: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Masks of coloured pixels that hang together, with the colour most of them have, largest first.

    Where two colours each have a quarter of a patch they are two patches; less than that is a blurred edge.
    """
    numbered, count = components(labels < COLOUR_LABELS)
    found = []
    for index in np.flatnonzero(areas(numbered, count) >= MIN_AREA):
        mask = numbered == index
        shares = np.bincount(labels[mask], minlength=COLOUR_LABELS) / mask.sum()
        major = np.flatnonzero(shares >= 0.25)
        if len(major) < 2:
            found.append((mask, int(shares.argmax())))
            continue
        for colour in major:
            parts, number = components(mask & (labels == colour))
            found.append((parts == areas(parts, number).argmax(), int(colour)))
    found.sort(key=lambda patch: -patch[0].sum())
    return [(mask, _COLOUR_NAMES[colour]) for mask, colour in found[:8] if mask.sum() >= MIN_AREA]


def _find_things(labels: np.ndarray) -> list[FoundThing]:
    things = []
    for mask, colour in _patches(labels):
        name, iou = _name(mask)
        if iou >= MIN_IOU:
            box = bounds(mask)
            place = place_of(*middle(box), mask.shape)
            rows, cols = np.nonzero(mask)  # a pixel's centre is half a pixel in
            centroid = float(rows.mean()) + 0.5, float(cols.mean()) + 0.5
            size = max(box[2] - box[0], box[3] - box[1])
            things.append(FoundThing(name, colour, place, *centroid, size, int(mask.sum()), iou, box))
    return things


def _letter_accuracy(wanted: tuple[str, ...], read: tuple[str, ...]) -> float:
    right = 0
    for line, word in enumerate(wanted):
        seen = read[line] if line < len(read) else ""
        right += sum(a == b for a, b in zip(word, seen.ljust(len(word)), strict=False))
    return right / sum(map(len, wanted))


def _ordered(things: list[FoundThing], wanted: Wanted) -> list[FoundThing]:
    """The two largest things in the order that matches more names and colours; of equals, the relation asked for."""
    if not wanted.relation or len(things) < 2:
        return things

    def agreement(pair):
        first, second = pair
        matches = (first.name == wanted.thing) + (second.name == wanted.second)
        matches += (first.colour == wanted.colour) + (second.colour == wanted.second_colour)
        return matches, relation_of(first.centre, second.centre) == wanted.relation

    one, two, *others = things
    return [*max(((one, two), (two, one)), key=agreement), *others]


def inspect(image, wanted: str | Wanted) -> Report:
    """What a picture shows against what is asked for.

    image: uint8 (H, W, 3) in 0 ... 255, floats (H, W, 3) in 0 ... 1, or a PIL image; any content, noise included.
    wanted: a caption or what `fluxlab.scenes.parse` makes of one. All lengths in the report are pixels of the image.
    Raises UserError for an image of another shape or kind, and for a caption outside the grammar.
    """
    wanted = parse(wanted) if isinstance(wanted, str) else wanted
    pixels = pixels_of(image)
    labels = labels_of(pixels)
    things = _ordered(_find_things(labels), wanted)
    board = find_sign(pixels, labels)
    asked = 0 if wanted.thing is None else 2 if wanted.relation else 1
    there = things[:asked]
    complete = len(there) == asked if asked else None
    names = (wanted.thing, wanted.second)[:asked]
    colours = [(k, t.colour) for k, t in zip((wanted.colour, wanted.second_colour)[:asked], there, strict=False) if k]
    says_colour = any((wanted.colour, wanted.second_colour))
    said = wanted.sign or ()
    read = board.words if board else ()
    return Report(
        wanted=wanted,
        things=tuple(things),
        board=board,
        object=complete,
        colour=bool(complete) and all(k == c for k, c in colours) if says_colour else None,
        shape=complete and all(t.name == n for t, n in zip(there, names, strict=True)) if asked else None,
        place=bool(there) and there[0].place == wanted.place if wanted.place else None,
        relation=bool(complete) and relation_of(there[0].centre, there[1].centre) == wanted.relation
        if wanted.relation
        else None,
        sign=(board is not None) == bool(said) if asked else None,
        word=read == said if said else None,
        words=tuple(i < len(read) and read[i] == w for i, w in enumerate(said)),
        letter_accuracy=_letter_accuracy(said, board.letters if board else ()) if said else None,
    )


def tally(reports: Iterable[Report]) -> dict[str, tuple[int, int]]:
    """For each attribute, in how many reports it is as asked and in how many it was asked for."""
    reports = list(reports)
    verdicts = {name: [v for r in reports if (v := getattr(r, name)) is not None] for name in ATTRIBUTES}
    return {name: (sum(found), len(found)) for name, found in verdicts.items()}
