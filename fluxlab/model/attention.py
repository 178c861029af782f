"""The one entry to attention. Every block of the transformer goes through `attend`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may look) as an additive one: the CPU flash kernel takes no booleans."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d + mask)·v for `(B, H, N, d)` queries, keys and values.

    `mask` is additive in q's dtype and broadcasts to `(B, H, N, N)`.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
