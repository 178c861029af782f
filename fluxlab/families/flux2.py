"""FLUX.2: four axes (t, h, w, l), text in order on l, latents whose pixels are tokens already."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from fluxlab import sampling
from fluxlab.families.family import Family
from fluxlab.model import TRANSFORMERS2, AutoEncoder2Params, Flux2Params

AXES = ("t", "h", "w", "l")
REFERENCE_STEP = 10
"""Distance of the images on t: the references are at 10, 20, 30, …"""


def text_ids(tokens: int) -> Tensor:
    """(0, 0, 0, i) for text token i."""
    ids = torch.zeros(tokens, len(AXES), dtype=torch.float32)  # not the default dtype, which may be bf16
    ids[:, 3] = torch.arange(tokens)
    return ids


def image_ids(rows: int, cols: int, n: int) -> Tensor:
    """(0, row, col, 0) for the image, and (10·n, row, col, 0) for reference image n, counted from 1."""
    ids = sampling.image_ids(1, rows, cols, len(AXES))[0]
    ids[:, 0] = REFERENCE_STEP * n
    return ids


def noise(seeds: Sequence[int], channels: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Drawn with a token's channels on the token grid, as in Diffusers."""
    return pack(sampling.noise(seeds, 4 * channels, rows, cols, dtype))


def pack(latents: Tensor) -> Tensor:
    """Return the pixels of normalised patches `(B, C, rows, cols)` as tokens, row by row."""
    return rearrange(latents, "b c h w -> b (h w) c")


def unpack(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Return the patches of tokens: the inverse of `pack`."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=rows, w=cols)


FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    transformer_params=Flux2Params,
    autoencoder_params=AutoEncoder2Params,
    sizes=TRANSFORMERS2,
    axes=AXES,
    text_ids=text_ids,
    image_ids=image_ids,
    noise=noise,
    pack=pack,
    unpack=unpack,
    schedule=sampling.FLUX2_SCHEDULE,
    guidance=4.0,
)
