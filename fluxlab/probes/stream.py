"""Probabilities of the queries and keys that were asked for, computed a stretch at a time and never kept."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fluxlab.model.attention import Attended

Places = slice | Tensor
"""Places in a sequence: a slice where they follow each other (nothing is copied then), else whole numbers `(n,)`."""

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""What the probabilities of a stretch may take: a cache's size on the CPU, enough to be busy with on a GPU."""


def chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


class Tokens(NamedTuple):
    """Places in the sequence: whole numbers `(n,)`, and the same as a slice where they follow each other."""

    index: Tensor
    places: Places

    def __len__(self) -> int:
        return len(self.index)


def tokens(index: Tensor) -> Tokens:
    return Tokens(index, places(index))


def places(index: Tensor) -> Places:
    """`(n,)` whole numbers, as a slice where they follow each other."""
    if len(index) and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def take(x: Tensor, dim: int, which: Places | None) -> Tensor:
    """x at some places of a dimension; None for all."""
    if which is None:
        return x
    if isinstance(which, slice):
        return x.narrow(dim, which.start, which.stop - which.start)
    return x.index_select(dim, which)


def present(wanted: Tokens, queries: Tensor | None) -> tuple[Places, Places]:
    """Of the `wanted` tokens, those among a call's `queries`: where they stand in the call, and which of wanted.

    `queries` None: the call has all of the sequence, in order.
    """
    if queries is None:
        return wanted.places, slice(0, len(wanted))
    length = int(torch.cat((wanted.index, queries)).max()) + 1
    at = torch.full((length,), -1, device=queries.device)
    at[queries] = torch.arange(len(queries), device=queries.device)
    at = at[wanted.index]
    which = (at >= 0).nonzero()[:, 0]
    return places(at[which]), places(which)


def probabilities(
    seen: Attended, sample: int, heads: Tensor | None, queries: Tokens, keys: Tokens
) -> Iterator[tuple[Tensor, Places]]:
    """p = exp(q·kᵀ/√d + mask - lse) of one sample, n queries over m keys.

    Yields `(h, stretch, m)` in fp32 (fp64 for an fp64 model) and which of the n queries it is of; each is good until
    the next is asked for. Queries that this call of the kernel does not have are left out. heads: None for all.
    """
    rows, which = present(queries, seen.queries)
    exact = torch.promote_types(seen.q.dtype, torch.float32)
    q = take(seen.q[sample], 0, heads)
    k = take(take(seen.k[sample], 0, heads), 1, keys.places).to(exact).mT
    lse = take(seen.lse[sample], 0, heads)
    H, d, m = k.shape
    n = _count(rows)
    step = max(1, chunk_bytes(q.device) // (H * max(1, m) * exact.itemsize))
    buffer = torch.empty(H * min(step, n) * m, dtype=exact, device=q.device)
    for i in range(0, n, step):
        stop = min(i + step, n)
        here = _part(rows, i, stop)
        p = buffer[: H * (stop - i) * m].view(H, stop - i, m)
        bias = -take(lse, 1, here)[..., None]
        if seen.mask is not None:
            bias = bias + _masked(seen.mask, sample, heads, here, keys.places)
        torch.baddbmm(bias.to(exact).expand_as(p), take(q, 1, here).to(exact), k, alpha=1 / math.sqrt(d), out=p)
        yield p.exp_(), _part(which, i, stop)


def _masked(mask: Tensor, sample: int, heads: Tensor | None, rows: Places, cols: Places) -> Tensor:
    """A part of a mask that broadcasts to `(B, H, n, N)`: `(h or 1, rows or 1, cols or 1)`, never more of it copied."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[sample if len(mask) > 1 else 0]
    for dim, which in ((1, rows), (2, cols), (0, heads)):
        mask = take(mask, dim, which) if mask.shape[dim] > 1 else mask
    return mask


def _count(where: Places) -> int:
    return where.stop - where.start if isinstance(where, slice) else len(where)


def _part(where: Places, start: int, stop: int) -> Places:
    return slice(where.start + start, where.start + stop) if isinstance(where, slice) else where[start:stop]
