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
    rotated = torch.stack((table.cos * x0 - table.sin * x1, table.sin * x0 + table.cos * x1), dim=-1)
    return rotated.flatten(-2)


def apply_rotary_(x: Tensor, table: Rotary) -> Tensor:
    """Rotate `x` in place, and return it. `x` has the dtype of the table.

    One complex product has a quarter of the memory traffic of `apply_rotary`. torch.compile has no code for complex
    numbers; it fuses the formula of `apply_rotary` itself.
    """
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.complex(table.cos, table.sin))
    return x


def norm_and_rotate_compiled(x: Tensor, scales: list[Tensor], lengths: list[int], cos: Tensor, sin: Tensor) -> Tensor:
    """Return RMSNorm and rotation of `(B, H, N, d)` in the table's dtype, in a form that inductor vectorises.

    Scale i applies to the next `lengths[i]` tokens. The formula of `apply_rotary` joins two halves of every pair, which
    inductor computes element by element. Here each element is read once in place and once as the other of its pair.
    """
    wide, signed = _each_channel(cos, sin)
    x = x.to(cos.dtype)
    rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rows = [scale.expand(n, -1) for scale, n in zip(scales, lengths, strict=True)]
    x = x * (scales[0] if len(scales) == 1 else torch.cat(rows))
    other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * wide + other * signed) / rms


@torch.library.custom_op("fluxlab::each_channel", mutates_args=())
def _each_channel(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and ±sin of every channel, `(…, d)`. One operator, so that they are computed once for all blocks."""
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), dim=-1).flatten(-2)


@_each_channel.register_fake
def _(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = cos.new_empty((*cos.shape[:-1], 2 * cos.shape[-1]))
    return wide, torch.empty_like(wide)
