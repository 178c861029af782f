"""Attention. Every block of the transformer calls `attend`, and nothing else computes attention."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model.operators import operator
from fluxlab.model.torch_ops import fused_attention_with_lse

SCORE_BYTES = 4 << 20
"""Bytes of scores that `dense_attention` computes at a time. With a bf16 copy they fit the cache of two cores."""


_CPU = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10 and newer have it
BF16_TILES = bool(_CPU.get("amx_bf16")) and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
"""Whether PyTorch's flash kernel multiplies tiles of bf16 on this CPU (AMX)."""


class ScoreFactor(NamedTuple):
    """A factor of scores q·kᵀ/√d, before the mask.

    factor: `(n, N)`. heads: `(H,)`, the share of it that acts in each head, from 0 to 1; None for all of it.
    positive: whether it multiplies positive scores only.
    """

    factor: Tensor
    heads: Tensor | None
    positive: bool


def score_factors(scores: Tensor, factors: Sequence[ScoreFactor], rows: slice) -> Tensor:
    """Return scores `(H, r, N)`, those of some rows of a call, multiplied by the factors in order."""
    for factor, heads, positive in factors:
        by = factor[rows].to(scores)
        if heads is not None:
            by = 1 + heads.to(scores)[:, None, None] * (by - 1)
        scores = torch.where(scores > 0, scores * by, scores) if positive else scores * by
    return scores


class Attended(NamedTuple):
    """What one call of a kernel computed with, in the precision that the kernel read.

    p = exp(f(q·kᵀ/√d) + mask - lse) are the probabilities that weighed the values, up to the kernel's rounding. f
    multiplies scores by the sample's factors.

    q: `(B, H, n, d)`. k: `(B, H, N, d)`.
    lse: `(B, H, n)`, fp32 or fp64. The log-sum-exp of each query's scores, from the kernel.
    mask: additive, broadcasts to `(B, H, n, N)`, or None.
    queries: `(n,)`, in main memory if possible: the positions of these queries in the sequence. None for the whole
        sequence in order.
    factors: those of each sample; None if no sample has any.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    mask: Tensor | None
    queries: Tensor | None
    factors: tuple[tuple[ScoreFactor, ...], ...] | None = None


Tap = Callable[[Attended], None]
"""A function that observes a block's attention. It must not change the tensors."""


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as floats to add to the scores. In a boolean mask True allows attention.

    Booleans are converted because the CPU's flash kernel rejects them. Raises `UserError` for integer masks: 0 and 1
    would be added to the scores, and nothing would be masked.
    """
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise UserError(
            f"mask has dtype {mask.dtype}: expected booleans (True = attend) or floats to add to the scores"
        )
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    tap: Tap | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Return softmax(q·kᵀ/√d + mask)·v in v's dtype, for queries `(B, H, n, d)` and keys and values `(B, H, N, d)`.

    q and k may be more precise than v. `mask` is additive in v's dtype and broadcasts to `(B, H, n, N)`. `tap` is
    called with what the kernel computed with and its log-sum-exp. `queries` are the positions that it is given.

    The kernel depends on device, dtype, length, mask, and whether gradients are recorded. It never depends on `tap`.
    On a CPU without AMX in bf16, with 256 keys or more and without mask and gradients, it is `dense_attention`.
    Otherwise it is PyTorch's own, which is flash on the CPU. The two differ by rounding only. Below 256 keys flash
    rounds better and is as fast.
    """
    if kernel(v.device.type, v.dtype, v.shape[2]) == "dense" and mask is None and not torch.is_grad_enabled():
        if tap is None:
            return dense_attention(q, k, v)
        out, lse = dense_attention_with_lse(q, k, v)
    else:
        q, k = q.to(v.dtype), k.to(v.dtype)
        if tap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out, lse = fused_attention_with_lse(q, k, v, mask)
    tap(Attended(q, k, lse, mask, queries))
    return out


def kernel(device: str, dtype: torch.dtype, keys: int) -> str:
    """Return the kernel of attention without mask and gradients: "dense" (`dense_attention`) or "sdpa" (PyTorch's)."""
    by_matmul = device == "cpu" and dtype == torch.bfloat16 and not BF16_TILES
    return "dense" if by_matmul and keys >= 256 else "sdpa"


def empty_token_major(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor like x, `(B, H, N, d)`, stored as `(B, N, H, d)` so that heads merge without a copy."""
    B, H, N, d = x.shape
    return x.new_empty((B, N, H, d), dtype=dtype).transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention by matrix products: scores and softmax in fp32, probabilities rounded to v's dtype once.

    On a CPU without AMX PyTorch's flash kernel takes as long in bf16 as in fp32. This takes 0.8 of that time and is as
    exact. Scores in bf16 would take 0.55, with twice the error. (With AMX flash takes a third of this.) It is one
    operator for torch.compile, which would otherwise unroll the loops.
    """
    return (_dense_attention_op if torch.compiler.is_compiling() else _dense_attention)(q, k, v)


def dense_attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return `dense_attention`, with the same bits, and its log-sum-exp `(B, H, n)` in fp32."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    return _dense_attention(q, k, v, lse), lse


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None) -> Tensor:
    (B, H, queries, d), keys = q.shape, k.shape[2]
    q, k = q.float(), k.float().transpose(2, 3)
    out = empty_token_major(q, v.dtype)
    heads = max(1, min(H, SCORE_BYTES // (4 * queries * keys)))
    rows = max(1, min(queries, SCORE_BYTES // (4 * keys)))
    buffer = torch.empty(heads * rows * keys, dtype=torch.float32)
    for b in range(B):
        for h in range(0, H, heads):
            for i in range(0, queries, rows):
                part = (b, slice(h, h + heads), slice(i, i + rows))
                shape = (*q[part].shape[:2], keys)
                s = buffer[: math.prod(shape)].view(shape)
                torch.baddbmm(s, q[part], k[part[:2]], beta=0, alpha=1 / math.sqrt(d), out=s)
                highest = None if lse is None else s.amax(-1)
                p = torch.softmax(s, dim=-1, out=s)
                if lse is not None:  # the largest p is exp(highest - lse)
                    lse[part] = highest - p.amax(-1).log_()
                out[part] = torch.bmm(p.to(v.dtype), v[part[:2]])
    return out


_dense_attention_op = operator(
    "dense_attention(Tensor q, Tensor k, Tensor v) -> Tensor",
    _dense_attention,
    lambda q, k, v: empty_token_major(q, v.dtype),
)
