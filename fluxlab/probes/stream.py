"""Attention weights of selected queries and keys, computed in chunks and never stored."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fluxlab.model.attention import Attended

Indexer = slice | Tensor
"""Positions in a sequence: a slice if they are consecutive (no copy is needed then), else integers `(n,)`."""

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Size of a chunk of attention weights: fits a cache on a CPU, and is large enough to occupy a GPU."""


def chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


class Tokens(NamedTuple):
    """Tokens of a sequence: integers `(n,)`, and the same as an `Indexer`."""

    index: Tensor
    indexer: Indexer

    def __len__(self) -> int:
        return len(self.index)


def tokens(index: Tensor) -> Tokens:
    return Tokens(index, to_indexer(index))


def to_indexer(index: Tensor) -> Indexer:
    """Return a slice if the integers `(n,)` are consecutive, else the integers."""
    if len(index) and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def take(x: Tensor, dim: int, indexer: Indexer | None) -> Tensor:
    """Return entries of x along a dimension; all of them for None."""
    if indexer is None:
        return x
    if isinstance(indexer, slice):
        return x.narrow(dim, indexer.start, indexer.stop - indexer.start)
    return x.index_select(dim, indexer)


def locate(wanted: Tokens, queries: Tensor | None) -> tuple[Indexer, Indexer]:
    """Find the `wanted` tokens that are among the queries of a kernel call.

    Returns their rows in the call, and which of the wanted tokens they are. queries: the position in the sequence of
    each row of the call; None if the call has the whole sequence in order.
    """
    if queries is None:
        return wanted.indexer, slice(0, len(wanted))
    length = int(torch.cat((wanted.index, queries)).max()) + 1
    row = torch.full((length,), -1, device=queries.device)
    row[queries] = torch.arange(len(queries), device=queries.device)
    row = row[wanted.index]
    which = (row >= 0).nonzero()[:, 0]
    return to_indexer(row[which]), to_indexer(which)


def attention_weights(
    attended: Attended, sample: int, heads: Tensor | None, queries: Tokens, keys: Tokens
) -> Iterator[tuple[Tensor, Indexer]]:
    """Yield chunks of p = exp(q·kᵀ/√d + mask - lse) of one sample, for n queries and m keys.

    Yields (p, which): p `(heads, chunk, m)` in fp32, or in fp64 for an fp64 model, and which of the n queries it
    belongs to. p is overwritten by the next chunk. Queries that the kernel call does not contain are skipped.
    heads: integers, or None for all heads.
    """
    rows, which = locate(queries, attended.queries)
    exact = torch.promote_types(attended.q.dtype, torch.float32)
    q = take(attended.q[sample], 0, heads)
    k = take(take(attended.k[sample], 0, heads), 1, keys.indexer).to(exact).mT
    lse = take(attended.lse[sample], 0, heads)
    H, d, m = k.shape
    n = _count(rows)
    step = max(1, chunk_bytes(q.device) // (H * max(1, m) * exact.itemsize))
    buffer = torch.empty(H * min(step, n) * m, dtype=exact, device=q.device)
    for i in range(0, n, step):
        stop = min(i + step, n)
        chunk = _part(rows, i, stop)
        p = buffer[: H * (stop - i) * m].view(H, stop - i, m)
        bias = -take(lse, 1, chunk)[..., None]
        if attended.mask is not None:
            bias = bias + _mask_part(attended.mask, sample, heads, chunk, keys.indexer)
        torch.baddbmm(bias.to(exact).expand_as(p), take(q, 1, chunk).to(exact), k, alpha=1 / math.sqrt(d), out=p)
        yield p.exp_(), _part(which, i, stop)


def _mask_part(mask: Tensor, sample: int, heads: Tensor | None, rows: Indexer, cols: Indexer) -> Tensor:
    """Return a part of a mask that broadcasts to `(B, H, n, N)`, as `(h or 1, rows or 1, cols or 1)`.

    Dimensions that broadcast are not expanded.
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[sample if len(mask) > 1 else 0]
    for dim, indexer in ((1, rows), (2, cols), (0, heads)):
        mask = take(mask, dim, indexer) if mask.shape[dim] > 1 else mask
    return mask


def _count(indexer: Indexer) -> int:
    return indexer.stop - indexer.start if isinstance(indexer, slice) else len(indexer)


def _part(indexer: Indexer, start: int, stop: int) -> Indexer:
    if isinstance(indexer, slice):
        return slice(indexer.start + start, indexer.start + stop)
    return indexer[start:stop]
