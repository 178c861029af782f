"""Which text tokens spell a word of the prompt. The tokenizer's spans are handed in: nothing here knows a tokenizer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fluxlab.errors import UserError, nearest


@dataclass(frozen=True)
class Prompt:
    """A prompt and, for each of its text tokens, the characters [start, end) it stands for (start = end: none)."""

    text: str
    spans: Sequence[tuple[int, int]]


def find_word(prompt: Prompt, word: str, path: str) -> list[int]:
    """Indices of the text tokens that spell `word` (or a phrase) in the prompt, case ignored, whole words only.

    `cat#2` is the second of several cats. Raises `UserError` listing what there is for a word that is absent, that
    occurs more than once without a number, or whose tokens were cut off.
    """
    numbered = re.fullmatch(r"(.+)#(\d+)", word.strip())
    phrase, which = (numbered[1], int(numbered[2])) if numbered else (word, None)
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(part) for part in phrase.split()) + r"(?!\w)"
    places = [match.span() for match in re.finditer(pattern, prompt.text, re.IGNORECASE)] if phrase.strip() else []
    if not places:
        words = list(dict.fromkeys(re.findall(r"[\w'-]+", prompt.text)))
        hint = nearest(phrase, [w.lower() for w in words])
        raise UserError(f"{path}: {word!r} is not in the prompt, which has: {', '.join(words) or 'no words'}{hint}")
    if (which is None and len(places) > 1) or (which is not None and not 1 <= which <= len(places)):
        listed = ", ".join(f"{phrase}#{i + 1} ({_around(prompt.text, *at)})" for i, at in enumerate(places))
        raise UserError(f"{path}: {word!r} occurs {len(places)} times in the prompt; name one or several of {listed}")
    start, end = places[(which or 1) - 1]
    tokens = [i for i, (a, b) in enumerate(prompt.spans) if a < b and a < end and b > start]
    if not tokens:
        raise UserError(f"{path}: {word!r} was cut off: it lies beyond the {len(prompt.spans)} text tokens")
    return tokens


def _around(text: str, start: int, end: int, reach: int = 12) -> str:
    before, after = text[max(0, start - reach) : start], text[end : end + reach]
    return " ".join(f"…{before}{text[start:end]}{after}…".split())
