"""The edits of one sample: resolved against a context, then applied to its ids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join
from fluxlab.positions.calling import call, check_finite, check_type
from fluxlab.positions.region_ops import hidden, region_masks
from fluxlab.positions.registry import find_op
from fluxlab.positions.resolved import Resolved
from fluxlab.positions.waves import Seen, Waves, spectrum, unchanged
from fluxlab.select.arguments import AXES, EVERY_AXIS, axis_mask
from fluxlab.select.layout import Context
from fluxlab.select.tokens import parse_tokens, resolve_tokens
from fluxlab.select.where import resolve_blocks, resolve_heads, resolve_steps

if TYPE_CHECKING:
    from fluxlab.positions.edit import Edit


def resolve(edit: "Edit", context: Context, sample: int) -> Resolved:
    """Resolve an edit for one sample. Raises UserError for what the context does not have."""
    op, where = find_op(edit.op, join(edit.path, "op")), edit.where
    count = len(context.axes_dim)
    if not len(AXES) <= count <= len(EVERY_AXIS):
        raise UserError(f"{edit.path}: programs name 3 or 4 axes, this model has {count}")

    def selected(selection: Any, key: str) -> Tensor:
        mask = torch.zeros(context.layout.tokens, dtype=torch.bool, device=context.ids.device)
        mask[resolve_tokens(selection, context, sample, join(edit.path, key))] = True
        return mask

    device = context.ids.device
    selections = {key: selected(v, key) for key, v in edit.arguments.items() if op.types[key] is parse_tokens and v}
    arguments = {op.names[key]: value for key, value in {**edit.arguments, **selections}.items()}
    if op.acts_on == "scores":  # queries and keys are image tokens unless said otherwise
        names = [op.names[key] for key in ("from", "to")]
        arguments |= {name: selected("image", "from") for name in names if arguments[name] is None}
        selections = {name: arguments[name] for name in names}
    if op.acts_on in ("attention", "scores"):
        ends = torch.stack(list(selections.values()))
        # without one of its ends, such as a word that a negative prompt lacks, the edit does nothing
        tokens = (ends.any(0) & ends.any(1).all()).nonzero()[:, 0]
    elif op.acts_on == "text":
        given = edit.arguments["where"]
        arguments["chosen"] = region_masks(given, context, sample, join(edit.path, "where"))
        tokens = arguments["chosen"].any(0).nonzero()[:, 0]
    elif op.acts_on == "heads":
        tokens = torch.arange(context.layout.tokens, device=context.ids.device)
    else:
        tokens = resolve_tokens(where["tokens"], context, sample, join(edit.path, "tokens"))
    named = None if where["axes"] == "all" else where["axes"]
    try:
        mask = None if named is None else axis_mask(named, count)
    except UserError as error:
        raise UserError(f"{join(edit.path, 'axes')}: {error}") from None
    return Resolved(
        op=op,
        given=edit.arguments,
        arguments=arguments,
        scope=context.layout.scope(tokens, named),
        tokens=tokens,
        axes=None if mask is None else torch.tensor(mask, device=device),
        steps=resolve_steps(where["steps"], context.sigmas, join(edit.path, "steps")),
        blocks=resolve_blocks(where["blocks"], context.double, context.single, join(edit.path, "blocks")),
        heads=resolve_heads(where["heads"], context.heads, join(edit.path, "heads")),
        side=where["side"],
        seen_by=None if where["seen_by"] == "all" else selected(where["seen_by"], "seen_by"),
        strength=where["strength"],
        path=edit.path or edit.name,
        context=context,
    )


Now = tuple[int, float, float | Seen | None]
"""An edit at one step: its number, its strength, and the noise level t (and latents) if its op depends on it."""


@dataclass(frozen=True, eq=False)
class Placed:
    """ids `(N, A)`, with dropped rotation as position 0, and the factor of each row of the table, `(N,)` or None.

    waves: frequencies and gains, None if they are the model's own. windows: number of windows, of which this is one.
    """

    ids: Tensor
    scales: Tensor | None
    waves: Waves | None = None
    windows: int = 1

    def equals(self, other: "Placed") -> bool:
        """Return whether values are equal. False if a gradient flows through one of them."""
        mine, theirs = self._parts(), other._parts()
        if len(mine) != len(theirs) or any(part.requires_grad for part in (*mine, *theirs)):
            return False
        same = (self.scales is None) == (other.scales is None) and (self.waves is None) == (other.waves is None)
        return same and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def _parts(self) -> list[Tensor]:
        return [self.ids, *([] if self.scales is None else [self.scales]), *(self.waves or ())]

    @property
    def has_score(self) -> bool:
        return self.waves is not None and bool((self.waves.score != 1).any())

    def without_score(self) -> "Placed":
        """Return it as keys use it: a factor of scores is a factor of the queries."""
        if not self.has_score:
            return self
        return replace(self, waves=self.waves._replace(score=torch.ones_like(self.waves.score)))

    @property
    def row_factors(self) -> Tensor | None:
        """The factor of each row of the table, `(N,)` in the dtype of the ids, or None."""
        if not self.has_score:
            return self.scales
        score = self.waves.score[:, 0].to(self.ids.dtype).expand(len(self.ids))
        return score if self.scales is None else self.scales * score


def apply_edits(ids: Tensor, edits: Sequence[Resolved], now: Sequence[Now], window: int = 0) -> Placed:
    """Apply edits in order. An angle is id · ω, so a share of the angle is that share of the id.

    window: which of the positions that `windows` gives.
    """
    shares = scales = waves = None
    count = 1
    for n, strength, t in now:
        edit = edits[n]
        if edit.acts_on == "ids":
            ids = _changed(ids, edit, strength)
        elif edit.acts_on == "windows":
            ids, count = _window(ids, edit, strength, window)
        elif edit.acts_on == "rotation":
            shares = _changed(torch.ones_like(ids) if shares is None else shares, edit, strength, is_factor=True)
        elif edit.acts_on == "scale":
            scales = _changed(torch.ones_like(ids[:, 0]) if scales is None else scales, edit, strength, is_factor=True)
        elif edit.acts_on == "frequencies":
            before = unchanged(edit.context) if waves is None else waves
            waves = _changed_waves(before, ids, edit, strength, edit.context.sigmas[0] if t is None else t)
    if scales is not None and not scales.requires_grad and (scales == 1).all():
        scales = None
    return Placed(ids if shares is None else ids * shares, scales, _own_or_none(waves, edits), count)


def _window(ids: Tensor, edit: Resolved, strength: float, window: int) -> tuple[Tensor, int]:
    """Return the positions of one window `(N, A)`, and the number of windows."""
    start = ids[edit.tokens]
    every = call(edit, start, edit.scope, edit.context.trained)
    if not isinstance(every, Tensor) or every.shape[1:] != start.shape or every.dtype != start.dtype or not len(every):
        got = f"{tuple(every.shape)} {every.dtype}" if isinstance(every, Tensor) else type(every).__name__
        raise TypeError(
            f"{edit.path}: op {edit.op.name} ({edit.op.source}) returned {got}, expected (windows, "
            f"{', '.join(map(str, start.shape))}) {start.dtype}"
        )
    return _placed_at(ids, start, every[window], edit, strength), len(every)


def _changed_waves(before: Waves, ids: Tensor, edit: Resolved, strength: float, t: float | Seen) -> Waves:
    """Return `before` with the op's result at the edit's tokens and axes."""
    seen = spectrum(ids, edit.context, edit.axes, t)
    after = call(edit, before, seen)
    if not isinstance(after, Waves):
        raise TypeError(f"{edit.path}: op {edit.op.name} ({edit.op.source}) returned {type(after).__name__}, not Waves")
    mixed = []
    for name, start, end in zip(Waves._fields, before, after, strict=True):
        fits = isinstance(end, Tensor) and end.dtype == start.dtype and end.ndim == 2
        if not fits or end.shape[0] not in (1, len(ids)) or end.shape[1] != start.shape[1]:
            got = f"{tuple(end.shape)} {end.dtype}" if isinstance(end, Tensor) else type(end).__name__
            raise TypeError(
                f"{edit.path}: op {edit.op.name} ({edit.op.source}) returned {name} {got}, "
                f"expected (1 or {len(ids)}, {start.shape[1]}) {start.dtype}"
            )
        if not torch.isfinite(end.detach()).all():
            raise UserError(f"{edit.path}: {edit.described} gave NaN or inf as {name}")
        if strength < 1:
            end = start + strength * (end - start)
        if name != "score":
            end = torch.where(seen.chosen, end, start)
        if len(edit.tokens) < len(ids):
            rows = start.expand(len(ids), -1)
            end = rows.index_copy(0, edit.tokens, end.expand(len(ids), -1)[edit.tokens])
        mixed.append(end)
    return Waves(*mixed)


def _own_or_none(waves: Waves | None, edits: Sequence[Resolved]) -> Waves | None:
    """Return None for the model's own frequencies, so that their table is computed and shared as without an edit."""
    if waves is None or any(part.requires_grad for part in waves):
        return waves
    own = unchanged(edits[0].context)
    return None if all((a == b).all() for a, b in zip(waves, own, strict=True)) else waves


def _changed(before: Tensor, edit: Resolved, strength: float, is_factor: bool = False) -> Tensor:
    """Return `before` with the op's result at its tokens and axes. `is_factor`: the op returns a factor of them."""
    start = before[edit.tokens]
    after = call(edit, torch.ones_like(start) if is_factor else start, edit.scope)
    check_type(edit, after, start.shape, start.dtype)
    if is_factor:
        after = start * after
    return _placed_at(before, start, after, edit, strength)


def _placed_at(before: Tensor, start: Tensor, after: Tensor, edit: Resolved, strength: float) -> Tensor:
    """Return `before` with a share of the way from `start` to `after` at the edit's tokens and axes."""
    if strength < 1:
        after = start + strength * (after - start)
    if edit.axes is not None:
        after = torch.where(edit.axes, after, start)
    check_finite(edit, after)
    return before.index_copy(0, edit.tokens, after)


def blocked(edits: Sequence[Resolved], now: Sequence[Now], ids: Tensor) -> Tensor:
    """Return the additive mask `(N, N)` of some mask edits. Strength s multiplies the odds of attending by 1 - s.

    Raises UserError if a query is left with no key to attend to.
    """
    bias = region_bias(edits, now, ids)
    for n, strength, _ in now:
        edit = edits[n]
        if edit.acts_on == "text":
            continue
        forbidden = call(edit)
        check_type(edit, forbidden, bias.shape, torch.bool)
        if isinstance(strength, Tensor):  # below 1: `learn` sees to it
            weight = torch.log1p(-strength).to(bias)
        else:
            weight = math.log1p(-strength) if strength < 1 else -math.inf  # fp64: see docs/numerics.md, "Processors"
        bias = torch.where(forbidden, bias + weight, bias)
        check_keys_are_left(torch.isneginf(bias), edit)
    return bias


def check_keys_are_left(forbidden: Tensor, edit: Resolved) -> None:
    """Raise UserError if a query may attend to no key. forbidden: `(N, N)`."""
    if forbidden.all(1).any():
        raise UserError(f"{edit.path}: leaves some tokens nothing to attend to, expected at least one key each")


def region_bias(edits: Sequence[Resolved], now: Sequence[Now], ids: Tensor) -> Tensor:
    """Return the additive mask `(N, N)` of texts of regions. Strength s goes from none of their effect to all of it.

    It multiplies the odds of what the edit hides by 1 - s, and those of what it shows by s.
    """
    bias = ids.new_zeros(len(ids), len(ids))
    for n, edit in enumerate(edits):
        layout = edit.context.layout
        if edit.acts_on != "text" or not layout.further:  # without texts, as in notes
            continue
        strength = next((s for m, s, _ in now if m == n), 0.0)
        chosen = edit.arguments["chosen"]
        others = {key: value for key, value in edit.arguments.items() if key != "chosen"}
        sees, plain = edit.op.function(chosen, layout, **others), hidden(chosen, layout)
        for shown, share in ((sees & ~plain, strength), (plain & ~sees, 1 - strength)):
            if isinstance(share, Tensor):  # between 0 and 1: `learn` sees to it
                weight = torch.log(share).to(bias)
            else:
                weight = math.log(share) if share > 0 else -math.inf  # fp64, as above
            bias = torch.where(shown, weight, bias)
        bias = torch.where(~sees & ~plain, -math.inf, bias)
    return bias
