"""Ops on attention itself: what is looked at, how sharply, and with how much rotation."""

import torch
from torch import Tensor

from fluxlab.positions.registry import op
from fluxlab.select import arguments as kind
from fluxlab.select.layout import Scope
from fluxlab.select.tokens import parse_tokens


@op(
    "mask",
    {"from": parse_tokens, "to": parse_tokens, "rule": kind.choice("block", "only"), "both_ways": kind.flag},
    acts_on="attention",
)
def mask(from_: Tensor, to: Tensor, rule: str = "block", both_ways: bool = False) -> Tensor:
    """Queries `from` do not look at keys `to` (rule: block), or at nothing else (rule: only); one way, or both.

    from_, to: boolean `(N,)`. Returns boolean `(N, N)`, True where looking is forbidden. Strength s multiplies the odds
    of looking there by 1 - s.
    """
    blocked = from_[:, None] & (to if rule == "block" else ~to)
    return blocked | blocked.T if both_ways else blocked


@op("temperature", {"factor": kind.positive}, acts_on="scale")
def temperature(scales: Tensor, scope: Scope, factor: float) -> Tensor:
    """Scores of the selected queries, before the softmax, × `factor`: above 1 is sharper. scales: `(n,)`."""
    return torch.full_like(scales, factor)


@op("drop", acts_on="rotation")
def drop(shares: Tensor, scope: Scope) -> Tensor:
    """No rotation on the selected axes, whatever the ids. shares: `(n, A)`, how much of each axis' angle is kept."""
    return torch.zeros_like(shares)
