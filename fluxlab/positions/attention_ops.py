"""Ops on attention itself: which keys a query attends to, how sharply, and with how much rotation."""

import torch
from torch import Tensor

from fluxlab.positions.registry import op
from fluxlab.positions.tensors import as_tensor
from fluxlab.select.arguments import choice, flag, positive
from fluxlab.select.layout import Scope
from fluxlab.select.tokens import parse_tokens


@op(
    "mask",
    {"from": parse_tokens, "to": parse_tokens, "rule": choice("block", "only"), "both_ways": flag},
    acts_on="attention",
)
def mask(from_: Tensor, to: Tensor, rule: str = "block", both_ways: bool = False) -> Tensor:
    """Queries `from` do not attend to keys `to` (rule: block), or only to them (rule: only).

    With both_ways the same holds with queries and keys exchanged. from_, to: boolean `(N,)`. Returns a boolean
    `(N, N)`, True where attending is forbidden. Strength s multiplies the odds of attending there by 1 - s.
    """
    blocked = from_[:, None] & (to if rule == "block" else ~to)
    return blocked | blocked.T if both_ways else blocked


@op("temperature", {"factor": positive}, acts_on="scale")
def temperature(scales: Tensor, scope: Scope, factor: float) -> Tensor:
    """Multiply the scores of the selected queries by `factor`, before the softmax. Above 1 is sharper.

    With `side: keys` the scores of the selected keys, for the queries of `seen_by`. TACA (arXiv 2506.07986) multiplies
    the scores of image queries with text keys by 1.2. scales: `(n,)`.
    """
    return as_tensor(factor, scales).expand_as(scales)


@op("drop", acts_on="rotation")
def drop(shares: Tensor, scope: Scope) -> Tensor:
    """Do not rotate queries and keys on the selected axes, whatever the ids.

    shares: `(n, A)`, how much of each axis' angle is kept.
    """
    return torch.zeros_like(shares)
