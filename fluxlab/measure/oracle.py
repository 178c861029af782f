"""The scene oracle: reads what an image of the embedded model shows and compares it with the caption.

It contains no trained network. Every pixel is assigned the nearest colour of the palette that scenes are drawn in. A
connected region of coloured pixels is a thing; its name is that of the silhouette with the largest overlap at its size.
The largest light board is the sign; its lines are matched with every word that signs can say, and letter by letter.
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

MIN_AREA = 40
"""Smallest area of a coloured region in px: a fifth of the smallest thing's silhouette."""

MIN_IOU = 0.55
"""Smallest overlap with the best silhouette for a region to count as a thing. A render has 1, a blob about 0.5."""

_COLOUR_NAMES = tuple(COLOURS)
_CANVAS = 48  # px; silhouettes are compared on a square of this side


@dataclass(frozen=True)
class FoundThing:
    """A coloured thing in an image. All lengths are in pixels.

    row and col are its centroid. box is (top, left, bottom, right), bottom and right excluded; size is its longer side.
    place is the name of the position of the box's middle. iou is the overlap with the silhouette of `name`, at most 1.
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
    """What the oracle reads in an image, and whether each attribute is as the caption says. None: it does not say.

    object: the number of things. shape: which things they are. colour: their colours. place: the position of the only
    thing. relation: the side of the second thing that the first is on. sign: there is a board if and only if the
    caption has a sign. word: the board says exactly these words; words has the same for each word. letter_accuracy: the
    share of letters that are right, read one by one without the list of words.

    Without a thing, colour, shape, place and relation are False. Without a board, word is False and letter_accuracy 0.
    things has the caption's first and second thing first, then the others, largest first.
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
        """The names of the attributes that differ from the caption."""
        return tuple(name for name in ATTRIBUTES if getattr(self, name) is False)


def _centred(mask: np.ndarray) -> np.ndarray:
    """Return a mask, cropped to its bounding box, in the middle of the canvas. The box must fit."""
    top, left, bottom, right = bounds(mask)
    canvas = np.zeros((_CANVAS, _CANVAS), dtype=np.float32)
    y, x = (_CANVAS - bottom + top) // 2, (_CANVAS - right + left) // 2
    canvas[y : y + bottom - top, x : x + right - left] = mask[top:bottom, left:right]
    return canvas


@lru_cache(maxsize=64)
def _silhouettes(longer: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return silhouettes with a longer side of about `longer` px, (n, canvas²), and the name of the thing of each."""
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
    """Return the thing whose silhouette overlaps a mask most, and the overlap as intersection over union."""
    top, left, bottom, right = bounds(mask)
    mask, longer = mask[top:bottom, left:right], max(bottom - top, right - left)
    if not 12 <= longer <= 40:  # resize by nearest pixel, so that silhouettes of one size serve
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


def _coloured_regions(labels: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Return the masks of connected coloured pixels with the colour that most of them have, largest first.

    A region in which two colours have a quarter of the pixels each is split. A smaller share is a blurred edge.
    """
    numbered, count = components(labels < COLOUR_LABELS)
    regions = []
    for index in np.flatnonzero(areas(numbered, count) >= MIN_AREA):
        mask = numbered == index
        shares = np.bincount(labels[mask], minlength=COLOUR_LABELS) / mask.sum()
        major = np.flatnonzero(shares >= 0.25)
        if len(major) < 2:
            regions.append((mask, int(shares.argmax())))
            continue
        for colour in major:
            parts, number = components(mask & (labels == colour))
            regions.append((parts == areas(parts, number).argmax(), int(colour)))
    regions.sort(key=lambda region: -region[0].sum())
    return [(mask, _COLOUR_NAMES[colour]) for mask, colour in regions[:8] if mask.sum() >= MIN_AREA]


def _find_things(labels: np.ndarray) -> list[FoundThing]:
    things = []
    for mask, colour in _coloured_regions(labels):
        name, iou = _name(mask)
        if iou >= MIN_IOU:
            box = bounds(mask)
            place = place_of(*middle(box), mask.shape)
            rows, cols = np.nonzero(mask)  # + 0.5 below: centres of pixels
            centroid = float(rows.mean()) + 0.5, float(cols.mean()) + 0.5
            size = max(box[2] - box[0], box[3] - box[1])
            things.append(FoundThing(name, colour, place, *centroid, size, int(mask.sum()), iou, box))
    return things


def _letter_accuracy(wanted: tuple[str, ...], lines: tuple[str, ...]) -> float:
    """Return the share of the letters of some words that the lines of a sign have in the same places."""
    right = 0
    for i, word in enumerate(wanted):
        line = lines[i] if i < len(lines) else ""
        right += sum(a == b for a, b in zip(word, line.ljust(len(word)), strict=False))
    return right / sum(map(len, wanted))


def _ordered(things: list[FoundThing], wanted: Wanted) -> list[FoundThing]:
    """Return the things with the two largest in the order that matches the caption's names and colours better.

    If both orders match equally, the one with the caption's relation.
    """
    if not wanted.relation or len(things) < 2:
        return things

    def agreement(pair):
        first, second = pair
        matches = (first.name == wanted.thing) + (second.name == wanted.second)
        matches += (first.colour == wanted.colour) + (second.colour == wanted.second_colour)
        return matches, relation_of(first.centre, second.centre) == wanted.relation

    a, b, *others = things
    return [*max(((a, b), (b, a)), key=agreement), *others]


def inspect(image, wanted: str | Wanted) -> Report:
    """Return what an image shows, compared with a caption.

    image: uint8 (H, W, 3) in 0 ... 255, floats (H, W, 3) in 0 ... 1, or a PIL image, of any content including noise.
    wanted: a caption, or the result of `fluxlab.scenes.parse`. Raises UserError for an image of another shape or dtype,
    and for a caption outside the grammar.
    """
    wanted = parse(wanted) if isinstance(wanted, str) else wanted
    pixels = pixels_of(image)
    labels = labels_of(pixels)
    things = _ordered(_find_things(labels), wanted)
    board = find_sign(pixels, labels)
    count = 0 if wanted.thing is None else 2 if wanted.relation else 1
    matched = things[:count]
    complete = len(matched) == count if count else None
    names = (wanted.thing, wanted.second)[:count]
    wanted_colours = (wanted.colour, wanted.second_colour)
    colours = [(c, t.colour) for c, t in zip(wanted_colours[:count], matched, strict=False) if c]
    words = wanted.sign or ()
    lines = board.words if board else ()
    return Report(
        wanted=wanted,
        things=tuple(things),
        board=board,
        object=complete,
        colour=bool(complete) and all(a == b for a, b in colours) if any(wanted_colours) else None,
        shape=complete and all(t.name == n for t, n in zip(matched, names, strict=True)) if count else None,
        place=bool(matched) and matched[0].place == wanted.place if wanted.place else None,
        relation=bool(complete) and relation_of(matched[0].centre, matched[1].centre) == wanted.relation
        if wanted.relation
        else None,
        sign=(board is not None) == bool(words) if count else None,
        word=lines == words if words else None,
        words=tuple(i < len(lines) and lines[i] == word for i, word in enumerate(words)),
        letter_accuracy=_letter_accuracy(words, board.letters if board else ()) if words else None,
    )


def tally(reports: Iterable[Report]) -> dict[str, tuple[int, int]]:
    """Return for each attribute how many reports have it as the caption says, and how many captions say it."""
    reports = list(reports)
    verdicts = {name: [v for r in reports if (v := getattr(r, name)) is not None] for name in ATTRIBUTES}
    return {name: (sum(values), len(values)) for name, values in verdicts.items()}
