"""Captions of scenes: written in several forms, and parsed.

The grammar of a caption:

[a | an] [colour] thing [place] [holding a sign that says word [word]]
[a | an] [colour] thing (above | below | left of | right of) [a | an] [colour] thing
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from fluxlab.errors import UserError
from fluxlab.scenes.font import WORDS
from fluxlab.scenes.scene import COLOURS, RELATIONS, Scene, render, sample_scene
from fluxlab.scenes.shapes import THINGS

PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_HOLDING = "holding a sign that says"
FORMS = ("full", "partial", "relation", "thing", "empty")
EMPTY_SHARE = 0.1  # of captions, which train the unconditional model that guidance needs
VOCABULARY = tuple(
    dict.fromkeys(
        [
            "a",
            "an",
            *COLOURS,
            *THINGS,
            *" ".join(PLACE_PHRASES.values()).split(),
            *_HOLDING.split(),
            *" ".join(RELATIONS).split(),
            *WORDS,
        ]
    )
)
"""Every word that a caption can contain, in lower case. Tokenizers are built from it."""


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for. A field is None if the caption does not mention it.

    Without a sign in the caption, the image should have none. In a relation, `second` and `second_colour` describe the
    second thing, and `relation` is the position of the first relative to it. For the empty caption, thing is None.
    """

    thing: str | None = None
    colour: str | None = None
    place: str | None = None
    sign: tuple[str, ...] | None = None
    relation: str | None = None
    second: str | None = None
    second_colour: str | None = None


def _noun(name: str, colour: str | None) -> str:
    words = f"{colour} {name}" if colour else name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write(wanted: Wanted) -> str:
    """Return the caption for this, in lower case. The inverse of `parse`."""
    if wanted.thing is None:
        return ""
    text = _noun(wanted.thing, wanted.colour)
    if wanted.relation:
        return f"{text} {wanted.relation} {_noun(wanted.second, wanted.second_colour)}"
    if wanted.place:
        text += f" {PLACE_PHRASES[wanted.place]}"
    if wanted.sign:
        text += f" {_HOLDING} {' '.join(wanted.sign)}"
    return text


def wanted_of(scene: Scene) -> Wanted:
    """Return everything that a caption can say about a scene."""
    first, sign = scene.things[0], scene.sign.words if scene.sign else None
    if len(scene.things) == 2:
        second = scene.things[1]
        return Wanted(first.name, first.colour, None, None, scene.relation, second.name, second.colour)
    return Wanted(first.name, first.colour, first.place, sign)


def caption(scene: Scene, rng: np.random.Generator, form: str | None = None) -> str:
    """Return a caption of a scene in one of these forms.

    - full: everything that a caption can say
    - partial: without the colour, the place, or both; of a pair, without both colours
    - relation: the full form of a pair
    - thing: the full form of a single thing without a sign
    - empty: ""

    With `form=None` the form is drawn: 10 % empty, 50 % full, 40 % partial. Half of all captions start with a capital
    letter. Raises `UserError` for an unknown form, and for "relation" or "thing" if the scene does not fit it.
    """
    if form is None:
        draw = rng.random()
        form = "empty" if draw < EMPTY_SHARE else "full" if draw < EMPTY_SHARE + 0.5 else "partial"
    if form not in FORMS:
        raise UserError(f"form={form!r}: expected one of {', '.join(FORMS)}")
    if form == "empty":
        return ""
    everything = wanted_of(scene)
    if form == "relation" and not everything.relation:
        raise UserError(f"form={form!r}: the scene has one thing, a relation needs two")
    if form == "thing" and (everything.relation or everything.sign):
        raise UserError(f"form={form!r}: the scene has a sign or a second thing")
    wanted = everything
    if form == "partial" and everything.relation:
        wanted = Wanted(everything.thing, relation=everything.relation, second=everything.second)
    elif form == "partial":
        kept = int(rng.random() * 3)  # colour, place or neither
        wanted = replace(everything, **{("colour", "place")[k]: None for k in (0, 1) if k != kept})
    text = write(wanted)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


def _any(words) -> str:
    return "|".join(words)


_CAPTION = re.compile(
    rf"an? (?:(?P<colour>{_any(COLOURS)}) )?(?P<thing>{_any(THINGS)})"
    rf"(?: (?P<relation>{_any(RELATIONS)}) an? (?:(?P<second_colour>{_any(COLOURS)}) )?(?P<second>{_any(THINGS)})"
    rf"|(?: (?P<place>{_any(PLACE_PHRASES.values())}))?(?: {_HOLDING} (?P<sign>[a-z]+(?: [a-z]+)?))?)"
)
_PLACE_OF_PHRASE = {phrase: place for place, phrase in PLACE_PHRASES.items()}


def parse(text: str) -> Wanted:
    """Return what a caption asks for. Case, spacing and a full stop at the end are ignored.

    Raises `UserError` for a caption that does not follow the grammar at the top of this module, a sign with a word that
    is not in `WORDS`, and a wrong article (a, an).
    """
    plain = " ".join(text.lower().removesuffix(".").split())
    if not plain:
        return Wanted()
    match = _CAPTION.fullmatch(plain)
    if not match:
        example = write(Wanted("fox", "red", "left", ("hello", "world")))
        raise UserError(f"caption={text!r}: expected a caption such as {example!r}")
    parts = match.groupdict()
    sign = tuple(parts["sign"].split()) if parts["sign"] else None
    for word in sign or ():
        if word not in WORDS:
            raise UserError(f"caption={text!r}: unknown word {word!r} on the sign, expected one of {', '.join(WORDS)}")
    wanted = Wanted(**{**parts, "sign": sign, "place": _PLACE_OF_PHRASE.get(parts["place"])})
    if write(wanted) != plain:
        raise UserError(f"caption={text!r}: expected {write(wanted)!r}")
    return wanted


def batch(
    rng: np.random.Generator,
    n: int,
    size: tuple[int, int] = (64, 64),
    split: str = "train",
    small_d: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Draw n scenes and return their images, uint8 (n, height, width, 3), and a caption of each.

    size, split: as for `sample_scene`. small_d: as for `render`.

    Raises `UserError` like `sample_scene`, and for n < 1.
    """
    if n < 1:
        raise UserError(f"n={n!r}: expected at least 1")
    images, captions = [], []
    for _ in range(n):
        scene = sample_scene(rng, size, split)
        images.append(render(scene, small_d))
        captions.append(caption(scene, rng))
    return np.stack(images), captions
