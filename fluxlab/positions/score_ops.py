"""Ops on scores that a table of positions cannot express: a factor by distance, and a factor of each head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.registry import op
from fluxlab.select import arguments as types
from fluxlab.select.arguments import EVERY_AXIS
from fluxlab.select.tokens import parse_tokens

QUERIES = 256
"""Queries whose distances are computed at a time."""


@op(
    "distance",
    {
        "factor": types.not_negative,
        "beyond": types.not_negative_per_axis,
        "over": types.not_negative,
        "scores": types.choice("positive", "all"),
        "from": parse_tokens,
        "to": parse_tokens,
    },
    acts_on="scores",
    axes=("row", "col"),
)
def distance(
    queries: Tensor,
    keys: Tensor,
    trained: tuple[int, int],
    axes: Sequence[str] | None,
    factor: float,
    beyond: list[float | None] | None = None,
    over: float = 0.0,
    scores: str = "positive",
    from_: Tensor | None = None,
    to: Tensor | None = None,
) -> Tensor:
    """Multiply the scores of queries with keys that are far away by `factor`: more than `beyond` on some axis.

    beyond: by default half of the trained extent. over: the factor goes from 1 to `factor` over this distance. scores:
    which are multiplied. from, to: queries and keys, by default image tokens. UltraViCo (arXiv 2511.20123) multiplies
    positive scores by 0.9.

    queries, keys: positions `(N, A)`. from_, to: boolean `(N,)`. Returns factors `(N, N)`.
    """
    bounds = [None, trained[0] / 2, trained[1] / 2] if beyond is None else beyond
    bounded = [
        (axis, bound)
        for axis, (name, bound) in enumerate(zip(EVERY_AXIS[: queries.shape[1]], bounds, strict=False))
        if bound is not None and (axes is None or name in axes)
    ]

    def part(queries: Tensor, from_: Tensor) -> Tensor:
        share = queries.new_zeros(len(queries), len(keys))
        for axis, bound in bounded:
            apart = (queries[:, None, axis] - keys[None, :, axis]).abs() - bound
            # rounding errors of positions must not count as distance
            far = (apart / over).clamp(0, 1) if over else (apart > 1e-4).to(share)
            share = torch.maximum(share, far)
        return 1 + (factor - 1) * share * (from_[:, None] & to[None])

    # some queries at a time: at 2048² a matrix of all tokens takes 1 GB
    return torch.cat([part(*some) for some in zip(queries.split(QUERIES), from_.split(QUERIES), strict=True)])


@op(
    "concentrate",
    {
        "factor": types.positive,
        "to": types.positive,
        "low": types.not_negative,
        "high": types.positive,
        "power": types.positive,
        "group": types.positive_integer,
    },
    acts_on="heads",
)
def concentrate(
    entropy: Tensor,
    factor: float = 1.3,
    to: float = 1.1,
    low: float = 0.44,
    high: float = 6.0,
    power: float = 2.0,
    group: int = 128,
) -> Tensor:
    """Multiply all scores of a head by `factor` if its attention is concentrated, by `to` if it is spread out.

    λ = to + (factor - to)·(1 - z)^power. z is the entropy of the head's attention between groups of `group` tokens, in
    nats, from 0 at `low` to 1 at `high`. UltraImage (arXiv 2512.04504), which measures it once, at the first step of an
    image without this factor. Here it is measured in each block and step.

    entropy: `(H,)`. Returns factors `(H,)`.
    """
    if high <= low:
        raise UserError(f"high: {high}, expected more than low, {low}")
    z = ((entropy - low) / (high - low)).clamp(0, 1)
    return to + (factor - to) * (1 - z) ** power
