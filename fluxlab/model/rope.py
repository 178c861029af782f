"""Rotary position embedding over several axes (RoFormer, arXiv 2104.09864), in FLUX's interleaved layout.

Ids are fp32, angles are fp64, tables are fp32, whatever the model's dtype: bf16 ids collapse neighbouring positions
and fp32 angles are off by 1e-5 at id 255 (docs/numerics.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError


class Rotary(NamedTuple):
    """One rotary table: cos and sin of every angle, each `(B or 1, H or 1, N, d/2)`."""

    cos: Tensor
    sin: Tensor


def frequencies(dim: int, theta: float) -> Float[Tensor, " d"]:
    """ω_i = θ^(-2i/dim), i = 0 … dim/2 - 1, in radians a position step. fp64, shape `(dim/2,)`."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def check_ids(name: str, ids: Tensor, *, batch: int, tokens: int, axes: int, dtype: torch.dtype) -> None:
    """Raise `UserError` unless `ids` is `(batch or 1, tokens, axes)` in `dtype`."""
    if ids.ndim != 3:
        raise UserError(f"{name} has shape {tuple(ids.shape)}: ids are per sample, (B, N, A); add the batch axis")
    if ids.dtype != dtype:
        raise UserError(f"{name} has dtype {ids.dtype}: ids are {dtype} (bf16 and integer ids lose positions)")
    if ids.shape[0] not in (1, batch) or ids.shape[1:] != (tokens, axes):
        raise UserError(f"{name} has shape {tuple(ids.shape)}, but the tokens need ({batch}, {tokens}, {axes})")


def rotary_table(ids: Float[Tensor, "b n a"], axes_dim: Sequence[int], theta: float) -> Rotary:
    """The table for `ids` `(B, N, A)`, axis a taking `axes_dim[a]` of the head's width in turn.

    Positions may be fractional or negative. fp32 ids give fp32 tables, fp64 ids fp64 tables; differentiable in `ids`.
    """
    if ids.shape[-1] != len(axes_dim):
        raise UserError(f"ids have {ids.shape[-1]} axes, the model has {len(axes_dim)} (axes_dim {tuple(axes_dim)})")
    exact = _on_fp64_device(ids).double()
    angles = torch.cat(
        [exact[..., a, None] * frequencies(dim, theta).to(exact.device) for a, dim in enumerate(axes_dim)], dim=-1
    )[:, None]  # (B, 1, N, d/2)
    return Rotary(*(part.to(ids.dtype).to(ids.device) for part in (angles.cos(), angles.sin())))


def _on_fp64_device(ids: Tensor) -> Tensor:
    """Return `ids` where fp64 exists: on the host for devices such as MPS. Meta tensors have a shape only."""
    if ids.device.type in ("cpu", "cuda"):
        return ids
    return torch.zeros(ids.shape, dtype=ids.dtype) if ids.is_meta else ids.cpu()


def apply_rotary(x: Tensor, table: Rotary) -> Tensor:
    """Turn the pairs (2k, 2k+1) of `x` `(B, H, N, d)` by the table's angles. Result in the table's dtype."""
    pairs = x.to(table.cos.dtype).unflatten(-1, (-1, 2))
    x0, x1 = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((table.cos * x0 - table.sin * x1, table.sin * x0 + table.cos * x1), dim=-1)
    return turned.flatten(-2)


def apply_rotary_(x: Tensor, table: Rotary) -> Tensor:
    """`apply_rotary` in place, `x` being in the table's dtype: one complex product, a quarter of the memory traffic.

    Not under torch.compile, which has no code for complex numbers and fuses the formula above by itself.
    """
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.complex(table.cos, table.sin))
    return x
