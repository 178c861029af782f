"""Latent images as sequences of tokens, and the ids of FLUX.1."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def pack(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c4"]:
    """Return each 2 × 2 patch of a latent image as a token: `(B, C, 2h, 2w)` → `(B, h·w, 4·C)`, order (c, ph, pw)."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Float[Tensor, "b n c4"], rows: int, cols: int) -> Float[Tensor, "b c h w"]:
    """Return the latent image of `rows` × `cols` tokens: the inverse of `pack`."""
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=cols, ph=2, pw=2)


def image_ids(batch: int, rows: int, cols: int, axes: int = 3) -> Float[Tensor, "b n a"]:
    """Return FLUX.1's ids of an image: (0, row, col) for each token in raster order, fp32."""
    ids = torch.zeros(rows, cols, axes, dtype=torch.float32)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(cols)[None, :]
    return rearrange(ids, "h w a -> 1 (h w) a").repeat(batch, 1, 1)


def text_ids(batch: int, tokens: int, axes: int = 3) -> Float[Tensor, "b l a"]:
    """Return FLUX.1's ids of a text: zeros, fp32. T5's states already contain the order of the words."""
    return torch.zeros(batch, tokens, axes, dtype=torch.float32)
