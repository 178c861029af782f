"""Attention in which groups of queries see the keys at different positions: one call per group, with its own table."""

from typing import NamedTuple

import torch
from torch import Tensor

from fluxlab.model.attention import Tap, attend, empty_token_major
from fluxlab.model.rope import Rotary, apply_rotary, apply_rotary_


class KeyGroups(NamedTuple):
    """A partition of the queries, and a rotary table of the keys for each part.

    queries: index tensors that together hold 0 … N - 1 once. tables: one table for each of them. on_host: the same
    indices in main memory, for probes, which would otherwise wait for the device to read them; None if `queries` are.
    """

    queries: tuple[Tensor, ...]
    tables: tuple[Rotary, ...]
    on_host: tuple[Tensor, ...] | None = None

    @property
    def identity(self) -> Rotary:
        """A table that rotates nothing. The keys are rotated later, by each group."""
        cos = self.tables[0].cos[:1, :1]
        return Rotary(torch.ones_like(cos), torch.zeros_like(cos))


def attend_in_groups(
    q: Tensor, k: Tensor, v: Tensor, groups: KeyGroups, mask: Tensor | None = None, tap: Tap | None = None
) -> Tensor:
    """Return attention for rotated queries and keys that are not yet rotated, all `(B, H, N, d)`.

    The mask is `(B or 1, H or 1, N, N)`. `tap` is called once per group.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    parts = []
    for queries, table, on_host in zip(groups.queries, groups.tables, groups.on_host or groups.queries, strict=True):
        keys = apply_rotary(k, table) if plain else apply_rotary_(k.clone(), table)
        rows = None if mask is None else mask.expand(*mask.shape[:2], q.shape[2], -1)[:, :, queries]
        parts.append(attend(q.index_select(2, queries), keys, v, rows, tap, on_host))
    if plain:
        return torch.cat(parts, dim=2)[:, :, torch.cat(groups.queries).argsort()]
    out = empty_token_major(q, v.dtype)
    for queries, part in zip(groups.queries, parts, strict=True):
        out.index_copy_(2, queries, part)
    return out
