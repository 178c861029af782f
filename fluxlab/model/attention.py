"""The one entry to attention. Every block of the transformer goes through `attend`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError

SCORE_BYTES = 4 << 20
"""Scores that `dense_attention` holds at a time: with their bf16 copy they fit two cores' share of a cache."""


class Attended(NamedTuple):
    """What one call of a kernel worked with, in the precision that it read: p = exp(q·kᵀ/√d + mask - lse), to its own
    rounding, are the probabilities that it weighed the values with.

    q `(B, H, n, d)`, k `(B, H, N, d)`. lse `(B, H, n)`, fp32 or fp64: the kernel's logarithm of each query's sum of
    exponentials. mask: additive, broadcasts to `(B, H, n, N)`, or None. queries `(n,)`: where these stand in the
    sequence; None for all of it in order.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    mask: Tensor | None
    queries: Tensor | None


Tap = Callable[[Attended], None]
"""Looks on while a block attends. It must change nothing that it is handed."""


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may look) as an additive one: the CPU flash kernel takes no booleans.

    Raises `UserError` for integers: 0 and 1 would be added to the scores, and mask nothing.
    """
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise UserError(f"mask has dtype {mask.dtype}: expected booleans (True = may look) or floats to add to scores")
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    tap: Tap | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ/√d + mask)·v for `(B, H, n, d)` queries and `(B, H, N, d)` keys and values, in v's dtype.

    q and k may be more precise than v. `mask` is additive in v's dtype and broadcasts to `(B, H, n, N)`. A `tap` is
    shown what the kernel worked with, and its log-sum-exp; `queries` tells it where in the sequence these stand.

    The kernel follows from device, dtype, length, mask and whether gradients are on, and from nothing else, least of
    all from a tap: on the CPU in bf16, 256 keys or more without mask and gradients take `dense_attention`, everything
    else PyTorch's own (flash on the CPU). The two differ by rounding only; below 256 keys flash rounds better and takes
    no longer.
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


def dense_attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`dense_attention` to the bit, and its log-sum-exp `(B, H, n)` in fp32."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    return _dense_attention(q, k, v, lse), lse


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None) -> Tensor:
    (B, H, queries, d), keys = q.shape, k.shape[2]
    q, k = q.float(), k.float().transpose(2, 3)
    out = heads_inside(q, v.dtype)
    heads = max(1, min(H, SCORE_BYTES // (4 * queries * keys)))
    rows = max(1, min(queries, SCORE_BYTES // (4 * keys)))
    buffer = torch.empty(heads * rows * keys, dtype=torch.float32)
    for b in range(B):
        for h in range(0, H, heads):
            for i in range(0, queries, rows):
                here = (b, slice(h, h + heads), slice(i, i + rows))
                part = q[here]
                shape = (*part.shape[:2], keys)
                s = buffer[: math.prod(shape)].view(shape)
                torch.baddbmm(s, part, k[here[:2]], beta=0, alpha=1 / math.sqrt(d), out=s)
                highest = None if lse is None else s.amax(-1)
                p = torch.softmax(s, dim=-1, out=s)
                if lse is not None:  # the largest p is exp(highest - lse)
                    lse[here] = highest - p.amax(-1).log_()
                out[here] = torch.bmm(p.to(v.dtype), v[here[:2]])
    return out


# torch.compile reads an operator's schema from its annotations: this one knows nothing of log-sum-exps.
_dense_attention_op = torch.library.custom_op(
    "fluxlab::dense_attention", _dense_attention, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor"
)
_dense_attention_op.register_fake(lambda q, k, v: heads_inside(q, v.dtype))


def fused_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`F.scaled_dot_product_attention` by the kernel that it would choose itself, and that kernel's log-sum-exp.

    `(B, H, n, d)` in one dtype → the same output (to the bit on the CPU) and `(B, H, n)` in fp32 or fp64.
    """
    ops, backend = torch.ops.aten, torch.nn.attention.SDPBackend
    scale = 1 / math.sqrt(q.shape[-1])
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
    if choice == backend.FLASH_ATTENTION.value and q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    elif choice == backend.FLASH_ATTENTION.value:
        padded = [F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k, v)]  # it takes widths of eights
        out, lse = ops._scaled_dot_product_flash_attention(*padded, scale=scale)[:2]
    elif choice == backend.EFFICIENT_ATTENTION.value:
        out, lse = ops._scaled_dot_product_efficient_attention(q, k, v, _aligned(mask, q, k), True)[:2]
    elif choice == backend.CUDNN_ATTENTION.value:
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, mask, True)[:2]
    else:  # the formula itself (masks of an odd shape, kernels switched off), which has no log-sum-exp to give
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        lse = _log_sum_exp(q, k, mask)
    return out[..., : v.shape[-1]], lse.detach().flatten(2)[..., : q.shape[2]]  # some kernels pad


def _aligned(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask as the memory-efficient kernel takes it: expanded, its rows starting at multiples of 16 entries."""
    if mask is None:
        return None
    keys = k.shape[2]
    return F.pad(mask, (0, -keys % 16))[..., :keys].expand(*q.shape[:3], keys)


@torch.no_grad()
def _log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).mT / math.sqrt(q.shape[-1])
    return torch.logsumexp(scores if mask is None else scores + mask, dim=-1)
