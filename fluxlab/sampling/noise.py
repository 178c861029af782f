"""Starting noise, with one generator per seed."""

from collections.abc import Sequence
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError


def noise(
    seeds: Sequence[int], channels: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b c h w"]:
    """Return unit normal latents `(len(seeds), channels, height, width)` on the CPU. Sizes are in latent pixels.

    Each image is drawn in `dtype` from its own CPU generator, as in Diffusers. It depends neither on the batch nor on
    the device (as in EDM, arXiv 2206.00364). Raises `UserError` for a seed outside of 0 … 2^64 - 1.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
            raise UserError(f"seed {seed!r}: expected a whole number from 0 to 2^64 - 1")
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    return torch.cat([torch.randn(1, channels, height, width, dtype=dtype, generator=g) for g in generators])
