"""The font of the signs, 3 x 7 pixels in a cell of 4 x 8, and the words that signs can have.

A cell covers exactly one column and two rows of the embedded model's 4 px tokens, and signs align their text with that
grid. A letter therefore always has the same pixels in its tokens. A 3 x 5 font would be as legible for people, but
would give the model fewer pixels that distinguish letters.
"""

from functools import lru_cache

import numpy as np

from fluxlab.errors import UserError

GLYPH_HEIGHT, GLYPH_WIDTH = 7, 3
CELL_HEIGHT, CELL_WIDTH = 8, 4

# At this width, some letters differ by two pixels only: D and O at the corners on the left.
_ROWS = {
    "a": ".#. #.# #.# ### #.# #.# #.#",
    "b": "##. #.# #.# ##. #.# #.# ##.",
    "c": "### #.. #.. #.. #.. #.. ###",
    "d": "##. #.# #.# #.# #.# #.# ##.",
    "e": "### #.. #.. ### #.. #.. ###",
    "f": "### #.. #.. ##. #.. #.. #..",
    "g": "### #.. #.. #.# #.# #.# ###",
    "h": "#.# #.# #.# ### #.# #.# #.#",
    "i": "### .#. .#. .#. .#. .#. ###",
    "j": "..# ..# ..# ..# ..# #.# .#.",
    "k": "#.# #.# ##. #.. ##. #.# #.#",
    "l": "#.. #.. #.. #.. #.. #.. ###",
    "m": "#.# ### ### ### #.# #.# #.#",
    "n": "##. #.# #.# #.# #.# #.# #.#",
    "o": ".#. #.# #.# #.# #.# #.# .#.",
    "p": "### #.# #.# ### #.. #.. #..",
    "q": "### #.# #.# ### ..# ..# ..#",
    "r": "##. #.# #.# ##. ##. #.# #.#",
    "s": "### #.. #.. ### ..# ..# ###",
    "t": "### .#. .#. .#. .#. .#. .#.",
    "u": "#.# #.# #.# #.# #.# #.# ###",
    "v": "#.# #.# #.# #.# #.# .#. .#.",
    "w": "#.# #.# #.# ### ### ### #.#",
    "x": "#.# #.# .#. .#. .#. #.# #.#",
    "y": "#.# #.# #.# .#. .#. .#. .#.",
    "z": "### ..# ..# .#. #.. #.. ###",
}
SMALL_D = "..# ..# ### #.# #.# #.# ###"
"""The D of the font with which the first stage of the embedded model was trained."""


def _glyph(rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows.split()])


GLYPHS = {letter: _glyph(rows) for letter, rows in _ROWS.items()}

WORDS = (
    "hello", "world", "open", "stop", "exit", "go", "yes", "no", "love", "home", "cafe", "tea", "milk", "cake",
    "book", "moon", "rain", "flux", "art", "sale", "free", "hi", "fun", "wow", "zen", "jazz", "sun", "taxi",
)  # fmt: skip


def text_size(words: tuple[str, ...]) -> tuple[int, int]:
    """Return (height, width) in pixels of words on one line each, without the margin of the board."""
    return CELL_HEIGHT * len(words) - 1, CELL_WIDTH * max(map(len, words)) - 1


@lru_cache(maxsize=4096)
def text_mask(words: tuple[str, ...], small_d: bool = False) -> np.ndarray:
    """Return the pixels of words on one line each, left-aligned: bool (8 * lines - 1, 4 * longest - 1), read-only.

    small_d: with `SMALL_D` for d.

    Raises `UserError` for no words, an empty word, or a letter other than a to z.
    """
    if not words or not all(words):
        raise UserError(f"words={words!r}: expected one or more words, none of them empty")
    glyphs = GLYPHS | {"d": _glyph(SMALL_D)} if small_d else GLYPHS
    mask = np.zeros(text_size(words), dtype=bool)
    for line, word in enumerate(words):
        for n, letter in enumerate(word):
            if letter not in glyphs:
                raise UserError(f"words={words!r}: no glyph for {letter!r}; the font has a to z")
            y, x = CELL_HEIGHT * line, CELL_WIDTH * n
            mask[y : y + GLYPH_HEIGHT, x : x + GLYPH_WIDTH] = glyphs[letter]
    mask.setflags(write=False)
    return mask
