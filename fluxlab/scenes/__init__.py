"""Synthetic images with captions, on which the embedded model is trained."""

from fluxlab.scenes.captions import FORMS, VOCABULARY, Wanted, batch, caption, parse, wanted_of, write
from fluxlab.scenes.font import WORDS, text_mask
from fluxlab.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SIZES,
    Scene,
    Sign,
    Thing,
    held_out,
    place_of,
    relation_of,
    render,
    sample_scene,
)
from fluxlab.scenes.shapes import THINGS, thing_mask
from fluxlab.scenes.single import sample_thing

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FORMS",
    "PLACES",
    "RELATIONS",
    "SIZES",
    "THINGS",
    "VOCABULARY",
    "WORDS",
    "Scene",
    "Sign",
    "Thing",
    "Wanted",
    "batch",
    "caption",
    "held_out",
    "parse",
    "place_of",
    "relation_of",
    "render",
    "sample_scene",
    "sample_thing",
    "text_mask",
    "thing_mask",
    "wanted_of",
    "write",
]
