"""The order of (block, head, pair of channels) by their derivatives, and programs without the first of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluxlab.learning.folder import Attribution


def sizes(gains: np.ndarray) -> np.ndarray:
    """Return the size of each (block, head, pair) in each image, `(images, blocks, heads, pairs)`, with the mean 1.

    gains: the derivatives, `(images, steps, blocks, heads, pairs)`. A size is |the sum of the derivatives over steps|,
    since an ablation acts at all steps, over its mean over sites, so that no image counts more than another.
    """
    found = np.abs(gains.sum(1))
    return found / found.mean((1, 2, 3), keepdims=True)


def ranking(found: Attribution) -> np.ndarray:
    """Return the numbers of the sites (block, head, pair) in C order, the largest mean size over images first."""
    return np.argsort(-sizes(found.values("gains")).mean(0).ravel(), kind="stable")


def at_random(found: Attribution, number: int) -> np.ndarray:
    """Return the numbers of the sites in a random order, the same for the same number."""
    return np.random.default_rng(number).permutation(found.array("gains").values[0].size)


def without(found: Attribution, chosen: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the config of a program in which some sites add nothing to the scores of attention, at all steps.

    chosen: their numbers in C order. One edit for each block, head and axis.
    """
    gains = found.array("gains")
    axis, shape = np.array(gains.coords["axis"][1]), gains.values.shape[1:]
    grouped: dict[tuple[int, int, str], list[int]] = {}
    for number in sorted(map(int, chosen)):
        block, head, pair = map(int, np.unravel_index(number, shape))
        of_axis = pair - int(np.flatnonzero(axis == axis[pair])[0])  # ops count the pairs of an axis from 0
        grouped.setdefault((block, head, str(axis[pair])), []).append(of_axis)
    return {
        f"block_{block}_head_{head}_{name}": {
            "op": "gain",
            "factor": 0,
            "side": "queries",
            "blocks": [block],
            "heads": [head],
            "axes": name,
            "pairs": pairs,
        }
        for (block, head, name), pairs in grouped.items()
    }


def variants(found: Sequence[Attribution], counts: Sequence[int], random: int) -> Mapping[str, dict[str, Any]]:
    """Return the variants of an ablation: the first k sites of each attribution, and `random` choices of k.

    Names are those of the objectives: `place_8`; those of choices at random `random_8_1`, from 1. The baseline has the
    program of the attributions, which the variants continue.
    """
    base = program_of(found[0])
    made: dict[str, dict[str, Any]] = {"baseline": base}
    for k in counts:
        for one in found:
            made[f"{one.objective}_{k}"] = base | without(one, ranking(one)[:k])
        for number in range(1, random + 1):
            made[f"random_{k}_{number}"] = base | without(found[0], at_random(found[0], number)[:k])
    return made


def program_of(found: Attribution) -> dict[str, Any]:
    """Return the config of the program whose score was differentiated."""
    return found.record["request"]["variants"][found.record["variant"]]
