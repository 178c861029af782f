"""Bands of wavelengths of single heads: what a score loses without each, predicted by its derivatives and measured."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fluxlab.attribution import with_gains
from fluxlab.gradients import Score
from fluxlab.probes import Captured

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline

BANDS = {"below 8": (0, 8), "8 to 32": (8, 32), "above 32": (32, math.inf)}
"""Wavelengths in tokens, [low, high)."""


class Band(NamedTuple):
    """The pairs of channels of one axis in one head whose wavelengths are in a band. pairs: among those of all axes."""

    block: int
    head: int
    axis: str
    wavelength: str
    pairs: np.ndarray


def bands(axis: Sequence[str], wavelength: Sequence[float], blocks: int, heads: int) -> list[Band]:
    """Return every band that has a pair. axis, wavelength: of each pair."""
    names, waves = np.array(axis), np.array(wavelength)
    parts = {
        (name, band): np.flatnonzero((names == name) & (waves >= low) & (waves < high))
        for name in dict.fromkeys(axis)
        for band, (low, high) in BANDS.items()
    }
    kinds = [(*kind, pairs) for kind, pairs in parts.items() if len(pairs)]
    return [Band(block, head, *kind) for block in range(blocks) for head in range(heads) for kind in kinds]


def chosen(every: Sequence[Band], most: int) -> Sequence[Band]:
    """Return the bands, or `most` of them at random in their order. The same numbers give the same bands."""
    if most >= len(every):
        return every
    return [every[n] for n in np.sort(np.random.default_rng(0).choice(len(every), most, replace=False))]


def ablated(
    pipe: "Pipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    score: Score,
    gains: Captured,
    most: int,
    **how: Any,
) -> dict[str, Captured]:
    """Return the change of a score when a band no longer adds to the scores of attention: predicted and measured.

    gains: the derivatives of the score's mean, of `of_gains`. most: of more bands, so many at random. how: program and
    settings. Both arrays have one axis, `band`, with the labels block, head, axis and wavelength.
    """
    derivative = gains.values.sum(0)  # over steps
    axis, wavelength = (gains.coords[name][1] for name in ("axis", "wavelength"))
    every = chosen(bands(axis, wavelength, *derivative.shape[:2]), most)
    kept = [torch.ones(1, *derivative.shape)]
    for band in every:
        gain = torch.ones(1, *derivative.shape)
        gain[0, band.block, band.head, band.pairs] = 0
        kept.append(gain)
    scores = with_gains(pipe, prompts, seeds, score, kept, **how).mean(1).float().cpu().numpy()
    predicted = np.array([-derivative[band.block, band.head, band.pairs].sum() for band in every], np.float32)
    coords: Mapping = {
        key: (("band",), [getattr(band, key) for band in every]) for key in ("block", "head", "axis", "wavelength")
    }
    return {
        name: Captured(values, ("band",), coords, {"unit": "score"})
        for name, values in (("predicted", predicted), ("measured", scores[1:] - scores[0]))
    }
