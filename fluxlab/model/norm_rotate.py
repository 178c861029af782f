"""RMSNorm and rotation of queries and keys, without gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab.model.operators import operator
from fluxlab.model.rope import Rotary, apply_rotary_, turn_pairs_


def norm_and_rotate(parts: Sequence[Tensor], scales: Sequence[Tensor], table: Rotary) -> Tensor:
    """Return queries, keys or both after RMSNorm and rotation: `(B, N, S, H, d)`, in the dtype of the table.

    parts: `(B, L, S, H, d)` of each stream, with S = 2 for queries and keys. scales: `(S, d)` of each stream.
    """
    table = Rotary(*(x.transpose(1, 2)[:, :, None] for x in table))
    if torch.compiler.is_compiling():
        return _traced(parts, scales, table)
    # 1/rms is applied last, in the same buffer: a rotation does not change lengths.
    tokens = [part.shape[1] for part in parts]
    out = parts[0].new_empty((len(parts[0]), sum(tokens), *parts[0].shape[2:]), dtype=table.cos.dtype)
    places = out.split(tokens, dim=1)
    for part, place in zip(parts, places, strict=True):
        place.copy_(part)
    rms = torch.linalg.vector_norm(out, dim=-1, keepdim=True).square_().div_(out.shape[-1]).add_(1e-6).sqrt_()
    for scale, place in zip(scales, places, strict=True):
        place.mul_(scale[:, None])
    return apply_rotary_(out, table).div_(rms)


def _traced(parts: Sequence[Tensor], scales: Sequence[Tensor], table: Rotary) -> Tensor:
    """Return the same for torch.compile, which computes the norm in one loop. 1/rms is applied before the rotation."""
    exact = [part.to(table.cos.dtype) for part in parts]
    rms = [x.square().mean(-1, keepdim=True).add(1e-6).sqrt() for x in exact]
    normed = [x * scale[:, None] / r for x, scale, r in zip(exact, scales, rms, strict=True)]
    out = (normed[0] if len(normed) == 1 else torch.cat(normed, dim=1)).contiguous()
    _rotate_(out, torch.stack(table, dim=-1))  # inductor stacks them once for all blocks
    return out


# One operator for torch.compile too: it has no code for complex numbers, and its code for pairs of channels is slower.
_rotate_ = operator(
    "rotate_(Tensor(a!) x, Tensor table) -> ()",
    lambda x, table: turn_pairs_(x, torch.view_as_complex(table)),
    lambda x, table: None,
)
