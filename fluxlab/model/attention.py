"""The one entry to attention. Every block of the transformer goes through `attend`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 4 << 20
"""Scores that `dense_attention` holds at a time: with their bf16 copy they fit two cores' share of a cache."""


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may look) as an additive one: the CPU flash kernel takes no booleans."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d + mask)·v for `(B, H, N, d)` queries, keys and values, in v's dtype.

    q and k may be more precise than v. `mask` is additive in v's dtype and broadcasts to `(B, H, N, N)`.

    The kernel follows from device, dtype, mask and whether gradients are on, and from nothing else: bf16 on the CPU
    without mask and gradients takes `dense_attention`, everything else PyTorch's own (flash on the CPU). The two differ
    by rounding only.
    """
    if v.device.type == "cpu" and v.dtype == torch.bfloat16 and mask is None and not torch.is_grad_enabled():
        return dense_attention(q, k, v)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)


def _like_joint(v: Tensor) -> Tensor:
    """An empty `(B, H, N, d)` whose memory is `(B, N, H, d)`, so that merging the heads copies nothing."""
    B, H, N, d = v.shape
    return v.new_empty(B, N, H, d).transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by matrix products: scores and softmax in fp32, probabilities rounded to v's dtype once.

    PyTorch's flash kernel runs bf16 on the CPU at the speed of fp32; this one takes 0.8 of its time and is as exact. (Scores
    in bf16 would take 0.55, but double the error.) One op to torch.compile, which would otherwise unroll the loops.
    """
    return (_dense_attention_op if torch.compiler.is_compiling() else _dense_attention)(q, k, v)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, N, d = v.shape
    q, k = q.float(), k.float().transpose(2, 3)
    out = _like_joint(v)
    heads = max(1, min(H, SCORE_BYTES // (4 * N * N)))
    rows = max(1, min(N, SCORE_BYTES // (4 * N)))
    scores = torch.empty(heads * rows * N, dtype=torch.float32)
    for b in range(B):
        for h in range(0, H, heads):
            for i in range(0, N, rows):
                part = q[b, h : h + heads, i : i + rows]
                s = scores[: part.shape[0] * part.shape[1] * N].view(*part.shape[:2], N)
                torch.baddbmm(s, part, k[b, h : h + heads], beta=0, alpha=1 / math.sqrt(d), out=s)
                p = torch.softmax(s, dim=-1, out=s).to(v.dtype)
                out[b, h : h + heads, i : i + rows] = torch.bmm(p, v[b, h : h + heads])
    return out


_dense_attention_op = torch.library.custom_op("fluxlab::dense_attention", _dense_attention, mutates_args=())
_dense_attention_op.register_fake(lambda q, k, v: _like_joint(v))
