"""Programs compiled to rotary tables and masks. Equal tables are one tensor, built once and shared."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import Rotary, rotary_table
from fluxlab.positions.apply import Now, Placed, Resolved, apply_edits, blocked, resolve, try_out
from fluxlab.positions.waves import Waves, unchanged
from fluxlab.select.layout import Context

if TYPE_CHECKING:
    from fluxlab.positions.program import Program

Keys = Rotary | KeyGroups


class Placement(NamedTuple):
    """The arguments `rotary=` and `mask=` of `Flux.forward` at one step.

    rotary: one table for all blocks, or (queries, keys) for each block. mask: None, or for each block an additive mask
    `(B or 1, H or 1, N, N)` or None. Equal tables and equal masks are the same object.
    """

    rotary: Rotary | list[tuple[Rotary, Keys]]
    mask: list[Tensor | None] | None


class _Cache:
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


class Compiled:
    """The programs of a batch, one per sample, for one sequence, model and schedule. Call `at(t)` at each step."""

    def __init__(
        self, samples: Sequence[tuple[Resolved, ...]], ids: Sequence[Tensor], of: Sequence[int], context: Context
    ):
        self._samples = samples  # the edits of each distinct sample
        self._ids = ids  # its unchanged ids (N, A)
        self._of = of  # for each sample of the batch, which distinct one it is
        self._context = context
        self._state: tuple | None = None
        self._placement: Placement | None = None
        self._cache = _Cache()

    def step(self, t: float) -> int:
        """Return the step whose σ is t, or whose interval contains t."""
        sigmas = self._context.sigmas
        return max((i for i in range(len(sigmas) - 1) if sigmas[i] >= t), default=0)

    def at(self, t: float) -> Placement:
        """Return tables and masks at time t (1 is noise, 0 the image): the same object as before if nothing changed."""
        step = self.step(t)
        state = tuple(tuple(edit.state_at(step, t) for edit in edits) for edits in self._samples)
        if state != self._state:
            self._cache.next_step()
            self._state = state
            self._placement = self._build()
        return self._placement

    def ids(
        self,
        t: float = 1.0,
        block: int = 0,
        side: str = "queries",
        head: int = 0,
        sample: int = 0,
        query: int | None = None,
    ) -> Tensor:
        """Return the positions `(N, A)` that one block and head use, those of keys as the token `query` sees them.

        Dropped rotation counts as position 0.
        """
        return self._whole(t, block, side, head, sample, query).ids

    def scales(self, t: float = 1.0, block: int = 0, head: int = 0, sample: int = 0) -> Tensor:
        """Return the factor of each query's scores, `(N,)`."""
        placed = self._whole(t, block, "queries", head, sample, None)
        return torch.ones_like(placed.ids[:, 0]) if placed.row_factors is None else placed.row_factors

    def waves(
        self,
        t: float = 1.0,
        block: int = 0,
        side: str = "queries",
        head: int = 0,
        sample: int = 0,
        query: int | None = None,
    ) -> Waves:
        """Return the frequencies and gains that one block and head use, `(N or 1, d/2)`. Arguments as for `ids`."""
        placed = self._whole(t, block, side, head, sample, query)
        return unchanged(self._context) if placed.waves is None else placed.waves

    def side_table(
        self, t: float, side: str, block: int = 0, head: int = 0, sample: int = 0, query: int | None = None
    ) -> Rotary:
        """Return the table `(N, d/2)` of one side of one block, head and sample, as the token `query` sees it."""
        self.at(t)
        which = self._of[sample]
        edits = self._samples[which]
        now = tuple(
            n for n in self._active(block)[which] if edits[n].touches(side, head) and edits[n].is_seen_by(query)
        )
        return Rotary(*(part[0, 0] for part in self._head_table(which, now, side)))

    def _whole(self, t: float, block: int, side: str, head: int, sample: int, query: int | None) -> Placed:
        self.at(t)
        which = self._of[sample]
        edits = self._samples[which]
        now = self._active(block)[which]
        return self._placed(which, tuple(n for n in now if edits[n].touches(side, head) and edits[n].is_seen_by(query)))

    def _active(self, block: int) -> tuple[tuple[int, ...], ...]:
        """Return the edits that act in a block now, for each distinct sample."""
        return tuple(
            tuple(n for n, edit in enumerate(edits) if state[n][0] > 0 and block in edit.blocks)
            for edits, state in zip(self._samples, self._state, strict=True)
        )

    def _build(self) -> Placement:
        pairs: dict[Any, tuple] = {}
        blocks = []
        for block in range(self._context.blocks):
            active = self._active(block)
            if active not in pairs:
                pairs[active] = (self._queries(active), self._keys(active)), self._mask(active)
            blocks.append(pairs[active])
        tables, masks = [pair for pair, _ in blocks], [mask for _, mask in blocks]
        first = tables[0][0]
        single = all(queries is first and keys is first for queries, keys in tables)
        return Placement(first if single else tables, masks if any(mask is not None for mask in masks) else None)

    def _queries(self, active: tuple) -> Rotary:
        return self._table("queries", active, None)

    def _keys(self, active: tuple) -> Keys:
        """Return one table, or one for each group of queries that see the same keys."""
        limited = [
            edits[n].seen_by
            for edits, now in zip(self._samples, active, strict=True)
            for n in now
            if edits[n].touches("keys") and edits[n].seen_by is not None
        ]
        if not limited:
            return self._table("keys", active, None)
        _, group = torch.stack(limited, 1).unique(dim=0, return_inverse=True)
        queries = [(group == g).nonzero()[:, 0] for g in range(int(group.max()) + 1)]
        tables = [self._table("keys", active, int(members[0])) for members in queries]
        if all(table is tables[0] for table in tables):
            return tables[0]
        key = ("groups", active, *map(id, tables))
        return self._cache.get(key, lambda: KeyGroups(tuple(queries), tuple(tables)))

    def _table(self, side: str, active: tuple, query: int | None) -> Rotary:
        """Return the batch's table `(B or 1, H or 1, N, d/2)` of one side, as the token `query` sees it."""
        rows = []
        for which, now in enumerate(active):
            edits = self._samples[which]
            now = [n for n in now if edits[n].touches(side) and edits[n].is_seen_by(query)]
            by_head = any(edits[n].heads is not None for n in now)
            heads = range(self._context.heads) if by_head else (0,)
            rows.append(
                [self._head_table(which, tuple(n for n in now if edits[n].touches(side, h)), side) for h in heads]
            )
        rows = [row[:1] if all(table is row[0] for table in row) else row for row in rows]
        rows = [rows[which] for which in self._of]
        if all(_same(row, rows[0]) for row in rows):
            rows = rows[:1]
        if len(rows) == 1 and len(rows[0]) == 1:
            return rows[0][0]
        key = tuple(tuple(id(table) for table in row) for row in rows)
        return self._cache.get(("joined", key), lambda: _join(rows))

    def _now(self, which: int, edits: tuple[int, ...]) -> tuple[Now, ...]:
        return tuple((n, *self._state[which][n]) for n in edits)

    def _placed(self, which: int, edits: tuple[int, ...]) -> Placed:
        now = self._now(which, edits)
        return self._cache.get(("ids", which, now), lambda: apply_edits(self._ids[which], self._samples[which], now))

    def _head_table(self, which: int, edits: tuple[int, ...], side: str) -> Rotary:
        """Return the table `(1, 1, N, d/2)` of some edits of one sample. Equal ids and waves share one."""
        placed = self._placed(which, edits)
        if side == "keys":
            placed = placed.without_score()
        key = ("table", which, self._now(which, edits), placed.has_score)
        return self._cache.get(key, lambda: self._shared(placed))[1]

    def _shared(self, placed: Placed) -> tuple[Placed, Rotary]:
        for known, table in self._cache.values("table"):
            if known.equals(placed):
                return known, table
        waves = placed.waves and placed.waves[:2]
        table = rotary_table(placed.ids[None], self._context.axes_dim, self._context.theta, waves)
        if placed.row_factors is not None:
            table = Rotary(*(part * placed.row_factors[:, None] for part in table))
        return placed, table

    def _mask(self, active: tuple) -> Tensor | None:
        """Return the batch's additive mask `(B or 1, H or 1, N, N)`, or None."""
        rows = []
        for which, now in enumerate(active):
            edits = self._samples[which]
            now = [n for n in now if edits[n].acts_on == "attention"]
            by_head = any(edits[n].heads is not None for n in now)
            heads = range(self._context.heads) if by_head else (0,)
            rows.append([self._blocked(which, tuple(n for n in now if edits[n].in_head(h))) for h in heads])
        if all(part is None for row in rows for part in row):
            return None
        rows = [rows[which] for which in self._of]
        if all(_same(row, rows[0]) for row in rows):
            rows = rows[:1]
        key = ("mask", tuple(tuple(id(part) for part in row) for row in rows))
        return self._cache.get(key, lambda: _join_masks(rows, self._ids[0]))

    def _blocked(self, which: int, edits: tuple[int, ...]) -> Tensor | None:
        now = self._now(which, edits)
        if not edits:
            return None
        make = lambda: blocked(self._samples[which], now, self._ids[which])  # noqa: E731
        return self._cache.get(("blocked", which, now), make)


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _join(rows: list[list[Rotary]]) -> Rotary:
    heads = max(len(row) for row in rows)
    parts = []
    for part in (0, 1):
        joined = [torch.cat([table[part] for table in row], 1).expand(-1, heads, -1, -1) for row in rows]
        parts.append(torch.cat(joined, 0))
    return Rotary(*parts)


def _join_masks(rows: list[list[Tensor | None]], like: Tensor) -> Tensor:
    heads = max(len(row) for row in rows)
    zeros = like.new_zeros(len(like), len(like))
    joined = [torch.stack([zeros if part is None else part for part in row]).expand(heads, -1, -1) for row in rows]
    return torch.stack(joined)


def compile_programs(programs: "Sequence[Program]", context: Context) -> Compiled:
    """Compile one program per sample, or one for all. Equal samples share their tables.

    Raises UserError, with the path of the edit, for what the context does not have.
    """
    ids = context.ids
    tokens, axes = context.layout.tokens, len(context.axes_dim)
    if ids.ndim != 3 or ids.shape[1:] != (tokens, axes) or not ids.is_floating_point():
        raise UserError(f"ids: shape {tuple(ids.shape)} {ids.dtype}, expected floating point (B, {tokens}, {axes})")
    batch = max(len(programs), len(ids), len(context.prompts or ()))
    sizes = {"programs": len(programs), "ids": len(ids), "prompts": len(context.prompts or [None])}
    if any(n not in (1, batch) for n in sizes.values()):
        raise UserError(", ".join(f"{n} {key}" for key, n in sizes.items()) + ": expected equal numbers, or one")
    samples, sources, of = [], [], []
    for b in range(batch):
        program = programs[b % len(programs)]
        prompt = b % len(context.prompts) if context.prompts else 0
        source = (b % len(ids), program, context.prompts[prompt] if context.prompts and program.names_words else None)
        if source not in sources:
            sources.append(source)
            samples.append(tuple(resolve(edit, context, prompt) for edit in program.edits))
            try_out(samples[-1], ids[b % len(ids)], context)
        of.append(sources.index(source))
    return Compiled(samples, [ids[source[0]] for source in sources], of, context)
