"""Rotary position embedding over several axes (RoFormer, arXiv 2104.09864), in FLUX's interleaved layout.

Ids and tables are fp32 and angles are fp64, whatever the dtype of the model. In bf16 neighbouring ids become equal, and
fp32 angles are off by 1e-5 at id 255 (docs/numerics.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError


class Rotary(NamedTuple):
    """A rotary table: cos and sin of the angles, each `(B or 1, H or 1, N, d/2)`."""

    cos: Tensor
    sin: Tensor


def frequencies(dim: int, theta: float) -> Float[Tensor, " d"]:
    """Return ω_i = θ^(-2i/dim) for i = 0 … dim/2 - 1, in radians per position: fp64, `(dim/2,)`."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def check_ids(name: str, ids: Tensor, *, batch: int, tokens: int, axes: int, dtype: torch.dtype) -> None:
    """Raise `UserError` unless `ids` is `(batch or 1, tokens, axes)` in `dtype`."""
    if ids.ndim != 3:
        raise UserError(f"{name} has shape {tuple(ids.shape)}: expected (B, N, A); add the batch axis")
    if ids.dtype != dtype:
        raise UserError(f"{name} has dtype {ids.dtype}: expected {dtype}; bf16 and integer ids lose positions")
    if ids.shape[0] not in (1, batch) or ids.shape[1:] != (tokens, axes):
        raise UserError(f"{name} has shape {tuple(ids.shape)}: expected ({batch} or 1, {tokens}, {axes})")


def rotary_table(
    ids: Float[Tensor, "b n a"],
    axes_dim: Sequence[int],
    theta: float,
    waves: tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]] | None = None,
) -> Rotary:
    """Return the table for `ids` `(B, N, A)`. Axis a rotates the next `axes_dim[a]` channels of a head.

    Positions may be fractional or negative. The table has the dtype of the ids, fp32 or fp64, and is differentiable in
    them. waves: (frequencies, factors of cos and sin), each `(N or 1, d/2)` in fp64, in place of the model's own.
    Raises `UserError` if the number of axes is not that of `axes_dim`.
    """
    if ids.shape[-1] != len(axes_dim):
        raise UserError(f"ids have {ids.shape[-1]} axes, the model has {len(axes_dim)} (axes_dim {tuple(axes_dim)})")
    exact = _on_fp64_device(ids).double()
    if waves is None:
        turns = [frequencies(dim, theta).to(exact.device) for dim in axes_dim]
    else:
        turns = waves[0].to(exact.device).split([dim // 2 for dim in axes_dim], dim=-1)
    angles = torch.cat([exact[..., a, None] * turn for a, turn in enumerate(turns)], dim=-1)[:, None]  # (B, 1, N, d/2)
    gain = 1 if waves is None else waves[1].to(exact.device)
    return Rotary(*((part * gain).to(ids.dtype).to(ids.device) for part in (angles.cos(), angles.sin())))


def _on_fp64_device(ids: Tensor) -> Tensor:
    """Return `ids` where fp64 exists: on the host for devices such as MPS. Meta tensors have a shape only."""
    if ids.device.type in ("cpu", "cuda"):
        return ids
    return torch.zeros(ids.shape, dtype=ids.dtype) if ids.is_meta else ids.cpu()


def apply_rotary(x: Tensor, table: Rotary) -> Tensor:
    """Return `x` `(B, H, N, d)` with its pairs of channels (2k, 2k+1) rotated, in the dtype of the table."""
    pairs = x.to(table.cos.dtype).unflatten(-1, (-1, 2))
    x0, x1 = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((table.cos * x0 - table.sin * x1, table.sin * x0 + table.cos * x1), dim=-1)
    return turned.flatten(-2)


def apply_rotary_(x: Tensor, table: Rotary) -> Tensor:
    """Rotate `x` in place, and return it. `x` has the dtype of the table.

    One complex product has a quarter of the memory traffic of `apply_rotary`.
    """
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.complex(table.cos, table.sin))
    return x
