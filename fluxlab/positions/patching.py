"""What the edits of activations do inside one block, at one step: `Patch`, the block's site."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model.attention import Tap
from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import Rotary, apply_rotary
from fluxlab.model.sites import Site, unrotate
from fluxlab.model.varied import Keys, Varied, attend_varied, joint_attention, plain_keys

ROTATED = ("queries", "keys")


@dataclass(frozen=True, eq=False)
class Action:
    """An edit of one sample's activations at one step.

    sample, source: numbers in the batch; source is None for `ablate`. tokens: `(n,)`, theirs: the source's token for
    each, or all candidates with `map: match`. heads: `(h,)` or None for all. seen_by: boolean `(N,)` in main memory, or
    None.
    """

    op: Callable
    arguments: Mapping[str, Any]
    what: tuple[str, ...]
    sample: int
    source: int | None
    tokens: Tensor
    theirs: Tensor | None
    heads: Tensor | None
    seen_by: Tensor | None
    strength: float
    path: str

    @property
    def appends(self) -> bool:
        return self.arguments.get("mode") == "append"

    @property
    def as_view(self) -> bool:
        """Whether the keys and values are seen in addition to others, or by some queries only."""
        return self.appends or self.seen_by is not None


@dataclass(eq=False)
class View:
    """Keys and values of one sample that `action` adds or replaces: `(h, n, d)`, None for those that stay."""

    action: Action
    parts: dict[str, Tensor] = field(default_factory=dict)


class Patch(Site):
    """The site of a block with edits. Made for one forward. tables: the block's rotary tables (queries, keys).

    groups: groups of queries that other blocks and steps have found.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        tables: tuple[Rotary, Keys],
        groups: dict[Any, Any] | None = None,
    ):
        self._actions, self._known = actions, {} if groups is None else groups
        self._tables = tables[0], plain_keys(tables[1])
        variations = tables[1].variations if isinstance(tables[1], Varied) else ()
        self._windowed = {variation.sample for variation in variations if variation.windows}
        self._theirs = {id(action): action.theirs for action in actions}
        self._views: dict[int, View] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name == "input":
            self._match(x)
        acting = [action for action in self._actions if name in action.what]
        if acting and torch.is_grad_enabled():
            x = x.clone()
        for action in acting:
            new = self._new(name, x, action)
            if action.as_view:
                self._views.setdefault(id(action), View(action)).parts[name] = new
            else:
                own = _take(x[action.sample], action.tokens, action.heads)
                _put(x[action.sample], action.tokens, action.heads, blend(own, new, action.strength))
        return x

    def _new(self, name: str, x: Tensor, action: Action) -> Tensor:
        """Return what takes the place of the selected activations, `(h, n, d)` or `(n, C)`, at full strength."""
        given = action.arguments
        if action.source is None:
            whole = x[action.sample] if action.heads is None else x[action.sample][action.heads]
            return action.op(whole[..., action.tokens, :], whole, **given)
        theirs = self._theirs[id(action)]
        new = _take(x[action.source], theirs, action.heads)
        if name in ROTATED:
            new = self._rotated(name, new, theirs, action)
        factor = 1.0 if action.appends and name == "values" else given["factor"]
        return action.op(new, **{**given, "factor": factor})

    def _rotated(self, name: str, x: Tensor, theirs: Tensor, action: Action) -> Tensor:
        """Return the source's queries or keys `(h, n, d)`, rotated as the edit says."""
        if self._windowed & {action.sample, action.source}:
            raise UserError(
                f"{action.path}.what: {name} have several positions in a block with windows; leave them out, or use "
                "other blocks"
            )
        before = action.arguments["rotation"] == "before"
        grouped = name == "keys" and isinstance(self._tables[1], KeyGroups)  # then keys are rotated later
        # appended keys are not rotated later
        late, rotated_now = grouped and not action.appends, not grouped and not before
        if rotated_now or (late and before):
            return x
        if not grouped:
            x = unrotate(x, self._rows(name, action.source, theirs, action))
        if not before:
            x = apply_rotary(x, self._rows(name, action.source, theirs, action))
        own = self._rows(name, action.sample, action.tokens, action)
        return (unrotate(x, own) if late else apply_rotary(x, own) if before else x).to(x.dtype)

    def _rows(self, name: str, sample: int, tokens: Tensor, action: Action) -> Rotary:
        """Return the rows of one sample's table, `(h or 1, n, d/2)`."""
        table = self._tables[ROTATED.index(name)]
        tables = table.tables if isinstance(table, KeyGroups) else (table,)
        rows = [_rows(table, sample, tokens, action.heads) for table in tables]
        if any(not torch.equal(part, first) for row in rows[1:] for part, first in zip(row, rows[0], strict=True)):
            raise UserError(
                f"{action.path}.rotation: the keys of these tokens have several positions (seen_by); "
                f"use rotation: {'after' if action.appends else 'before'}, or leave seen_by out"
            )
        return rows[0]

    def _match(self, x: Tensor) -> None:
        """Find for each token the source's token with the most similar hidden state before the block."""
        for action in self._actions:
            if action.source is not None and action.arguments["map"] == "match":
                own, other = (
                    F.normalize(x[sample][tokens].float(), dim=-1)
                    for sample, tokens in ((action.sample, action.tokens), (action.source, action.theirs))
                )
                self._theirs[id(action)] = action.theirs[(own @ other.T).argmax(1)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Keys, mask: Tensor | None, tap: Tap | None) -> Tensor:
        """Return the block's attention, in which some samples have further keys, or other keys for some queries.

        Each of these samples is a kernel call of its own, so that the others need no further keys or mask.
        """
        if not self._views:
            return joint_attention(q, k, v, keys, mask, tap)
        varied = keys if isinstance(keys, Varied) else Varied(keys, ())
        own = {variation.sample for variation in varied.variations}
        for action in (view.action for view in self._views.values()):
            if action.sample in own:
                raise UserError(
                    f"{action.path}: mode: append and seen_by are not possible in a block and program with windows, "
                    "distance or concentrate; use other blocks"
                )
        changes = {view.action.sample: partial(self._with_views, view.action.sample) for view in self._views.values()}
        return attend_varied(q, k, v, varied, mask, tap, self._groups(varied.keys, q), changes)

    def _groups(self, keys: Rotary | KeyGroups, q: Tensor) -> list[tuple[Tensor | None, Tensor | None, Rotary | None]]:
        """Return the queries that see the same keys, on the device and in main memory, with the table of keys that are
        not rotated yet.
        """
        views = [view.action.seen_by for view in self._views.values() if view.action.seen_by is not None]
        groups = [(None, None, None)]
        if isinstance(keys, KeyGroups):
            groups = list(zip(keys.queries, keys.on_host or keys.queries, keys.tables, strict=True))
        if not views:
            return groups
        parts = []
        for _, on_host, table in groups:
            key = (id(on_host), *map(id, views))
            if key not in self._known:
                found = _split(
                    torch.arange(q.shape[2]) if on_host is None else on_host.cpu(), torch.stack(views, 1).cpu()
                )
                # what is kept with it keeps the ids from being used again
                self._known[key] = [(part.to(q.device), part) for part in found], (on_host, views)
            parts += [(*part, table) for part in self._known[key][0]]
        return parts

    def _with_views(
        self, b: int, on_host: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and mask `(1, …)` of one sample with its views, as these queries see them."""
        k, v = k.clone(), v.clone()
        for view in self._views.values():
            action = view.action
            if action.sample != b or (action.seen_by is not None and not action.seen_by[on_host[0]]):
                continue
            if not action.appends:
                for name, x in (("keys", k), ("values", v)):
                    if name in view.parts:
                        own = _take(x[0], action.tokens, action.heads)
                        _put(x[0], action.tokens, action.heads, blend(own, view.parts[name], action.strength))
                continue
            before = k.shape[2]
            k, v = (
                torch.cat((x, _all_heads(view.parts[name], x, action.heads)), 2)
                for name, x in (("keys", k), ("values", v))
            )
            mask = _extended(mask, v, before, action)
        return k, v, mask


def _split(queries: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the queries in groups of equal labels, a row of `labels` for each token."""
    _, which = labels[queries].unique(dim=0, return_inverse=True)
    return [queries[which == n] for n in range(int(which.max()) + 1)]


def _take(x: Tensor, tokens: Tensor, heads: Tensor | None) -> Tensor:
    """Return the selected tokens, and heads, of one sample `(N, C)` or `(H, N, d)`. A copy."""
    return x.index_select(-2, tokens) if heads is None else x[heads].index_select(-2, tokens)


def _put(x: Tensor, tokens: Tensor, heads: Tensor | None, new: Tensor) -> None:
    """Write the selected tokens, and heads, of one sample in place."""
    if heads is None:
        x.index_copy_(-2, tokens, new.to(x.dtype))
    else:
        x[heads[:, None], tokens[None]] = new.to(x.dtype)


def blend(own: Tensor, new: Tensor, strength: float) -> Tensor:
    """Return a share `strength` of the way from `own` to `new`."""
    return new if strength == 1 else own + strength * (new - own)


def _rows(table: Rotary, sample: int, tokens: Tensor, heads: Tensor | None) -> Rotary:
    def part(x: Tensor) -> Tensor:
        x = x[sample if len(x) > 1 else 0][:, tokens]
        return x if heads is None or len(x) == 1 else x[heads]

    return Rotary(part(table.cos), part(table.sin))


def _all_heads(part: Tensor, like: Tensor, heads: Tensor | None) -> Tensor:
    """Return appended keys or values `(1, H, n, d)`; zeros in the heads that do not have them."""
    if heads is None:
        return part[None].to(like.dtype)
    whole = like.new_zeros(1, like.shape[1], *part.shape[1:])
    whole[0, heads] = part.to(like.dtype)
    return whole


def _extended(mask: Tensor | None, v: Tensor, before: int, action: Action) -> Tensor | None:
    """Return the additive mask `(1, H or 1, N or 1, keys)` with columns for appended keys, from column `before` on.

    Strength s multiplies their weights by s. Heads that do not have them do not attend to them.
    """
    if mask is None and action.strength == 1 and action.heads is None:
        return None
    columns = v.new_full((1, 1, 1, v.shape[2] - before), math.log(action.strength))
    if action.heads is not None:
        absent = torch.full((1, v.shape[1], 1, 1), -math.inf, dtype=v.dtype, device=v.device)
        absent[:, action.heads] = 0
        columns = columns + absent
    mask = v.new_zeros(1, 1, 1, before) if mask is None else mask
    heads, rows = max(mask.shape[1], columns.shape[1]), mask.shape[2]
    return torch.cat([part.expand(1, heads, rows, -1) for part in (mask, columns)], 3)
