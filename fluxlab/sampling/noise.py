"""Starting noise, one generator a seed."""

from collections.abc import Sequence
from numbers import Integral

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError


def noise(
    seeds: Sequence[int], channels: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b c h w"]:
    """Unit normal latents `(len(seeds), channels, height, width)`, sizes in latent pixels, on the CPU.

    Every image has a CPU generator of its own and is drawn in `dtype`, so image i depends on neither its batch nor the
    device (EDM's rule, arXiv 2206.00364; the draw is Diffusers'). Raises `UserError` for a seed not in 0 … 2^64-1.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64:
            raise UserError(f"seed {seed!r}: a whole number from 0 to 2^64 - 1 is needed")
    return torch.cat(
        [
            torch.randn(
                1, channels, height, width, dtype=dtype, generator=torch.Generator("cpu").manual_seed(int(seed))
            )
            for seed in seeds
        ]
    )
