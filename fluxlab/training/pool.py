"""Scenes with their latents, drawn and encoded once: neither rendering nor encoding ever stalls a step."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluxlab import scenes
from fluxlab.model import AutoEncoder
from fluxlab.sampling import pack
from fluxlab.scenes.captions import EMPTY_SHARE
from fluxlab.training.autoencoder import to_pixels
from fluxlab.training.seeds import numpy_rng

TOKEN = 4  # image pixels a token, along a side
NOISE_WORD = "photo"  # stands for every word the model does not know


@dataclass
class Pool:
    """Scenes of one size: bf16 latents `(n, tokens, channels)` and each token's weight in the loss `(n, tokens)`."""

    size: tuple[int, int]
    scenes: list[scenes.Scene]
    latents: Tensor
    weights: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // TOKEN, self.size[1] // TOKEN


def token_weights(scene: scenes.Scene, *, sign: float, thing: float) -> Tensor:
    """`(tokens,)`: what a token's error counts for, where a thing's box touches it, where the sign's board does (the
    board lies on top), and 1 elsewhere.
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


@torch.no_grad()
def build_pool(
    model: AutoEncoder | None,
    size: tuple[int, int],
    count: int,
    *,
    seed: int,
    sign_weight: float,
    thing_weight: float,
    device: str = "cpu",
    latents: Tensor | None = None,
    batch: int = 50,
) -> Pool:
    """`count` training scenes of one size (height, width), a pure function of the seed and the autoencoder.

    `latents`, if they are there from an earlier time, take the autoencoder's place.
    """
    rng = numpy_rng(seed, f"pool {size[0]}x{size[1]}", 0)
    drawn = [scenes.sample_scene(rng, size) for _ in range(count)]
    weights = torch.stack([token_weights(scene, sign=sign_weight, thing=thing_weight) for scene in drawn])
    if latents is not None:
        return Pool(size, drawn, latents, weights)
    encoded = []
    for start in range(0, count, batch):
        pixels = to_pixels(np.stack([scenes.render(scene) for scene in drawn[start : start + batch]]))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            mean, _ = model.encoder(pixels.to(device, memory_format=torch.channels_last)).chunk(2, dim=1)
        z = (mean.float() - model.params.shift_factor) * model.params.scale_factor
        encoded.append(pack(z).bfloat16().cpu())
    return Pool(size, drawn, torch.cat(encoded), weights)


def captions(drawn: list[scenes.Scene], rng: np.random.Generator, unknown_share: float, full_share: float) -> list[str]:
    """A fresh caption of every scene; in a share of them one unknown word is put where it changes nothing."""
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
