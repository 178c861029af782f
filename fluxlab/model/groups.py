"""Attention in which groups of queries see the keys at different positions: once a group, each with a key table."""

from typing import NamedTuple

import torch
from torch import Tensor

from fluxlab.model.attention import attend
from fluxlab.model.rope import Rotary, apply_rotary


class KeyGroups(NamedTuple):
    """A partition of the queries: index tensors that together hold 0 … N - 1 once, and for each the keys' table."""

    queries: tuple[Tensor, ...]
    tables: tuple[Rotary, ...]


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, groups: KeyGroups, mask: Tensor | None = None) -> Tensor:
    """As `attend`, for turned queries and keys not yet turned, `(B, H, N, d)`; the mask is `(B or 1, H or 1, N, N)`."""
    parts = []
    for queries, table in zip(*groups, strict=True):
        rows = None if mask is None else mask.expand(*mask.shape[:2], q.shape[2], -1)[:, :, queries]
        parts.append(attend(q[:, :, queries], apply_rotary(k, table), v, rows))
    order = torch.cat(groups.queries).argsort()
    return torch.cat(parts, dim=2)[:, :, order]
