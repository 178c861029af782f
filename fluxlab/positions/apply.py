"""One sample's edits: resolved against a context, then applied to its ids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join
from fluxlab.positions.registry import Op, find_op
from fluxlab.select.arguments import AXES
from fluxlab.select.layout import Context, Scope
from fluxlab.select.tokens import parse_tokens, resolve_tokens
from fluxlab.select.where import resolve_blocks, resolve_heads, resolve_steps, strength_at

if TYPE_CHECKING:
    from fluxlab.positions.edit import Edit


@dataclass(frozen=True, eq=False)
class Resolved:
    """An edit whose every choice is a number. seen_by: boolean `(N,)` or None; axes: boolean `(A,)`, None for all."""

    op: Op
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

    @property
    def acts_on(self) -> str:
        return self.op.acts_on

    def strength_at(self, step: int, t: float) -> float:
        return strength_at(self.strength, t) if self.steps[step] and len(self.tokens) else 0.0

    def in_head(self, head: int | None) -> bool:
        return head is None or self.heads is None or head in self.heads

    def at_work(self, step: int, t: float, block: int, head: int | None) -> float:
        """The strength in one block and head."""
        return self.strength_at(step, t) if block in self.blocks and self.in_head(head) else 0.0

    def touches(self, side: str, head: int | None = None) -> bool:
        """Whether it changes the table of a side (and head): a temperature scales the queries, a mask no table."""
        sides = {"attention": (), "scale": ("queries",)}.get(self.acts_on, ("queries", "keys"))
        return side in sides and self.side in ("both", side) and self.in_head(head)

    def is_seen_by(self, query: int | None) -> bool:
        return query is None or self.seen_by is None or bool(self.seen_by[query])


def resolve(edit: "Edit", context: Context, sample: int) -> Resolved:
    """`UserError` naming the path of what the context does not have."""
    op, where = find_op(edit.op, join(edit.path, "op")), edit.where
    if len(context.axes_dim) != len(AXES):
        raise UserError(f"{edit.path}: programs name {len(AXES)} axes, this model has {len(context.axes_dim)}")

    def chosen(selection: Any, key: str) -> Tensor:
        mask = torch.zeros(context.layout.tokens, dtype=torch.bool, device=context.ids.device)
        mask[resolve_tokens(selection, context, sample, join(edit.path, key))] = True
        return mask

    device = context.ids.device
    selections = {key: chosen(v, key) for key, v in edit.arguments.items() if op.kinds[key] is parse_tokens}
    arguments = {op.names[key]: value for key, value in {**edit.arguments, **selections}.items()}
    if op.acts_on == "attention":  # without one of its ends (a word that a negative prompt lacks) it does nothing
        ends = list(selections.values())
        tokens = (
            torch.stack(ends).any(0).nonzero()[:, 0] if all(end.any() for end in ends) else ends[0].nonzero()[:0, 0]
        )
    else:
        tokens = resolve_tokens(where["tokens"], context, sample, join(edit.path, "tokens"))
    named = None if where["axes"] == "all" else where["axes"]
    return Resolved(
        op=op,
        arguments=arguments,
        scope=context.layout.scope(tokens, named),
        tokens=tokens,
        axes=None if named is None else torch.tensor([name in named for name in AXES], device=device),
        steps=resolve_steps(where["steps"], context.sigmas, join(edit.path, "steps")),
        blocks=resolve_blocks(where["blocks"], context.double, context.single, join(edit.path, "blocks")),
        heads=resolve_heads(where["heads"], context.heads, join(edit.path, "heads")),
        side=where["side"],
        seen_by=None if where["seen_by"] == "all" else chosen(where["seen_by"], "seen_by"),
        strength=where["strength"],
        path=edit.path or edit.name,
    )


@dataclass(frozen=True, eq=False)
class Placed:
    """ids `(N, A)` with dropped rotation as position 0, and what the table is multiplied by, `(N,)` or None."""

    ids: Tensor
    scales: Tensor | None

    def equals(self, other: "Placed") -> bool:
        """Equal values; never where a gradient goes through one of them."""
        if self.ids.requires_grad or other.ids.requires_grad or (self.scales is None) != (other.scales is None):
            return False
        return torch.equal(self.ids, other.ids) and (self.scales is None or torch.equal(self.scales, other.scales))


def apply_edits(ids: Tensor, edits: Sequence[Resolved], strengths: Sequence[tuple[int, float]]) -> Placed:
    """Edits (number, strength) in turn. An angle is id · ω, so a share of the angle is that share of the id."""
    shares = scales = None
    for n, strength in strengths:
        edit = edits[n]
        if edit.acts_on == "ids":
            ids = _changed(ids, edit, strength)
        elif edit.acts_on == "rotation":
            shares = _changed(torch.ones_like(ids) if shares is None else shares, edit, strength, times=True)
        elif edit.acts_on == "scale":
            scales = _changed(torch.ones_like(ids[:, 0]) if scales is None else scales, edit, strength, times=True)
    return Placed(ids if shares is None else ids * shares, scales)


def _changed(before: Tensor, edit: Resolved, strength: float, times: bool = False) -> Tensor:
    """`before` with the op's result at its tokens and axes. `times`: the op gives a factor, not the value itself."""
    start = before[edit.tokens]
    try:
        after = edit.op.function(torch.ones_like(start) if times else start, edit.scope, **edit.arguments)
    except UserError as error:
        raise UserError(join(edit.path, str(error))) from None
    if after.shape != start.shape or not torch.isfinite(after).all():
        raise UserError(f"{edit.path}: {edit.op.name} gave {tuple(after.shape)} with NaN or inf, or of another shape")
    after = start * after if times else after
    if strength < 1:
        after = start + strength * (after - start)
    if edit.axes is not None:
        after = torch.where(edit.axes, after, start)
    return before.index_copy(0, edit.tokens, after)


def blocked(edits: Sequence[Resolved], strengths: Sequence[tuple[int, float]], ids: Tensor) -> Tensor:
    """The additive mask `(N, N)` of some mask edits: strength s multiplies the odds of a forbidden look by 1 - s.

    `UserError` where a query would be left with nothing to look at.
    """
    bias = ids.new_zeros(len(ids), len(ids))
    for n, strength in strengths:
        edit = edits[n]
        weight = math.log1p(-strength) if strength < 1 else -math.inf  # in fp64: see docs/numerics.md, "Processors"
        bias = torch.where(edit.op.function(**edit.arguments), bias + weight, bias)
        if torch.isneginf(bias).all(1).any():
            raise UserError(f"{edit.path}: leaves some tokens nothing to look at; let them look at something")
    return bias


def try_out(edits: Sequence[Resolved], ids: Tensor, context: Context) -> None:
    """Meet the errors of ops and of `blocked` now, not in the middle of a run."""
    for n, edit in enumerate(edits):
        if len(edit.tokens):
            apply_edits(ids.detach(), edits, [(n, 1.0)])
    masks = [n for n, edit in enumerate(edits) if edit.acts_on == "attention"]
    heads = range(context.heads) if any(edits[n].heads is not None for n in masks) else (None,)
    full = {
        tuple(n for n in masks if edits[n].at_work(step, sigma, block, head) == 1)
        for step, sigma in enumerate(context.sigmas[:-1])
        for block in range(context.blocks)
        for head in heads
    }
    for together in full if masks else ():
        blocked(edits, [(n, 1.0) for n in together], ids)
