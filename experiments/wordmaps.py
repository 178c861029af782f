"""How much of a word's map lies on what the word names, in one picture of a scene."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from fluxlab.errors import UserError
from fluxlab.measure.oracle import inspect
from fluxlab.measure.regions import Box
from fluxlab.probes import Captured
from fluxlab.scenes import Wanted, parse

KINDS = ("colour", "thing", "sign")


class Named(NamedTuple):
    """A word of a caption: its kind, its place among the caption's words, and which of the things it is about."""

    kind: str
    place: int
    thing: int = 0


def cell_shares(image: Image.Image, prompt: str, captured: Mapping[str, Captured]) -> dict[str, float]:
    """For each kind of word whose region is in the picture: `kind/chance`, the region's share of the image, and for
    each block and "mean" `kind/block/share`, of the words' maps on it, `…/ratio`, share / chance, `…/other`, the ratio
    of the words that name nothing there, and `…/beyond`, the ratio less that. Shares are means over steps, and over the
    words of a kind.

    Raises `UserError` for a prompt that is no scene's caption, and where no words of it were captured by block.
    """
    try:
        wanted = parse(prompt)
    except ValueError:
        raise UserError(
            f"prompt {prompt!r} is no caption of fluxlab.scenes, so that nothing can find its things in a picture"
        ) from None
    words = [match[0].lower() for match in re.finditer(r"[\w'-]+", prompt)]
    named, (maps, labels, blocks) = names(wanted, words), word_maps(captured)
    at = {place: labels.index(text) for place, text in enumerate(spelt(words)) if text in labels}
    others = [i for place, i in at.items() if place not in {word.place for word in named}]
    boxes, size = regions(image, wanted), (image.height, image.width)
    found: dict[str, float] = {}
    for kind in KINDS:
        pairs = [(at[word.place], word) for word in named if word.kind == kind and word.place in at]
        covers = [covered(boxes[kind][word.thing], size, maps.shape[-2:]) for _, word in pairs if boxes[kind]]
        if not covers:
            continue
        chance = np.array([cover.mean() for cover in covers])
        # (words, blocks): each word on its own region
        shares = np.stack([on(maps[:, :, i], cover) for (i, _), cover in zip(pairs, covers, strict=True)])
        plain = np.stack([on(maps[:, :, others], c).mean(-1) if others else shares[0] * np.nan for c in covers])
        found[f"{kind}/chance"] = float(chance.mean())
        for what, values in (
            ("share", shares),
            ("ratio", shares / chance[:, None]),
            ("other", plain / chance[:, None]),
            ("beyond", (shares - plain) / chance[:, None]),
        ):
            by_block = values.mean(0)
            found |= {f"{kind}/{block}/{what}": float(x) for block, x in zip(blocks, by_block, strict=True)}
            found[f"{kind}/mean/{what}"] = float(by_block.mean())
    return found


def names(wanted: Wanted, words: list[str]) -> list[Named]:
    """The words that say a colour, a thing or what the sign says, found in the caption's order."""
    said = [("colour", wanted.colour, 0), ("thing", wanted.thing, 0)]
    said += [("colour", wanted.second_colour, 1), ("thing", wanted.second, 1)]
    said += [("", "says", 0), *(("sign", word, 0) for word in wanted.sign or ())] if wanted.sign else []
    found, start = [], 0
    for kind, word, thing in said:
        if word is not None:
            place = words.index(word, start)
            start = place + 1
            found += [Named(kind, place, thing)] if kind else []
    return found


def spelt(words: list[str]) -> list[str]:
    """As a probe labels them: repeated ones are cat#1, cat#2."""
    return [word if words.count(word) == 1 else f"{word}#{words[: i + 1].count(word)}" for i, word in enumerate(words)]


def word_maps(captured: Mapping[str, Captured]) -> tuple[np.ndarray, list[str], list[str]]:
    """Where image tokens look at words: `(step, block, word, row, col)`, each map of sum 1; words; blocks."""
    for one in captured.values():
        if one.about["request"]["kind"] == "words" and "image_to_word" in one.labels("direction"):
            break
    else:
        raise UserError("no words were captured; run the store's command again with capture=words")
    one = one.sel(direction="image_to_word").mean(*({"head"} & set(one.axes)))
    if one.axes[-4:] != ("block", "word", "row", "col"):
        raise UserError("the words were averaged over blocks; run the store's command again with capture=words")
    values = one.values if "step" in one.axes else one.values[None]
    values = values.astype(np.float64)
    labels, blocks = [str(word).lower() for word in one.labels("word")], list(map(str, one.labels("block")))
    return values / values.sum((-2, -1), keepdims=True), labels, blocks


def regions(image: Image.Image, wanted: Wanted) -> dict[str, list[Box]]:
    """By kind of word, the boxes in pixels that the oracle finds: of the things, all of them or none, and the board."""
    report = inspect(image, wanted)
    things = [thing.box for thing in report.things[: 2 if wanted.relation else 1]] if report.object else []
    return {"colour": things, "thing": things, "sign": [report.board.box] if report.board else []}


def covered(box: Box, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The share of each token of a grid (rows, cols) over a picture of (height, width) px that lies in a box."""

    def along(start: int, stop: int, length: int, count: int) -> np.ndarray:
        ends = np.arange(count + 1) * (length / count)
        inside = np.minimum(ends[1:], stop) - np.maximum(ends[:-1], start)
        return np.clip(inside, 0, None) / (length / count)

    top, left, bottom, right = box
    return np.outer(along(top, bottom, size[0], grid[0]), along(left, right, size[1], grid[1]))


def on(maps: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """The share of maps `(step, …, row, col)` that lies on a region, mean over steps."""
    return (maps * cover).sum((-2, -1)).mean(0)
