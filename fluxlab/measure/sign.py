"""Find and read the sign in an image: a light board whose lines are matched with every word and every letter."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fluxlab.measure.palette import BOARD_LABEL, COLOUR_LABELS, INK_LABEL, PALETTE
from fluxlab.measure.regions import Box, areas, bounds, components, dilate, erode, middle
from fluxlab.scenes.font import CELL_HEIGHT, CELL_WIDTH, GLYPH_HEIGHT, GLYPH_WIDTH, GLYPHS, WORDS, text_mask

MIN_CORRELATION = 0.6
"""Smallest correlation of a line with its best word for the line to count as legible."""

_REACH = 2  # px; lettering is searched so far around its expected position
_LONGEST = max(map(len, WORDS))


@dataclass(frozen=True)
class FoundSign:
    """A board in an image: the box of its light part in pixels, and what each line says.

    closest: the word with the highest correlation. words: the same word, or None if the line is not legible. letters:
    the letters read one by one, without the list of words.
    """

    box: Box
    words: tuple[str | None, ...]
    closest: tuple[str, ...]
    correlations: tuple[float, ...]
    letters: tuple[str, ...]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (row, col)."""
        return middle(self.box)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Return rows with mean 0 and length 1. Rows without contrast become 0."""
    rows = rows - rows.mean(-1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)


@lru_cache(maxsize=1)
def _word_templates() -> np.ndarray:
    """Return the ink of every word with a pixel of board around it, normalised: (words, 9 * 22)."""
    sheets = np.zeros((len(WORDS), GLYPH_HEIGHT + 2, CELL_WIDTH * _LONGEST + 2), dtype=np.float32)
    for sheet, word in zip(sheets, WORDS, strict=True):
        ink = text_mask((word,))
        sheet[1 : 1 + ink.shape[0], 1 : 1 + ink.shape[1]] = ink
    return _unit(sheets.reshape(len(WORDS), -1))


@lru_cache(maxsize=1)
def _letter_templates() -> tuple[np.ndarray, str]:
    """Return every glyph and the blank, (27, 7, 3), and their letters."""
    blank = np.zeros((GLYPH_HEIGHT, GLYPH_WIDTH), dtype=bool)
    return np.stack([*GLYPHS.values(), blank]).astype(np.float32), "".join(GLYPHS) + " "


def _read_line(ink: np.ndarray, top: int, left: int) -> tuple[str, float, str]:
    """Return the best word of a line, its correlation and its letters.

    ink: 0 ... 1. (top, left): where the line is expected to start.
    """
    height, width = GLYPH_HEIGHT + 2, CELL_WIDTH * _LONGEST + 2
    shifts = [(dy, dx) for dy in range(-_REACH, _REACH + 1) for dx in range(-_REACH, _REACH + 1)]
    shifts.sort(key=lambda d: abs(d[0]) + abs(d[1]))  # the nearest wins a tie
    windows = [ink[y : y + height, x : x + width] for y, x in ((top - 1 + dy, left - 1 + dx) for dy, dx in shifts)]
    scores = _unit(np.stack(windows).reshape(len(shifts), -1)) @ _word_templates().T
    shift, word = divmod(int(scores.argmax()), len(WORDS))
    templates, letters = _letter_templates()
    line, read = windows[shift], ""
    for i in range(_LONGEST):
        x = 1 + CELL_WIDTH * i
        cell = line[1 : 1 + GLYPH_HEIGHT, x : x + GLYPH_WIDTH]
        read += letters[int(np.abs(templates - cell).sum((1, 2)).argmin())]
    return WORDS[word], float(scores[shift, word]), read.rstrip()


def _light_board(labels: np.ndarray) -> Box | None:
    """Return the box of the largest region of light and dark pixels that has room for a line of lettering."""
    light = labels == BOARD_LABEL
    if not light.any():
        return None
    regions, count = components(light | (labels == INK_LABEL))
    mask = light & (regions == areas(regions, count, light).argmax())
    # a row or column of the board has at least its margin, a stray pixel of a blurred edge has less
    rows, cols = np.flatnonzero(mask.sum(1) >= 2), np.flatnonzero(mask.sum(0) >= 2)
    if len(rows) < GLYPH_HEIGHT or len(cols) <= CELL_WIDTH:
        return None
    box = (int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1)
    return box if mask[box[0] : box[2], box[1] : box[3]].mean() >= 0.25 else None


def _solid_board(pixels: np.ndarray, labels: np.ndarray) -> Box | None:
    """Return the same for a blurred image, in which lettering and board mix to grey: a block unlike the background."""
    counts = np.bincount(labels.ravel(), minlength=len(PALETTE))
    background = np.median(pixels[labels == counts.argmax()], axis=0)
    unlike = (np.linalg.norm(pixels - background, axis=2) > 60) & (labels >= COLOUR_LABELS)
    closed = erode(dilate(unlike, 3), 3)  # without the gaps of grey lettering
    regions, count = components(erode(closed, 7))  # without sticks and the rims of things
    if not count:
        return None
    top, left, bottom, right = bounds(dilate(regions == areas(regions, count).argmax(), 7))
    box = (top + 1, left + 1, bottom - 1, right - 1)  # without the border
    height, width = box[2] - box[0], box[3] - box[1]
    if not (GLYPH_HEIGHT <= height <= 24 and CELL_WIDTH < width <= 28):
        return None
    dark, bright = np.percentile(pixels[box[0] : box[2], box[1] : box[3]].mean(axis=2), (5, 95))
    return box if bright >= 128 and bright - dark >= 48 else None


def _read(pixels: np.ndarray, box: Box) -> FoundSign:
    board = pixels[box[0] : box[2], box[1] : box[3]].mean(axis=2)
    dark, bright = np.percentile(board, (2, 98))
    pad = 32  # lettering is searched past the edge of a small board
    ink = np.pad(np.clip((bright - board) / max(bright - dark, 48), 0, 1), pad).astype(np.float32)
    lines = min(max(round((box[2] - box[0] - 1) / CELL_HEIGHT), 1), 2)
    results = [_read_line(ink, pad + 1 + CELL_HEIGHT * line, pad + 1) for line in range(lines)]
    closest, correlations, letters = zip(*results, strict=True)
    words = tuple(w if c >= MIN_CORRELATION else None for w, c in zip(closest, correlations, strict=True))
    return FoundSign(box, words, closest, correlations, letters)


def find_sign(pixels: np.ndarray, labels: np.ndarray) -> FoundSign | None:
    """Return the board, found in the way that reads better; None without a board. A grey block must read like words."""
    light = _light_board(labels)
    signs = [_read(pixels, light)] if light else []
    if signs and min(signs[0].correlations) >= 0.99:  # as sharp as drawn
        return signs[0]
    solid = _solid_board(pixels, labels)
    if solid and solid != light:
        signs += [sign for sign in [_read(pixels, solid)] if max(sign.correlations) >= MIN_CORRELATION - 0.1]

    def quality(sign: FoundSign) -> tuple[int, float]:
        return sum(w is not None for w in sign.words), sum(sign.correlations) / len(sign.correlations)

    return max(signs, key=quality, default=None)
