"""Programs compiled to rotary tables and masks. Equal tables are one tensor, built once and shared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import Rotary, rotary_table
from fluxlab.model.varied import Keys, Variation, Varied
from fluxlab.positions.apply import Now, Placed, Resolved, apply_edits, blocked
from fluxlab.positions.joining import Cache, Placement, join, join_masks, query_groups, same, same_values
from fluxlab.positions.variations import has_variation, make_variation
from fluxlab.positions.waves import Seen, Waves, unchanged
from fluxlab.select.layout import Context


class Compiled:
    """The programs of a batch, one per sample, for one sequence, model and schedule. Call `at(t)` at each step.

    sees_latents: whether an edit depends on the latents, which `at` then needs.
    """

    def __init__(
        self, samples: Sequence[tuple[Resolved, ...]], ids: Sequence[Tensor], of: Sequence[int], context: Context
    ):
        self._samples = samples  # the edits of each distinct sample
        self._ids = ids  # its unchanged ids (N, A)
        self._of = of  # for each sample of the batch, which distinct one it is
        self._rows = of  # for each row of the placement, which distinct sample it is
        self._context = context
        self._state: tuple | None = None
        self._placement: Placement | None = None
        self._cache = Cache()
        self._latents: Tensor | None = None
        self.sees_latents = any(edit.op.sees_latent for edits in samples for edit in edits)
        self._version = 0

    def step(self, t: float) -> int:
        """Return the step whose σ is t, or whose interval contains t."""
        sigmas = self._context.sigmas
        return max((i for i in range(len(sigmas) - 1) if sigmas[i] >= t), default=0)

    def at(self, t: float, rows: Sequence[int] | None = None, latents: Tensor | None = None) -> Placement:
        """Return tables and masks at time t (1 is noise, 0 the image): the same object as before if nothing changed.

        rows: the samples of the batch to which they apply, in this order; None means all. Which groups of queries there
        are, and whether there is a mask, depends on the whole batch, so that a sample has the same bits in any `rows`.
        latents: of the whole batch, packed, `(B, N, C)`, for edits that depend on them. Tables are a function of these
        values and t alone.
        """
        step = self.step(t)
        of = self._of if rows is None or len(self._of) == 1 else [self._of[sample] for sample in rows]
        if latents is not None and self.sees_latents:
            assert len(latents) == len(self._of), "programs that see latents are compiled for each sample"
            if self._latents is None or not same_values(latents, self._latents):
                self._latents, self._version = latents, self._version + 1
        state = tuple(
            tuple(self._state_of(which, edit, step, t) for edit in edits) for which, edits in enumerate(self._samples)
        )
        if state != self._state:
            self._cache.next_step()
            self._placement = None
        if self._placement is None or of != self._rows:
            self._state, self._rows = state, of
            self._placement = self._build()
        return self._placement

    def _state_of(self, which: int, edit: Resolved, step: int, t: float) -> tuple[float, float | Seen | None]:
        strength, at = edit.state_at(step, t)
        if edit.op.sees_latent and at is not None:
            own = None if self._latents is None else self._latents[self._of.index(which)]
            at = Seen(t, self._version, own)
        return strength, at

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

    def windows(self, t: float = 1.0, block: int = 0, sample: int = 0) -> int:
        """Return over how many tables the attention of a block is averaged. The methods above describe the first."""
        self.at(t)
        which = self._of[sample]
        return self._placed(which, self._active(block)[which]).windows

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
                pairs[active] = (self._table("queries", active, None), self._varied(active)), self._mask(active)
            blocks.append(pairs[active])
        tables, masks = [pair for pair, _ in blocks], [mask for _, mask in blocks]
        first = tables[0][0]
        single = all(queries is first and keys is first for queries, keys in tables)
        return Placement(first if single else tables, masks if any(mask is not None for mask in masks) else None)

    def _varied(self, active: tuple) -> Keys:
        """Return the keys' tables, with the variations of the samples that have any."""
        keys = self._keys(active)
        made = [self._variation(which, now) for which, now in enumerate(active)]
        chosen = [(b, made[which]) for b, which in enumerate(self._rows) if made[which]]
        if not chosen:
            return keys
        key = ("varied", id(keys), *((b, id(variation)) for b, variation in chosen))
        make = lambda: Varied(keys, tuple(variation._replace(sample=b) for b, variation in chosen))  # noqa: E731
        return self._cache.get(key, make)

    def _variation(self, which: int, now: tuple[int, ...]) -> Variation | None:
        """Return how one sample attends in a block, None if one call of a kernel does."""
        edits, state = self._samples[which], self._state[which]
        if not has_variation([edits[n] for n in now]):
            return None

        def table(side: str, query: int | None, window: int) -> Rotary:
            return join([self._row(side, which, now, query, window)])

        def ids(side: str, query: int | None, before: int) -> Tensor:
            chosen = [n for n in now if n < before and edits[n].touches(side) and edits[n].is_seen_by(query)]
            return self._placed(which, tuple(n for n in chosen if edits[n].acts_on != "windows")).ids

        count = self._placed(which, now).windows if self._has_windows(which, now) else 0
        acting = [(n, edits[n], state[n][0]) for n in now]
        key = ("variation", which, self._now(which, now))
        return self._cache.get(key, lambda: make_variation(acting, count, self._context.heads, table, ids))

    def _keys(self, active: tuple) -> Rotary | KeyGroups:
        """Return one table, or one for each group of queries that see the same keys."""
        limited = [
            edits[n]
            for which, (edits, now) in enumerate(zip(self._samples, active, strict=True))
            for n in now
            if not self._has_windows(which, now)
        ]
        queries = query_groups(limited)
        if len(queries) == 1:
            return self._table("keys", active, None)
        seen = [self._tables("keys", active, int(members[0])) for members in queries]
        tables = [self._joined(each) for each in seen]
        # asked of all samples: attention by group has other last bits, which must not depend on `self._rows`
        if all(same(a, b) for each in seen for a, b in zip(each, seen[0], strict=True)):
            return tables[0]
        key = ("groups", active, *map(id, tables))
        return self._cache.get(key, lambda: KeyGroups(tuple(queries), tuple(tables)))

    def _table(self, side: str, active: tuple, query: int | None) -> Rotary:
        """Return the batch's table `(B or 1, H or 1, N, d/2)` of one side, as the token `query` sees it."""
        return self._joined(self._tables(side, active, query))

    def _tables(self, side: str, active: tuple, query: int | None) -> list[list[Rotary]]:
        """Return for each distinct sample a table per head, or one. Samples with windows are not rotated by it."""
        return [
            [self._no_rotation(which)] if self._has_windows(which, now) else self._row(side, which, now, query)
            for which, now in enumerate(active)
        ]

    def _joined(self, tables: list[list[Rotary]]) -> Rotary:
        rows = [tables[which] for which in self._rows]
        if all(same(row, rows[0]) for row in rows):
            rows = rows[:1]
        if len(rows) == 1 and len(rows[0]) == 1:
            return rows[0][0]
        key = tuple(tuple(id(table) for table in row) for row in rows)
        return self._cache.get(("joined", key), lambda: join(rows))

    def _row(self, side: str, which: int, now: Sequence[int], query: int | None, window: int = 0) -> list[Rotary]:
        """Return one sample's tables `(1, 1, N, d/2)` of one side: one for each head, or one for all."""
        edits = self._samples[which]
        now = [n for n in now if edits[n].touches(side) and edits[n].is_seen_by(query)]
        by_head = any(edits[n].heads is not None for n in now)
        heads = range(self._context.heads) if by_head else (0,)
        row = [self._head_table(which, tuple(n for n in now if edits[n].touches(side, h)), side, window) for h in heads]
        return row[:1] if all(table is row[0] for table in row) else row

    def _no_rotation(self, which: int) -> Rotary:
        def make() -> Rotary:
            ones = torch.ones_like(self._head_table(which, (), "keys").cos)
            return Rotary(ones, torch.zeros_like(ones))

        return self._cache.get(("unrotated", which), make)

    def _has_windows(self, which: int, now: Sequence[int]) -> bool:
        return any(self._samples[which][n].acts_on == "windows" for n in now)

    def _now(self, which: int, edits: tuple[int, ...]) -> tuple[Now, ...]:
        return tuple((n, *self._state[which][n]) for n in edits)

    def _placed(self, which: int, edits: tuple[int, ...], window: int = 0) -> Placed:
        now = self._now(which, edits)
        make = lambda: apply_edits(self._ids[which], self._samples[which], now, window)  # noqa: E731
        return self._cache.get(("ids", which, now, window), make)

    def _head_table(self, which: int, edits: tuple[int, ...], side: str, window: int = 0) -> Rotary:
        """Return the table `(1, 1, N, d/2)` of some edits of one sample. Equal ids and waves share one."""
        window = window if self._has_windows(which, edits) else 0
        placed = self._placed(which, edits, window)
        if side == "keys":
            placed = placed.without_score()
        key = ("table", which, self._now(which, edits), placed.has_score, window)
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
            now = [n for n in now if edits[n].acts_on in ("attention", "text")]
            by_head = any(edits[n].heads is not None for n in now)
            heads = range(self._context.heads) if by_head else (0,)
            rows.append([self._blocked(which, tuple(n for n in now if edits[n].in_head(h))) for h in heads])
        if all(part is None for row in rows for part in row):
            return None
        rows = [rows[which] for which in self._rows]
        if all(same(row, rows[0]) for row in rows):
            rows = rows[:1]
        key = ("mask", tuple(tuple(id(part) for part in row) for row in rows))
        return self._cache.get(key, lambda: join_masks(rows, self._ids[0]))

    def _blocked(self, which: int, edits: tuple[int, ...]) -> Tensor | None:
        now = self._now(which, edits)
        # the texts of regions are hidden where their edit does not act
        if not edits and all(
            edit.acts_on != "text" or not edit.context.layout.further for edit in self._samples[which]
        ):
            return None
        make = lambda: blocked(self._samples[which], now, self._ids[which])  # noqa: E731
        return self._cache.get(("blocked", which, now), make)
