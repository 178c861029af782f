"""The lettering of the signs: a 3 x 7 pixel font in a 4 x 8 pixel cell, and the words it is used for.

Every cell spans exactly one token column and two token rows at the embedded model's 4 px tokens, and signs put their
text on that grid, so that a letter always looks the same to the model. A 3 x 5 font is as legible to the eye but leaves
the model fewer pixels to tell letters by.
"""

from functools import lru_cache

import numpy as np

from fluxlab.errors import UserError

GLYPH_HEIGHT, GLYPH_WIDTH = 7, 3
CELL_HEIGHT, CELL_WIDTH = 8, 4

# Unicase: capital forms, except d, whose capital is two pixels from an o at this width.
_ROWS = {
    "a": ".#. #.# #.# ### #.# #.# #.#",
    "b": "##. #.# #.# ##. #.# #.# ##.",
    "c": "### #.. #.. #.. #.. #.. ###",
    "d": "..# ..# ### #.# #.# #.# ###",
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
GLYPHS = {letter: np.array([[c == "#" for c in row] for row in rows.split()]) for letter, rows in _ROWS.items()}

WORDS = (
    "hello", "world", "open", "stop", "exit", "go", "yes", "no", "love", "home", "cafe", "tea", "milk", "cake",
    "book", "moon", "rain", "flux", "art", "sale", "free", "hi", "fun", "wow", "zen", "jazz", "sun", "taxi",
)  # fmt: skip


def text_size(words: tuple[str, ...]) -> tuple[int, int]:
    """Height and width in pixels of words set one to a line, without the board's margin."""
    return CELL_HEIGHT * len(words) - 1, CELL_WIDTH * max(map(len, words)) - 1


@lru_cache(maxsize=4096)
def text_mask(words: tuple[str, ...]) -> np.ndarray:
    """Ink of words set one to a line, flush left: bool (8 * lines - 1, 4 * longest - 1), read-only.

    Raises UserError for no words, an empty word or a letter outside a-z.
    """
    if not words or not all(words):
        raise UserError(f"words={words!r}: expected at least one word, none of them empty")
    mask = np.zeros(text_size(words), dtype=bool)
    for line, word in enumerate(words):
        for place, letter in enumerate(word):
            if letter not in GLYPHS:
                raise UserError(f"words={words!r}: no glyph for {letter!r}; the font has a to z")
            y, x = CELL_HEIGHT * line, CELL_WIDTH * place
            mask[y : y + GLYPH_HEIGHT, x : x + GLYPH_WIDTH] = GLYPHS[letter]
    mask.setflags(write=False)
    return mask
