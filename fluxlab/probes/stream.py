"""Attention weights of selected queries and keys, computed in chunks and never stored."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fluxlab.model.attention import Attended, ScoreFactor, score_factors


class Places:
    """Positions in a sequence, in any order: the same integers `(n,)` in main memory and on the device of the model."""

    def __init__(self, on_host: Tensor, on_device: Tensor):
        self.on_host, self.on_device = on_host, on_device

    def __len__(self) -> int:
        return len(self.on_host)

    def part(self, start: int, stop: int) -> "Places":
        return Places(self.on_host[start:stop], self.on_device[start:stop])

    def on(self, device: torch.device) -> Tensor:
        return self.on_host if device.type == "cpu" else self.on_device


Indexer = slice | Places
"""Positions in a sequence: a slice if they are consecutive, since no copy is needed then, else `Places`."""

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Size of a chunk of attention weights: fits a cache on a CPU, and is large enough to occupy a GPU."""


def chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of a sequence: integers `(n,)` in main memory, the same as an `Indexer`, and the device of the model."""

    index: Tensor
    indexer: Indexer
    device: torch.device
    _located: dict[int, tuple[Tensor, Indexer, Indexer]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def located(self, queries: Tensor) -> tuple[Indexer, Indexer]:
        """Return what `locate` does. It is found once for each group of queries, and moved to the device once."""
        if id(queries) not in self._located:
            if len(self._located) >= MOST_GROUPS:
                self._located.clear()
            on_host = queries.cpu()
            row = torch.full((int(torch.cat((self.index, on_host)).max()) + 1,), -1)
            row[on_host] = torch.arange(len(on_host))
            row = row[self.index]
            which = (row >= 0).nonzero()[:, 0]
            found = to_indexer(row[which], self.device), to_indexer(which, self.device)
            self._located[id(queries)] = queries, *found  # keeps `queries`, so that no other tensor gets its id
        return self._located[id(queries)][1:]


MOST_GROUPS = 16
"""Groups of queries that `Tokens` remembers. A program has a few, which change when a strength changes."""


def tokens(index: Tensor, device: torch.device | str = "cpu") -> Tokens:
    """Return tokens with the integers `index`, which are in main memory, for a model on `device`."""
    return Tokens(index, to_indexer(index, device), torch.device(device))


def to_indexer(index: Tensor, device: torch.device | str) -> Indexer:
    """Return a slice if the integers `(n,)` are consecutive, else the integers, moved to `device` too."""
    if len(index) and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return Places(index, index.to(device))


def take(x: Tensor, dim: int, indexer: Indexer | Tensor | None) -> Tensor:
    """Return entries of x along a dimension; all of them for None."""
    if indexer is None:
        return x
    if isinstance(indexer, slice):
        return x.narrow(dim, indexer.start, indexer.stop - indexer.start)
    return x.index_select(dim, indexer.on(x.device) if isinstance(indexer, Places) else indexer)


def locate(wanted: Tokens, queries: Tensor | None) -> tuple[Indexer, Indexer]:
    """Find the `wanted` tokens that are among the queries of a kernel call.

    Returns their rows in the call, and which of the wanted tokens they are. queries: the position in the sequence of
    each row of the call; None if the call has the whole sequence in order.
    """
    return (wanted.indexer, slice(0, len(wanted))) if queries is None else wanted.located(queries)


def attention_weights(
    attended: Attended, sample: int, heads: Tensor | None, queries: Tokens, keys: Tokens
) -> Iterator[tuple[Tensor, Indexer]]:
    """Yield chunks of p = exp(f(q·kᵀ/√d) + mask - lse) of one sample, for n queries and m keys.

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
        factors = attended.factors[sample] if attended.factors else ()
        if factors:
            torch.baddbmm(p, take(q, 1, chunk).to(exact), k, beta=0, alpha=1 / math.sqrt(d), out=p)
            p.copy_(score_factors(p, [_factor_part(f, heads, chunk, keys.indexer) for f in factors], slice(None)))
            p.add_(bias.to(exact))
        else:
            torch.baddbmm(bias.to(exact).expand_as(p), take(q, 1, chunk).to(exact), k, alpha=1 / math.sqrt(d), out=p)
        yield p.exp_(), _part(which, i, stop)


def _factor_part(factor: ScoreFactor, heads: Tensor | None, rows: Indexer, cols: Indexer) -> ScoreFactor:
    """Return a factor of scores for some rows of a call, some keys and some heads."""
    by = take(take(factor.factor, 0, rows), 1, cols)
    return ScoreFactor(by, None if factor.heads is None else take(factor.heads, 0, heads), factor.positive)


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
    return indexer.part(start, stop)
