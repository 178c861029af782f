"""The one entry to attention. Every block of the transformer goes through `attend`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 4 << 20
"""Scores that `dense_attention` holds at a time: with their bf16 copy they fit two cores' share of a cache."""


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may look) as an additive one: the CPU flash kernel takes no booleans.

    Raises `ValueError` for integers: 0 and 1 would be added to the scores, and mask nothing.
    """
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}: expected booleans (True = may look) or floats to add to scores")
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d + mask)·v for `(B, H, N, d)` queries, keys and values, in v's dtype.

    q and k may be more precise than v. `mask` is additive in v's dtype and broadcasts to `(B, H, N, N)`.

    The kernel follows from device, dtype, length, mask and whether gradients are on, and from nothing else: on the CPU
    in bf16, 256 keys or more without mask and gradients take `dense_attention`, everything else PyTorch's own (flash on
    the CPU). The two differ by rounding only; below 256 keys flash rounds better and takes no longer.
    """
    if kernel(v.device.type, v.dtype, v.shape[2]) == "dense" and mask is None and not torch.is_grad_enabled():
        return dense_attention(q, k, v)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)


def kernel(device: str, dtype: torch.dtype, keys: int) -> str:
    """Which kernel attention takes without mask and gradients: "dense" (`dense_attention`) or "sdpa" (PyTorch's)."""
    return "dense" if device == "cpu" and dtype == torch.bfloat16 and keys >= 256 else "sdpa"


def heads_inside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape `(B, H, N, d)`, `(B, N, H, d)` in memory, so that merging heads copies nothing."""
    B, H, N, d = x.shape
    return x.new_empty((B, N, H, d), dtype=dtype).transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by matrix products: scores and softmax in fp32, probabilities rounded to v's dtype once.

    PyTorch's flash kernel runs bf16 on the CPU at the speed of fp32; this takes 0.8 of its time and is as exact.
    (Scores in bf16 would take 0.55, but double the error.) One op to torch.compile, which would unroll the loops.
    """
    return (_dense_attention_op if torch.compiler.is_compiling() else _dense_attention)(q, k, v)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (B, H, queries, d), keys = q.shape, k.shape[2]
    q, k = q.float(), k.float().transpose(2, 3)
    out = heads_inside(q, v.dtype)
    heads = max(1, min(H, SCORE_BYTES // (4 * queries * keys)))
    rows = max(1, min(queries, SCORE_BYTES // (4 * keys)))
    buffer = torch.empty(heads * rows * keys, dtype=torch.float32)
    for b in range(B):
        for h in range(0, H, heads):
            for i in range(0, queries, rows):
                part = q[b, h : h + heads, i : i + rows]
                shape = (*part.shape[:2], keys)
                s = buffer[: math.prod(shape)].view(shape)
                torch.baddbmm(s, part, k[b, h : h + heads], beta=0, alpha=1 / math.sqrt(d), out=s)
                p = torch.softmax(s, dim=-1, out=s).to(v.dtype)
                out[b, h : h + heads, i : i + rows] = torch.bmm(p, v[b, h : h + heads])
    return out


_dense_attention_op = torch.library.custom_op("fluxlab::dense_attention", _dense_attention, mutates_args=())
_dense_attention_op.register_fake(lambda q, k, v: heads_inside(q, v.dtype))
