"""How a sample attends if its program averages over windows, or multiplies scores by distance or by head."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fluxlab.model.attention import ScoreFactor
from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import Rotary
from fluxlab.model.varied import Sharpening, Variation
from fluxlab.positions.calling import head_factor, score_factor
from fluxlab.positions.joining import query_groups
from fluxlab.positions.resolved import Resolved

Acting = Sequence[tuple[int, Resolved, float]]
"""The edits that act now: number, edit and strength, in order."""

Table = Callable[[str, int | None, int], Rotary]
"""Returns a sample's table of a side, as a query sees it, in a window."""

Ids = Callable[[str, int | None, int], Tensor]
"""Returns a sample's positions `(N, A)` on a side, as a query sees them, before the edit of this number."""


def has_variation(edits: Sequence[Resolved]) -> bool:
    """Return whether one kernel call does not compute attention with these edits."""
    return any(edit.acts_on in ("windows", "scores", "heads") for edit in edits)


def make_variation(acting: Acting, windows: int, heads: int, table: Table, ids: Ids) -> Variation:
    """Return how a sample attends, as the first of a batch. windows: how many, 0 for none. heads: of the model."""
    groups = query_groups([edit for _, edit, _ in acting])
    pairs = []
    for window in range(windows):
        keys = tuple(table("keys", int(part[0]), window) for part in groups)
        keys = keys[0] if len(keys) == 1 else KeyGroups(tuple(groups), keys)
        pairs.append((table("queries", None, window), keys))
    factors, sharpenings = [], []
    for n, edit, strength in acting:
        share = None
        if edit.heads is not None:
            share = torch.tensor([float(edit.in_head(h)) for h in range(heads)], device=edit.tokens.device)
        if edit.acts_on == "scores" and len(edit.tokens):
            before = [other for m, other, _ in acting if m < n]
            by = _by_distance(edit, strength, n, query_groups(before), ids)
            factors.append(ScoreFactor(by, share, edit.arguments["scores"] == "positive"))
        elif edit.acts_on == "heads":
            share = torch.ones(heads, device=edit.tokens.device) if share is None else share
            sharpenings.append(Sharpening(partial(head_factor, edit), edit.arguments["group"], strength * share))
    return Variation(0, tuple(pairs), tuple(factors), tuple(sharpenings))


def _by_distance(edit: Resolved, strength: float, n: int, groups: Sequence[Tensor], ids: Ids) -> Tensor:
    """Return the factors `(N, N)` of edit n, at the positions that the edits before it leave."""
    queries = ids("queries", None, n)
    if len(groups) == 1:
        return score_factor(edit, strength, queries, ids("keys", int(groups[0][0]), n))
    factor = queries.new_zeros(len(queries), len(queries))
    for part in groups:
        of_group = score_factor(edit, strength, queries, ids("keys", int(part[0]), n))
        factor = factor.index_copy(0, part, of_group[part])
    return factor
