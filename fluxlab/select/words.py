"""Which text tokens spell a word of the prompt. The caller supplies the tokenizer's spans: no tokenizer is used here.

A word is a run of letters and digits with what belongs to it: `hello-world`, `don't`, `3.5`, `C++`, `C#2`. In scripts
that are written without spaces, such as Chinese and Japanese, each character is a word. So is each punctuation mark. A
phrase starts and ends where a word does.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from fluxlab.errors import UserError, nearest, show


@dataclass(frozen=True)
class Prompt:
    """A prompt and, for each of its text tokens, the characters [start, end) it stands for (start = end: none)."""

    text: str
    spans: Sequence[tuple[int, int]]


def find_word(prompt: Prompt, word: str, path: str) -> list[int]:
    """Return the indices of the text tokens that spell `word` (a word or phrase) in the prompt.

    Case, the width of letters and the kind of apostrophe or hyphen do not matter. Only whole words are found: not
    `cat` in `catalogue`, nor `hello` in `hello-world`; but `cat` is found in `cat's`. `cat#2` is the second of several
    cats, unless the prompt itself contains `cat#2`.

    Raises UserError if the word does not occur, if it occurs several times and has no number, if its tokens were cut
    off, or if the text encoder has no token for the word alone.
    """
    text = _Normal(prompt.text)
    spellings: list[tuple[str, int | None]] = [(word, None)]
    numbered = re.fullmatch(r"(.+)#(\d{1,9})", word.strip(), re.DOTALL)
    if numbered:  # the second C, or the second C#
        spellings += [(numbered[1], int(numbered[2])), (f"{numbered[1]}#", int(numbered[2]))]
    matches = [(phrase, which, spans) for phrase, which in spellings if (spans := text.find(phrase))]
    if not matches:
        raise _absent(text, word, numbered[1] if numbered else word, path)
    phrase, which, spans = matches[0]
    if (which is None and len(spans) > 1) or (which is not None and not 1 <= which <= len(spans)):
        listed = ", ".join(f"{phrase}#{i + 1} ({_around(prompt.text, *span)})" for i, span in enumerate(spans[:8]))
        raise UserError(
            f"{path}: {show(word)} occurs {len(spans)} times in the prompt; name one or several of {listed}"
        )
    return _tokens(prompt, spans[(which or 1) - 1], word, path)


def _tokens(prompt: Prompt, span: tuple[int, int], word: str, path: str) -> list[int]:
    start, end = span
    tokens = _covering(prompt, span)
    if not tokens:
        if start >= max((b for _, b in prompt.spans), default=0):
            reason = f"was cut off or is ignored: it lies beyond the last of the {len(prompt.spans)} text tokens"
        else:
            reason = "is ignored by the text encoder: no text token covers it"
        raise UserError(f"{path}: {show(word)} {reason}")
    for a, b in (prompt.spans[i] for i in tokens):
        outside = prompt.text[a : max(a, start)] + prompt.text[min(b, end) : b]
        if any(map(str.isalnum, outside)):
            raise UserError(
                f"{path}: {show(word)} has no token of its own: the text encoder reads {show(prompt.text[a:b])} as one"
            )
    return tokens


def split_words(text: str) -> list[tuple[int, int]]:
    """Return where each word and punctuation mark of a text lies, [start, end) in characters."""
    normal = _Normal(text)
    return [normal.original(start, end) for start, end in normal.words]


def named_words(prompt: Prompt) -> list[tuple[str, list[int]]]:
    """Return every word of a prompt in order, punctuation left out, with the text tokens that cover it.

    Words that occur several times are named `cat#1`, `cat#2`. Words without a token are left out.
    """
    spans = [span for span in split_words(prompt.text) if any(map(str.isalnum, prompt.text[slice(*span)]))]
    names = [prompt.text[slice(*span)].lower() for span in spans]
    words = []
    for i, span in enumerate(spans):
        name, nth = prompt.text[slice(*span)], names[: i + 1].count(names[i])
        tokens = _covering(prompt, span)
        if tokens:
            words.append((name if names.count(names[i]) == 1 else f"{name}#{nth}", tokens))
    return words


def _covering(prompt: Prompt, span: tuple[int, int]) -> list[int]:
    return [i for i, (a, b) in enumerate(prompt.spans) if a < b and a < span[1] and b > span[0]]


def _absent(text: "_Normal", word: str, phrase: str, path: str) -> UserError:
    words = list(dict.fromkeys(part for part in map(text.slice, text.words) if re.search(r"\w", part)))
    longer = [part for part in words if phrase.strip() and phrase.strip().lower() in part.lower()]
    hint = nearest(phrase, [part.lower() for part in words]) or (f"; did you mean {longer[0]}?" if longer else "")
    listed = ", ".join(words) or "no words"
    listed = listed if len(listed) <= 300 else f"{listed[:300]} …"
    return UserError(f"{path}: {show(word)} is not in the prompt, which has: {listed}{hint}")


def _around(text: str, start: int, end: int, reach: int = 12) -> str:
    before, after = text[max(0, start - reach) : start], text[end : end + reach]
    return " ".join(f"…{before}{text[start:end]}{after}…".split())


# Applied to a text with each character replaced by its class: w letter, s the letter s, d digit, c character of a
# script without spaces, m mark that belongs to the character before it, x other symbol, -'.,:+# themselves. A match is
# one word.
_WORD = re.compile(r"(?:[wsd]|(?<=[wsd])-(?=[wsd])|(?<=[wsd])'(?=[wsd])|(?<=d)[.,:](?=d)|(?<=[wsd])(?:\+\+|#))+|\Sm*")
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3021-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"  # Thai, Lao, Burmese, Khmer, kana, Chinese characters
)
_SAME = str.maketrans({"\u2019": "'", "\u02bc": "'", "\u2010": "-", "\u2011": "-"})


class _Normal:
    """A text in a normal form in which equal words have equal characters, and where each character came from."""

    def __init__(self, text: str):
        self._from: list[tuple[int, int]] = []
        characters = []
        for start, end in _clusters(text):
            for character in unicodedata.normalize("NFKC", text[start:end]).translate(_SAME):
                if unicodedata.category(character) != "Cf":  # invisible, such as a zero-width space
                    characters.append(character)
                    self._from.append((start, end))
        self.text = "".join(characters)
        self.words = [match.span() for match in _WORD.finditer("".join(_classes(self.text)))]

    def slice(self, span: tuple[int, int]) -> str:
        return self.text[slice(*span)]

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Return the span of the original text for one of this text."""
        return self._from[start][0], self._from[end - 1][1]

    def find(self, phrase: str) -> list[tuple[int, int]]:
        """Return where a phrase occurs in the original text, from the start of a word to the end of one."""
        parts = _Normal(phrase).text.split()
        if not parts:
            return []
        spelled = r"\s+".join(map(re.escape, parts))
        pattern = re.compile(f"(?=({spelled}))", re.IGNORECASE)  # a lookahead finds overlapping matches
        inside = {i for start, end in self.words for i in range(start + 1, end)}
        inside -= {end - 2 for _, end in self.words if self.text[end - 2 : end].lower() == "'s"}  # cat in cat's
        spans: list[tuple[int, int]] = []
        for match in pattern.finditer(self.text):
            start, end = match.span(1)
            if start not in inside and end not in inside and (not spans or start >= spans[-1][1]):
                spans.append((start, end))
        return [self.original(*span) for span in spans]


def _clusters(text: str) -> list[tuple[int, int]]:
    """Split a text into characters with the marks that combine with them."""
    starts = [i for i, c in enumerate(text) if i == 0 or not (unicodedata.category(c)[0] == "M" or _is_jamo(c))]
    return [(start, end) for start, end in zip(starts, [*starts[1:], len(text)], strict=False)]


def _is_jamo(character: str) -> bool:
    return "\u1160" <= character <= "\u11ff"  # the second and third part of a Korean syllable, as macOS writes it


def _classes(text: str) -> list[str]:
    classes: list[str] = []
    for character in text:
        if character.isspace():
            classes.append(" ")
        elif unicodedata.category(character)[0] == "M":  # belongs to the character before it
            classes.append("w" if classes and classes[-1] in "wsd" else "m")
        elif _SPACELESS.match(character):
            classes.append("c")
        elif character.isdigit():
            classes.append("d")
        elif character.isalnum() or character == "_":
            classes.append("s" if character in "sS" else "w")
        else:
            classes.append(character if character in "-'.,:+#" else "x")
    return classes
