"""Tables and masks of samples and heads, joined to those of a batch, and a cache so that equal ones are one tensor."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxlab.model.rope import Rotary
from fluxlab.model.varied import Keys
from fluxlab.positions.resolved import Resolved


class Placement(NamedTuple):
    """The arguments `rotary=` and `mask=` of `Flux.forward` at one step.

    rotary: one table for all blocks, or (queries, keys) for each block. mask: None, or for each block an additive mask
    `(B or 1, H or 1, N, N)` or None. Equal tables and equal masks are the same object.
    """

    rotary: Rotary | list[tuple[Rotary, Keys]]
    mask: list[Tensor | None] | None


class Cache:
    """Values by key. A value that is not used between two calls of `next_step` is dropped."""

    def __init__(self):
        self._current: dict[Any, Any] = {}
        self._previous: dict[Any, Any] = {}

    def next_step(self) -> None:
        self._current, self._previous = {}, self._current

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._current:
            self._current[key] = self._previous[key] if key in self._previous else make()
        return self._current[key]

    def values(self, group: str) -> list:
        """Return the values whose key starts with `group`."""
        return [value for part in (self._current, self._previous) for key, value in part.items() if key[0] == group]


def query_groups(edits: Sequence[Resolved]) -> list[Tensor]:
    """Return the queries that see the same keys, in groups of indices; one group, all of them, for no `seen_by`."""
    limited = [edit.seen_by for edit in edits if edit.touches("keys") and edit.seen_by is not None]
    if not limited:
        return [torch.zeros(1, dtype=torch.long)]
    _, group = torch.stack(limited, 1).unique(dim=0, return_inverse=True)
    return [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1)]


def same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def join(rows: list[list[Rotary]]) -> Rotary:
    heads = max(len(row) for row in rows)
    parts = []
    for part in (0, 1):
        joined = [torch.cat([table[part] for table in row], 1).expand(-1, heads, -1, -1) for row in rows]
        parts.append(torch.cat(joined, 0))
    return Rotary(*parts)


def join_masks(rows: list[list[Tensor | None]], like: Tensor) -> Tensor:
    heads = max(len(row) for row in rows)
    zeros = like.new_zeros(len(like), len(like))
    joined = [torch.stack([zeros if part is None else part for part in row]).expand(heads, -1, -1) for row in rows]
    return torch.stack(joined)
