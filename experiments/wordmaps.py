"""How much of a word's attention map is on what the word names, in one image of a scene."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from fluxlab.errors import UserError
from fluxlab.measure.oracle import inspect
from fluxlab.measure.regions import Box
from fluxlab.probes import Captured
from fluxlab.scenes import Wanted, parse
from fluxlab.select.words import Prompt, named_words, split_words

KINDS = ("colour", "thing", "sign")


class Named(NamedTuple):
    """A word of a caption that names something: its kind, its index in the caption, and the number of the object."""

    kind: str
    index: int
    thing: int = 0


def cell_shares(image: Image.Image, prompt: str, captured: Mapping[str, Captured]) -> dict[str, float]:
    """Return the shares of one cell, for each kind of word whose region is found in the image.

    - `kind/chance`: the region's share of the image
    - `kind/block/share`, for each block and for "mean": how much of the words' maps is on the region
    - `kind/block/ratio`: share / chance
    - `kind/block/other`: the ratio of the words that name nothing, on the same region
    - `kind/block/beyond`: ratio - other

    Shares are means over steps, and over the words of a kind. Raises `UserError` if the prompt is not a caption of a
    scene, and if none of its words were captured by block.
    """
    try:
        wanted = parse(prompt)
    except ValueError:
        raise UserError(
            f"prompt {prompt!r}: expected a caption of fluxlab.scenes, because the oracle must find what it names"
        ) from None
    words, (maps, labels, blocks) = word_labels(prompt), word_maps(captured)
    named = names(wanted, [word.partition("#")[0] for word in words])
    column = {i: labels.index(word) for i, word in enumerate(words) if word in labels}
    others = [n for i, n in column.items() if i not in {word.index for word in named}]
    boxes, size = regions(image, wanted), (image.height, image.width)
    result: dict[str, float] = {}
    for kind in KINDS:
        pairs = [(column[word.index], word) for word in named if word.kind == kind and word.index in column]
        covers = [coverage(boxes[kind][word.thing], size, maps.shape[-2:]) for _, word in pairs if boxes[kind]]
        if not covers:
            continue
        chance = np.array([cover.mean() for cover in covers])
        # (words, blocks): each word on its own region
        shares = np.stack([share_on(maps[:, :, n], cover) for (n, _), cover in zip(pairs, covers, strict=True)])
        plain = np.stack([share_on(maps[:, :, others], c).mean(-1) if others else shares[0] * np.nan for c in covers])
        result[f"{kind}/chance"] = float(chance.mean())
        for what, values in (
            ("share", shares),
            ("ratio", shares / chance[:, None]),
            ("other", plain / chance[:, None]),
            ("beyond", (shares - plain) / chance[:, None]),
        ):
            by_block = values.mean(0)
            result |= {f"{kind}/{block}/{what}": float(x) for block, x in zip(blocks, by_block, strict=True)}
            result[f"{kind}/mean/{what}"] = float(by_block.mean())
    return result


def names(wanted: Wanted, words: list[str]) -> list[Named]:
    """Return the words that name a colour, an object or a word on the sign, in the order of the caption."""
    expected = [("colour", wanted.colour, 0), ("thing", wanted.thing, 0)]
    expected += [("colour", wanted.second_colour, 1), ("thing", wanted.second, 1)]
    expected += [("", "says", 0), *(("sign", word, 0) for word in wanted.sign or ())] if wanted.sign else []
    named, start = [], 0
    for kind, word, thing in expected:
        if word is not None:
            index = words.index(word, start)
            start = index + 1
            named += [Named(kind, index, thing)] if kind else []
    return named


def word_labels(prompt: str) -> list[str]:
    """Return the words of a prompt in lower case, labelled as by a probe: repeated ones are cat#1, cat#2."""
    return [name.lower() for name, _ in named_words(Prompt(prompt, split_words(prompt)))]


def word_maps(captured: Mapping[str, Captured]) -> tuple[np.ndarray, list[str], list[str]]:
    """Return attention from image tokens to words, `(step, block, word, row, col)`; the words; the blocks.

    Each map is normalised to sum 1. Raises `UserError` if no words were captured, or only their mean over blocks.
    """
    for maps in captured.values():
        if maps.about["request"]["kind"] == "words" and "image_to_word" in maps.labels("direction"):
            break
    else:
        raise UserError("no words were captured; run the store's command again with capture=words")
    maps = maps.sel(direction="image_to_word").mean(*({"head"} & set(maps.axes)))
    if maps.axes[-4:] != ("block", "word", "row", "col"):
        raise UserError("the words were averaged over blocks; run the store's command again with capture=words")
    values = maps.values if "step" in maps.axes else maps.values[None]
    values = values.astype(np.float64)
    labels, blocks = [str(word).lower() for word in maps.labels("word")], list(map(str, maps.labels("block")))
    return values / values.sum((-2, -1), keepdims=True), labels, blocks


def regions(image: Image.Image, wanted: Wanted) -> dict[str, list[Box]]:
    """Return the boxes in pixels that the oracle finds, by kind of word: all objects or none, and the board."""
    report = inspect(image, wanted)
    things = [thing.box for thing in report.things[: 2 if wanted.relation else 1]] if report.object else []
    return {"colour": things, "thing": things, "sign": [report.board.box] if report.board else []}


def coverage(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Return how much of each token is inside a box, `(rows, cols)`. size: (height, width) of the image in pixels."""

    def along(start: int, stop: int, length: int, count: int) -> np.ndarray:
        ends = np.arange(count + 1) * (length / count)
        inside = np.minimum(ends[1:], stop) - np.maximum(ends[:-1], start)
        return np.clip(inside, 0, None) / (length / count)

    top, left, bottom, right = box
    return np.outer(along(top, bottom, size[0], grid[0]), along(left, right, size[1], grid[1]))


def share_on(maps: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Return the share of maps `(step, …, row, col)` that is on a region, mean over steps."""
    return (maps * cover).sum((-2, -1)).mean(0)
