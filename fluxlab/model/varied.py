"""Attention of samples for which one kernel call does not do: averages over tables, factors of scores.

Each of these samples is computed by itself, so that the others of a batch are computed as without it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model.attention import SCORE_BYTES, Attended, ScoreFactor, Tap, attend, empty_token_major, score_factors
from fluxlab.model.groups import KeyGroups, attend_in_groups
from fluxlab.model.rope import Rotary, apply_rotary

GPU_SCORE_BYTES = 256 << 20
"""Bytes of scores that are computed at a time on a GPU."""


class Sharpening(NamedTuple):
    """A factor of the scores of each head, from the entropy of its attention between groups of `size` tokens.

    factor: maps entropies `(H,)`, in nats, to factors `(H,)`. heads: `(H,)`, the share of the factor in each head.
    """

    factor: Callable[[Tensor], Tensor]
    size: int
    heads: Tensor


class Variation(NamedTuple):
    """How one sample of a batch attends.

    windows: tables (queries, keys), each `(1, H or 1, N, d/2)`. The outputs of attention with each of them are
    averaged. Empty for a sample that has one table, by which its queries are rotated already.
    factors: of scores. sharpenings: applied before them, in order.
    """

    sample: int
    windows: tuple[tuple[Rotary, Rotary | KeyGroups], ...]
    factors: tuple[ScoreFactor, ...]
    sharpenings: tuple[Sharpening, ...]


class Varied(NamedTuple):
    """In place of the keys' table: the table of the whole batch, in which samples with windows are not rotated."""

    keys: Rotary | KeyGroups
    variations: tuple[Variation, ...]


Keys = Rotary | KeyGroups | Varied


def plain_keys(keys: Keys) -> Rotary | KeyGroups:
    """Return the table of the keys, or one for each group of queries."""
    return keys.keys if isinstance(keys, Varied) else keys


def joint_attention(q: Tensor, k: Tensor, v: Tensor, keys: Keys, mask: Tensor | None, tap: Tap | None = None) -> Tensor:
    """Return a block's attention, in one call if all queries see the same keys, otherwise in one call per group.

    k is rotated already in the first case, and not yet in the second.
    """
    if isinstance(keys, Varied):
        return attend_varied(q, k, v, keys, mask, tap)
    if isinstance(keys, KeyGroups):
        return attend_in_groups(q, k, v, keys, mask, tap)
    return attend(q, k, v, mask, tap)


Change = Callable[[Tensor | None, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
"""Returns the keys, values and mask `(1, …)` of one sample for some queries, from (queries on the host, k, v, mask)."""

Group = tuple[Tensor | None, Tensor | None, Rotary | None]
"""Queries that see the same keys, on the device and on the host, None for all; and the table of unrotated keys."""


def attend_varied(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    varied: Varied,
    mask: Tensor | None,
    tap: Tap | None,
    groups: Sequence[Group] | None = None,
    changes: Mapping[int, Change] | None = None,
) -> Tensor:
    """Return attention `(B, H, N, d)` of a batch in which some samples have variations, or other keys by `changes`.

    Each of them is a kernel call of its own, and the others are one call together. groups: of queries, by default those
    of the keys. `tap` is given the keys of the sequence, with the log-sum-exp over all keys.
    """
    out = empty_token_major(q, v.dtype)
    own, changes = {variation.sample: variation for variation in varied.variations}, changes or {}
    if tap is not None and any(variation.windows for variation in own.values()):
        raise UserError("capture: attention with the op windows is an average over several tables; leave one out")
    sharpened = {b: _sharpened(q, k, v, b, variation, varied.keys, mask) for b, variation in own.items()}
    others = [b for b in range(len(q)) if b not in own and b not in changes]
    alone = sorted({b for b, variation in own.items() if not variation.windows} | set(changes))
    for queries, on_host, table in _groups(varied.keys) if groups is None else groups:
        turned = k if table is None else apply_rotary(k, table)
        calls: dict[int, Attended] = {}
        for samples in [*([others] if others else []), *([b] for b in alone)]:
            rows, first = torch.tensor(samples, device=q.device), samples[0]
            part, part_mask = _of_queries(sharpened.get(first, q[rows]), _of_samples(mask, rows), queries)
            keys, values, seen = turned[rows], v[rows], []
            if first in changes:
                keys, values, part_mask = changes[first](on_host, keys, values, part_mask)
            factors = own[first].factors if first in own else ()
            factors = tuple(f if queries is None else f._replace(factor=f.factor[queries]) for f in factors)
            call = (part, keys, values, part_mask, None if tap is None else seen.append, on_host)
            attended = attend_scored(*call, factors) if factors else attend(*call)
            if queries is None:
                out[rows] = attended
            else:
                out[rows[:, None], :, queries[None]] = attended.transpose(1, 2)
            calls |= {b: _row(seen[0], i) for i, b in enumerate(samples) if seen}
        if tap is not None:
            tap(_merged(calls, _of_queries(q, mask, queries)[1], on_host, k.shape[2]))
    for b, variation in own.items():
        if variation.windows:
            out[b] = _averaged(sharpened[b], k[b : b + 1], v[b : b + 1], variation, _of_samples(mask, slice(b, b + 1)))
    return out


def _averaged(q: Tensor, k: Tensor, v: Tensor, variation: Variation, mask: Tensor | None) -> Tensor:
    """Return the mean over windows of one sample's attention, `(H, N, d)`. q and k are not rotated yet."""
    total = None
    for q_table, keys in variation.windows:
        turned = apply_rotary(q, q_table)
        inner = Varied(keys, (variation._replace(sample=0, windows=(), sharpenings=()),)) if variation.factors else keys
        own_k = k if isinstance(keys, KeyGroups) else apply_rotary(k, keys)
        part = joint_attention(turned, own_k, v, inner, mask)
        part = part.to(torch.promote_types(v.dtype, torch.float32))
        total = part if total is None else total + part
    return (total / len(variation.windows))[0].to(v.dtype)


def attend_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tap: Tap | None,
    queries: Tensor | None,
    factors: Sequence[ScoreFactor],
) -> Tensor:
    """Return softmax(f(q·kᵀ/√d) + mask)·v for one sample, `(1, H, n, d)`, in which f multiplies scores by factors.

    Scores are computed in fp32 (fp64 for an fp64 model), for a part of the queries at a time.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    keys = k[0].to(exact).mT
    limit = SCORE_BYTES if q.device.type == "cpu" else GPU_SCORE_BYTES
    step = max(1, limit // (q.shape[1] * k.shape[2] * exact.itemsize))
    outs, sums = [], []
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        s = (q[0, :, rows].to(exact) @ keys) / math.sqrt(q.shape[-1])
        s = score_factors(s, factors, rows)
        if mask is not None:
            s = s + (mask[0] if mask.shape[2] == 1 else mask[0, :, rows]).to(exact)
        outs.append(torch.softmax(s, dim=-1).to(v.dtype) @ v[0])
        if tap is not None:
            sums.append(s.logsumexp(-1))
    if tap is not None:
        tap(Attended(q, k, torch.cat(sums, 1)[None], mask, queries, (tuple(factors),)))
    return torch.cat(outs, 1)[None]


# ---- sharpenings


def _sharpened(
    q: Tensor, k: Tensor, v: Tensor, b: int, variation: Variation, keys: Rotary | KeyGroups, mask: Tensor | None
) -> Tensor:
    """Return the queries of one sample `(1, H, N, d)`, multiplied by the factors of its heads."""
    q, k, v, mask = q[b : b + 1], k[b : b + 1], v[b : b + 1], _of_samples(mask, slice(b, b + 1))
    for sharpening in variation.sharpenings:
        entropies = []
        for q_table, own in variation.windows or ((None, keys),):
            turned = q if q_table is None else apply_rotary(q, q_table)
            if not isinstance(own, KeyGroups):
                k_turned = k if q_table is None else apply_rotary(k, own)
                entropies.append(group_entropy(turned, [(None, k_turned, mask)], sharpening.size))
                continue
            tables = [Rotary(*(x[b if len(x) > 1 and q_table is None else 0][None] for x in t)) for t in own.tables]
            parts = [
                (queries, apply_rotary(k, table), _of_queries(q, mask, queries)[1])
                for queries, table in zip(own.queries, tables, strict=True)
            ]
            entropies.append(group_entropy(turned, parts, sharpening.size))
        factor = sharpening.factor(torch.stack(entropies).mean(0))
        q = q * (1 + sharpening.heads.to(factor) * (factor - 1)).to(q.dtype)[None, :, None, None]
    return q


def group_entropy(q: Tensor, parts: Sequence[tuple[Tensor | None, Tensor, Tensor | None]], size: int) -> Tensor:
    """Return the entropy in nats, `(H,)`, of attention between groups of `size` tokens: the mean over query groups.

    q: `(1, H, N, d)`. parts: (queries or None for all, rotated keys `(1, H, N, d)`, mask of these queries), which
    together have all queries. A group's attention is the mean of that of its tokens. The last group may be smaller.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    H, N, d = q.shape[1:]
    groups = -(-N // size)
    of_key = torch.arange(N, device=q.device) // size
    counts = (torch.arange(groups + 1, device=q.device) * size).clamp(max=N).diff().to(exact)
    sums = torch.zeros(H, groups, groups, dtype=exact, device=q.device)
    limit = SCORE_BYTES if q.device.type == "cpu" else GPU_SCORE_BYTES
    step = max(1, limit // (H * N * exact.itemsize))
    for queries, k, mask in parts:
        rows = torch.arange(N, device=q.device) if queries is None else queries
        keys = k[0].to(exact).mT
        for start in range(0, len(rows), step):
            chosen = rows[start : start + step]
            s = (q[0].index_select(1, chosen).to(exact) @ keys) / math.sqrt(d)
            if mask is not None:
                s = s + (mask[0] if mask.shape[2] == 1 else mask[0, :, start : start + step]).to(exact)
            by_key = s.new_zeros(H, len(chosen), groups).index_add(2, of_key, torch.softmax(s, -1))
            sums = sums.index_add(1, of_key[chosen], by_key)
    p = sums / counts[None, :, None]
    return -torch.xlogy(p, p).sum(-1).mean(-1)


# ---- parts of batches


def _groups(keys: Rotary | KeyGroups) -> list[Group]:
    if not isinstance(keys, KeyGroups):
        return [(None, None, None)]
    return list(zip(keys.queries, keys.on_host or keys.queries, keys.tables, strict=True))


def _of_samples(mask: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask[rows]


def _of_queries(q: Tensor, mask: Tensor | None, queries: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the selected queries, and their rows of the mask."""
    if queries is None:
        return q, mask
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, queries]
    return q.index_select(2, queries), mask


def _row(attended: Attended, i: int) -> Attended:
    q, k, lse = (x[i : i + 1] for x in attended[:3])
    return Attended(q, k, lse, None, None, attended.factors)


def _merged(calls: Mapping[int, Attended], mask: Tensor | None, on_host: Tensor | None, tokens: int) -> Attended:
    """Return the calls of single samples as one: the keys of the sequence, the log-sum-exp over all keys."""
    ordered = [calls[b] for b in sorted(calls)]
    q, lse = (torch.cat([getattr(call, name) for call in ordered]) for name in ("q", "lse"))
    k = torch.cat([call.k[:, :, :tokens] for call in ordered])
    factors = tuple(call.factors[0] if call.factors else () for call in ordered)
    return Attended(q, k, lse, mask, on_host, factors if any(factors) else None)
