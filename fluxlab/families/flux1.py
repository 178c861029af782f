"""FLUX.1: three axes (index, row, col), text without positions, latents packed in patches of 2 × 2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab import sampling
from fluxlab.families.family import Family
from fluxlab.model import TRANSFORMERS, AutoEncoderParams, FluxParams

AXES = ("index", "row", "col")


def text_ids(tokens: int) -> Tensor:
    """Zeros. T5's states already contain the order of the words."""
    return sampling.text_ids(1, tokens)[0]


def image_ids(rows: int, cols: int, n: int) -> Tensor:
    """(0, row, col) for the image, and (n, row, col) for reference image n: Kontext's layout, continued."""
    ids = sampling.image_ids(1, rows, cols)[0]
    ids[:, 0] = n
    return ids


def noise(seeds: Sequence[int], channels: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Drawn as a latent image, then packed, as in Diffusers."""
    return sampling.pack(sampling.noise(seeds, channels, 2 * rows, 2 * cols, dtype))


FLUX1 = Family(
    name="flux1",
    title="FLUX.1",
    transformer_params=FluxParams,
    autoencoder_params=AutoEncoderParams,
    sizes=TRANSFORMERS,
    axes=AXES,
    text_ids=text_ids,
    image_ids=image_ids,
    noise=noise,
    pack=sampling.pack,
    unpack=sampling.unpack,
    schedule=sampling.FLUX_SCHEDULE,
    guidance=3.5,
)
