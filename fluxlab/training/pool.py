"""Pools of scenes with their latents. They are drawn and encoded once, before training."""

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from fluxlab import scenes
from fluxlab.families import family_of
from fluxlab.model import AutoEncoder
from fluxlab.scenes.captions import EMPTY_SHARE
from fluxlab.training.autoencoder import to_pixels
from fluxlab.training.seeds import numpy_rng

TOKEN = 4  # image pixels per token and side
BATCH = 50  # images that the autoencoder encodes at a time
NOISE_WORD = "photo"  # a word outside the vocabulary, so that the model meets the unknown token


@dataclass
class Pool:
    """Scenes of one size, their latents `(n, tokens, channels)` in bf16, and loss weights `(n, tokens)`."""

    size: tuple[int, int]
    scenes: list[scenes.Scene]
    latents: Tensor
    weights: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // TOKEN, self.size[1] // TOKEN


def token_weights(scene: scenes.Scene, *, sign: float, thing: float) -> Tensor:
    """Return the loss weights `(tokens,)` of a scene: `sign` on the board, `thing` on the box of a thing, else 1.

    The board wins where both touch a token.
    """
    rows, cols = scene.size[0] // TOKEN, scene.size[1] // TOKEN
    weights = torch.ones(rows, cols)

    def fill(box: tuple[float, float, float, float], weight: float) -> None:
        top, left = (max(0, math.floor(edge / TOKEN)) for edge in box[:2])
        bottom, right = (math.ceil(edge / TOKEN) for edge in box[2:])
        weights[top:bottom, left:right] = weight

    for drawn in scene.things:
        half = drawn.size / 2
        fill((drawn.row - half, drawn.col - half, drawn.row + half, drawn.col + half), thing)
    if scene.sign:
        fill(scene.sign.box, sign)
    return weights.flatten()


CHUNK = 500
"""Scenes drawn by one process at a time. Part of what a pool is: each chunk has a generator of its own."""


def draw_chunk(
    seed: int, size: tuple[int, int], chunk: int, count: int, two_words: float, small_d: bool, things: bool = False
) -> tuple[list[scenes.Scene], np.ndarray]:
    """Draw `count` training scenes of one size; return them and their images, uint8 `(count, height, width, 3)`.

    A share `two_words` of them, on average, are drawn again until they have a sign with two words. things: each has a
    single thing and no sign.
    """
    rng = numpy_rng(seed, f"pool {size[0]}x{size[1]}", chunk)
    drawn = []
    for _ in range(count):
        if things:
            drawn.append(scenes.sample_thing(rng, size))
            continue
        two = rng.random() < two_words
        scene = scenes.sample_scene(rng, size)
        while two and not (scene.sign and len(scene.sign.words) == 2):
            scene = scenes.sample_scene(rng, size)
        drawn.append(scene)
    return drawn, np.stack([scenes.render(scene, small_d) for scene in drawn])


def draw_scenes(
    seed: int, size: tuple[int, int], count: int, two_words: float, small_d: bool, workers: int, things: bool = False
) -> Iterator[tuple[list[scenes.Scene], np.ndarray]]:
    """Yield the chunks of a pool in order, drawn by `workers` processes (0: by this one)."""
    counts = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    arguments = [(seed, size, chunk, n, two_words, small_d, things) for chunk, n in enumerate(counts)]
    if workers == 0:
        yield from (draw_chunk(*values) for values in arguments)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as processes:
        yield from processes.map(draw_chunk, *zip(*arguments, strict=True))


@torch.no_grad()
def build_pool(
    model: AutoEncoder | None,
    size: tuple[int, int],
    count: int,
    *,
    seed: int,
    sign_weight: float,
    thing_weight: float,
    two_words: float = 0.0,
    small_d: bool = False,
    things: bool = False,
    workers: int = 0,
    device: str = "cpu",
    latents: Tensor | None = None,
) -> Pool:
    """Return `count` training scenes of one size (height, width): a function of the seed and the autoencoder.

    Args:
        model: encodes the images; not needed if `latents`, from an earlier call, are given.
        sign_weight, thing_weight: as in `token_weights`.
        two_words: share of scenes that must have a sign with two words, in addition to those that happen to have one.
        small_d: as for `scenes.render`.
        things: single things without a sign only.
        workers: processes that draw scenes. The result does not depend on their number.
    """
    drawn: list[scenes.Scene] = []
    encoded = []
    for chunk, images in draw_scenes(seed, size, count, two_words, small_d, workers, things):
        drawn += chunk
        for start in range(0, len(chunk) if latents is None else 0, BATCH):
            pixels = to_pixels(images[start : start + BATCH])
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                mean, _ = model.encoder(pixels.to(device, memory_format=torch.channels_last)).chunk(2, dim=1)
            encoded.append(family_of(model.params).pack(model.normalise(mean.float())).bfloat16().cpu())
    weights = torch.stack([token_weights(scene, sign=sign_weight, thing=thing_weight) for scene in drawn])
    return Pool(size, drawn, torch.cat(encoded) if latents is None else latents, weights)


def captions(drawn: list[scenes.Scene], rng: np.random.Generator, unknown_share: float, full_share: float) -> list[str]:
    """Return a new caption of each scene. A share of them gets an unknown word where it changes no meaning."""
    texts = []
    for scene in drawn:
        draw = rng.random()
        form = "empty" if draw < EMPTY_SHARE else "full" if draw < EMPTY_SHARE + full_share else "partial"
        text = scenes.caption(scene, rng, form)
        if text and rng.random() < unknown_share:
            words = text.split()
            said = words.index("says") if "says" in words else len(words)
            words.insert(int(rng.integers(0, said + 1)), NOISE_WORD)
            text = " ".join(words)
        texts.append(text)
    return texts
