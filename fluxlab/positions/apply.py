"""The edits of one sample: resolved against a context, then applied to its ids."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, show
from fluxlab.positions.registry import Op, bugs_named, find_op
from fluxlab.select.arguments import AXES
from fluxlab.select.layout import Context, Scope, token_name
from fluxlab.select.tokens import parse_tokens, resolve_tokens
from fluxlab.select.where import resolve_blocks, resolve_heads, resolve_steps, strength_at

if TYPE_CHECKING:
    from fluxlab.positions.edit import Edit


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

    @property
    def acts_on(self) -> str:
        return self.op.acts_on

    def strength_at(self, step: int, t: float) -> float:
        return strength_at(self.strength, t) if self.steps[step] and len(self.tokens) else 0.0

    def in_head(self, head: int | None) -> bool:
        return head is None or self.heads is None or head in self.heads

    def strength_in(self, step: int, t: float, block: int, head: int | None) -> float:
        """Return the strength in one block and head."""
        return self.strength_at(step, t) if block in self.blocks and self.in_head(head) else 0.0

    def touches(self, side: str, head: int | None = None) -> bool:
        """Return whether it changes the table of a side (and head). `temperature` scales queries, `mask` neither."""
        sides = {"attention": (), "scale": ("queries",)}.get(self.acts_on, ("queries", "keys"))
        return side in sides and self.side in ("both", side) and self.in_head(head)

    def is_seen_by(self, query: int | None) -> bool:
        return query is None or self.seen_by is None or bool(self.seen_by[query])

    @property
    def described(self) -> str:
        """Op, arguments and tokens, for error messages."""
        arguments = ", ".join(f"{key} {show(value)}" for key, value in self.given.items() if value is not None)
        return f"op {self.op.name}{' with ' if arguments else ''}{arguments} on {len(self.tokens)} tokens"


def resolve(edit: "Edit", context: Context, sample: int) -> Resolved:
    """Resolve an edit for one sample. Raises UserError for what the context does not have."""
    op, where = find_op(edit.op, join(edit.path, "op")), edit.where
    if len(context.axes_dim) != len(AXES):
        raise UserError(f"{edit.path}: programs name {len(AXES)} axes, this model has {len(context.axes_dim)}")

    def selected(selection: Any, key: str) -> Tensor:
        mask = torch.zeros(context.layout.tokens, dtype=torch.bool, device=context.ids.device)
        mask[resolve_tokens(selection, context, sample, join(edit.path, key))] = True
        return mask

    device = context.ids.device
    selections = {key: selected(v, key) for key, v in edit.arguments.items() if op.types[key] is parse_tokens}
    arguments = {op.names[key]: value for key, value in {**edit.arguments, **selections}.items()}
    if op.acts_on == "attention":
        ends = torch.stack(list(selections.values()))
        # without one of its ends, such as a word that a negative prompt lacks, the edit does nothing
        tokens = (ends.any(0) & ends.any(1).all()).nonzero()[:, 0]
    else:
        tokens = resolve_tokens(where["tokens"], context, sample, join(edit.path, "tokens"))
    named = None if where["axes"] == "all" else where["axes"]
    return Resolved(
        op=op,
        given=edit.arguments,
        arguments=arguments,
        scope=context.layout.scope(tokens, named),
        tokens=tokens,
        axes=None if named is None else torch.tensor([name in named for name in AXES], device=device),
        steps=resolve_steps(where["steps"], context.sigmas, join(edit.path, "steps")),
        blocks=resolve_blocks(where["blocks"], context.double, context.single, join(edit.path, "blocks")),
        heads=resolve_heads(where["heads"], context.heads, join(edit.path, "heads")),
        side=where["side"],
        seen_by=None if where["seen_by"] == "all" else selected(where["seen_by"], "seen_by"),
        strength=where["strength"],
        path=edit.path or edit.name,
    )


@dataclass(frozen=True, eq=False)
class Placed:
    """ids `(N, A)`, with dropped rotation as position 0, and the factor of each row of the table, `(N,)` or None."""

    ids: Tensor
    scales: Tensor | None

    def equals(self, other: "Placed") -> bool:
        """Return whether values are equal. False if a gradient flows through one of them."""
        if self.ids.requires_grad or other.ids.requires_grad or (self.scales is None) != (other.scales is None):
            return False
        return torch.equal(self.ids, other.ids) and (self.scales is None or torch.equal(self.scales, other.scales))


def apply_edits(ids: Tensor, edits: Sequence[Resolved], strengths: Sequence[tuple[int, float]]) -> Placed:
    """Apply edits (number, strength) in order. An angle is id · ω, so a share of the angle is that share of the id."""
    shares = scales = None
    for n, strength in strengths:
        edit = edits[n]
        if edit.acts_on == "ids":
            ids = _changed(ids, edit, strength)
        elif edit.acts_on == "rotation":
            shares = _changed(torch.ones_like(ids) if shares is None else shares, edit, strength, is_factor=True)
        elif edit.acts_on == "scale":
            scales = _changed(torch.ones_like(ids[:, 0]) if scales is None else scales, edit, strength, is_factor=True)
    return Placed(ids if shares is None else ids * shares, scales)


def _changed(before: Tensor, edit: Resolved, strength: float, is_factor: bool = False) -> Tensor:
    """Return `before` with the op's result at its tokens and axes. `is_factor`: the op returns a factor of them."""
    start = before[edit.tokens]
    after = _call(edit, torch.ones_like(start) if is_factor else start, edit.scope)
    _check_type(edit, after, start.shape, start.dtype)
    if is_factor:
        after = start * after
    if strength < 1:
        after = start + strength * (after - start)
    if edit.axes is not None:
        after = torch.where(edit.axes, after, start)
    _check_finite(edit, after)
    return before.index_copy(0, edit.tokens, after)


def _call(edit: Resolved, *first: Any) -> Any:
    """Call the op. Its own exceptions keep their traceback, with a note that says which edit failed."""
    with bugs_named(f"in {edit.described}, edit {edit.path}"):
        try:
            return edit.op.function(*first, **edit.arguments)
        except UserError as error:
            raise UserError(f"{edit.path}.{error}") from None


def _check_type(edit: Resolved, result: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    """Raise TypeError, since it is a bug of the op, for a result of another shape or dtype."""
    if isinstance(result, Tensor) and result.shape == shape and result.dtype == dtype:
        return
    got = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
    raise TypeError(
        f"{edit.path}: op {edit.op.name} ({edit.op.source}) returned {got}, expected a tensor {tuple(shape)} {dtype}"
    )


def _check_finite(edit: Resolved, result: Tensor) -> None:
    finite = torch.isfinite(result.detach()).reshape(len(result), -1).all(1)
    if not finite.all():
        wrong = (~finite).nonzero()[:, 0].tolist()
        raise UserError(
            f"{edit.path}: {edit.described} gave NaN or inf for {len(wrong)} of them, first for "
            f"{token_name(edit.scope, wrong[0])}"
        )


def blocked(edits: Sequence[Resolved], strengths: Sequence[tuple[int, float]], ids: Tensor) -> Tensor:
    """Return the additive mask `(N, N)` of some mask edits. Strength s multiplies the odds of attending by 1 - s.

    Raises UserError if a query is left with no key to attend to.
    """
    bias = ids.new_zeros(len(ids), len(ids))
    for n, strength in strengths:
        edit = edits[n]
        forbidden = _call(edit)
        _check_type(edit, forbidden, bias.shape, torch.bool)
        weight = math.log1p(-strength) if strength < 1 else -math.inf  # in fp64: see docs/numerics.md, "Processors"
        bias = torch.where(forbidden, bias + weight, bias)
        if torch.isneginf(bias).all(1).any():
            raise UserError(f"{edit.path}: leaves some tokens nothing to attend to, expected at least one key each")
    return bias


def try_out(edits: Sequence[Resolved], ids: Tensor, context: Context) -> None:
    """Call every op once, so that its errors appear before a run and not in the middle of it."""
    for n, edit in enumerate(edits):
        if len(edit.tokens):
            apply_edits(ids.detach(), edits, [(n, 1.0)])
    masks = [n for n, edit in enumerate(edits) if edit.acts_on == "attention"]
    heads = range(context.heads) if any(edits[n].heads is not None for n in masks) else (None,)
    at_full_strength = {
        tuple(n for n in masks if edits[n].strength_in(step, sigma, block, head) == 1)
        for step, sigma in enumerate(context.sigmas[:-1])
        for block in range(context.blocks)
        for head in heads
    }
    for together in at_full_strength if masks else ():
        blocked(edits, [(n, 1.0) for n in together], ids)
