"""An edit whose choices are numbers, for one sample of one context."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fluxlab.errors import show
from fluxlab.positions.registry import Op
from fluxlab.select.layout import Context, Scope
from fluxlab.select.where import strength_at

NO_TABLE = ("attention", "activations", "size", "scores", "heads", "text")
"""What ops act on that leave rotary tables as they are."""


@dataclass(frozen=True, eq=False)
class Resolved:
    """An edit with all its choices as numbers. seen_by: boolean `(N,)`, axes: boolean `(A,)`; None means all."""

    op: Op
    given: Mapping[str, Any]
    arguments: dict[str, Any]
    scope: Scope
    tokens: Tensor
    axes: Tensor | None
    steps: tuple[bool, ...]
    blocks: frozenset[int]
    heads: frozenset[int] | None
    side: str
    seen_by: Tensor | None
    strength: float | list
    path: str
    context: Context

    @property
    def acts_on(self) -> str:
        return self.op.acts_on

    def strength_at(self, step: int, t: float) -> float:
        return strength_at(self.strength, t) if self.steps[step] and len(self.tokens) else 0.0

    def state_at(self, step: int, t: float) -> tuple[float, float | None]:
        """Return all that the edit depends on at a step: its strength, and t if its op depends on the noise level."""
        strength = self.strength_at(step, t)
        return strength, t if self.op.timed and strength > 0 else None

    def in_head(self, head: int | None) -> bool:
        return head is None or self.heads is None or head in self.heads

    def strength_in(self, step: int, t: float, block: int, head: int | None) -> float:
        """Return the strength in one block and head."""
        return self.strength_at(step, t) if block in self.blocks and self.in_head(head) else 0.0

    def touches(self, side: str, head: int | None = None) -> bool:
        """Return whether it changes the table of a side (and head): `temperature` that of queries, `mask` none."""
        sides = () if self.acts_on in NO_TABLE else ("queries", "keys")
        if self.acts_on == "scale":  # once per score: a factor of the queries, unless keys are meant
            sides = ("keys",) if self.side == "keys" else ("queries",)
        return side in sides and self.side in ("both", side) and self.in_head(head)

    def is_seen_by(self, query: int | None) -> bool:
        return query is None or self.seen_by is None or bool(self.seen_by[query])

    @property
    def described(self) -> str:
        """Op, arguments and tokens, for error messages."""
        arguments = ", ".join(f"{key} {show(value)}" for key, value in self.given.items() if value is not None)
        return f"op {self.op.name}{' with ' if arguments else ''}{arguments} on {len(self.tokens)} tokens"
