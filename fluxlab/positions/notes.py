"""Notes on a program: what is allowed and often not meant, such as an edit that changes nothing. Changes nothing."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fluxlab.positions.apply import Placed, Resolved, apply_edits, resolve
from fluxlab.positions.picked import example
from fluxlab.positions.program import Program
from fluxlab.positions.selection_notes import Note, selections
from fluxlab.positions.waves import unchanged
from fluxlab.select.arguments import is_list
from fluxlab.select.layout import IMAGE, Context

STEPS = 5
"""Steps of different strength or noise level that are looked at: the first, the last, and some between them."""

SILENT = "changes nothing: its strength is 0 at every step that it acts on"

MANY_EDITS = 8
"""Edits beyond which pairs that cancel out are not searched for."""


def lint(program: Program, context: Context, sample: int = 0) -> list[Note]:
    """Return notes on a program for one sample: selections of all, edits without effect, unusual positions.

    For tokens that a probe picks, random ones are looked at.

    Raises the `UserError` that compiling the program would raise.
    """
    program = example(program, context.layout)
    # edits of activations have an effect that only the model knows
    resolved = [resolve(edit, context, sample) for edit in program.edits]
    edits = [edit for edit in resolved if edit.acts_on != "activations"]
    views = _Views(edits, context, context.ids[sample % len(context.ids)].detach())
    notes = [note for edit in program.edits for note in selections(edit, context, sample)]
    notes += [Note(edit.path, SILENT) for edit in resolved if edit.acts_on == "activations" and _is_silent(edit)]
    notes += _without_effect(edits, views)
    notes += _measured_early(edits, views)
    return list(dict.fromkeys(notes + _positions(views, context)))


class _Views:
    """The program as blocks, sides, heads and queries see it at some steps, each different view once."""

    def __init__(self, edits: Sequence[Resolved], context: Context, ids: Tensor):
        self.edits, self.context, self.ids = edits, context, ids
        self._placed: dict[tuple, Placed] = {}
        states: dict[tuple, None] = {}
        for step, sigma in enumerate(context.sigmas[:-1]):
            states.setdefault(tuple(edit.state_at(step, sigma) for edit in edits))
        every = list(states)
        chosen = sorted({round(i * (len(every) - 1) / (STEPS - 1)) for i in range(STEPS)})
        self.states = [every[i] for i in chosen]

    def __iter__(self) -> Iterator[tuple[tuple, tuple[int, ...]]]:
        """Yield (state of the edits, numbers of those that act), once for each different view."""
        edits = self.edits
        blocks = {tuple(block in edit.blocks for edit in edits) for block in range(self.context.blocks)}
        heads = {tuple(edit.in_head(head) for edit in edits) for head in range(self.context.heads)}
        limits = [edit.seen_by for edit in edits if edit.seen_by is not None]
        queries = torch.stack(limits, 1).unique(dim=0).tolist() if limits else [[]]
        seen = set()
        for state, block, side, head, query in itertools.product(
            self.states, blocks, ("queries", "keys"), heads, queries
        ):
            sees = iter(query)
            visible = [edit.seen_by is None or next(sees) for edit in edits]
            acts = tuple(
                n
                for n, edit in enumerate(edits)
                if state[n][0] > 0 and block[n] and head[n] and visible[n] and edit.touches(side)
            )
            if (state, acts) not in seen:
                seen.add((state, acts))
                yield state, acts

    def placed(self, state: tuple, acts: Sequence[int]) -> Placed:
        now = tuple((n, *state[n]) for n in acts)
        if now not in self._placed:
            self._placed[now] = apply_edits(self.ids, self.edits, now)
        return self._placed[now]

    def same(self, without: set[int], until: int | None = None) -> bool:
        """Return whether the program is the same without some edits. until: only the edits up to this one count."""
        for state, acts in self:
            acts = acts if until is None else tuple(n for n in acts if n <= until)
            fewer = tuple(n for n in acts if n not in without)
            if fewer != acts and not self.placed(state, acts).equals(self.placed(state, fewer)):
                return False
        return True


def _without_effect(edits: Sequence[Resolved], views: _Views) -> Iterator[Note]:
    idle = set()
    for n, edit in enumerate(edits):
        if len(edit.tokens) and _is_silent(edit):
            idle.add(n)
            yield Note(edit.path, SILENT)
            continue
        if edit.acts_on in ("size", "text"):
            idle.add(n)
            continue
        if edit.acts_on in ("scores", "heads"):
            idle.add(n)  # no table has them
            if not len(edit.tokens):
                yield Note(edit.path, "changes nothing: this prompt has none of its tokens")
            elif _factors(edit) <= {1}:
                yield Note(edit.path, "changes nothing: its factor is 1")
            elif edit.op.name == "distance" and _is_never_far(n, edit, views):
                yield Note(edit.path, "changes nothing: no query that it selects is that far from a key")
            continue
        if edit.acts_on == "attention":
            if not len(edit.tokens):
                yield Note(edit.path, "changes nothing: this prompt has none of its tokens")
            elif not _forbids(edit):
                yield Note(edit.path, "changes nothing: no query selected by `from` has a key that it may not see")
            continue
        if not len(edit.tokens):
            idle.add(n)
            yield Note(edit.path, "changes nothing: this prompt has none of its tokens")
        elif views.same({n}, until=n):
            idle.add(n)
            yield Note(edit.path, f"changes nothing{_reason(edit)}")
        elif views.same({n}):
            idle.add(n)
            yield Note(edit.path, "has no effect: a later edit overwrites what it changes")
    rest = [n for n, edit in enumerate(edits) if n not in idle and edit.acts_on != "attention"]
    if len(rest) <= MANY_EDITS:
        for a, b in itertools.combinations(rest, 2):
            if views.same({a, b}):
                yield Note(edits[a].path, f"has no effect: {_last(edits[b].path)} undoes it")


def _is_silent(edit: Resolved) -> bool:
    return all(edit.state_at(step, sigma)[0] == 0 for step, sigma in enumerate(edit.context.sigmas[:-1]))


def _is_never_far(n: int, edit: Resolved, views: _Views) -> bool:
    """Return whether `distance` has factor 1 even between the extremes of each axis, which no pair exceeds."""
    ends = []
    for name in ("from_", "to"):
        placed = [views.placed(state, [m for m in acts if m < n]) for state, acts in views]
        chosen = torch.cat([one.ids[edit.arguments[name]] for one in placed])
        ends.append(torch.stack((chosen.amin(0), chosen.amax(0))))
    both = torch.ones(2, dtype=torch.bool)
    arguments = {**edit.arguments, "from_": both, "to": both}
    return bool((edit.op.function(*ends, edit.context.trained, edit.scope.axes, **arguments) == 1).all())


def _reason(edit: Resolved) -> str:
    if _measures(edit):
        rows, cols = edit.context.trained
        what = "size" if edit.acts_on == "windows" else "factor"
        return f": its {what} is 1, since the image is not larger than the {rows} × {cols} tokens of training"
    factor = edit.given.get("factor")
    return (
        ": its factor is 1" if factor is not None and set(factor if is_list(factor) else [factor]) <= {1, None} else ""
    )


def _factors(edit: Resolved) -> set[float]:
    """Return the factors of an edit of scores."""
    return {edit.given[key] for key in ("factor", "to") if isinstance(edit.given.get(key), float)}


def _measures(edit: Resolved) -> bool:
    """Return whether an op takes its factor from the size of the image."""
    if edit.acts_on == "windows":
        return edit.given.get("size") is None
    return edit.acts_on == "frequencies" and edit.given.get("factor", edit.given.get("length", 1)) is None


def _forbids(edit: Resolved) -> bool:
    if set(edit.arguments) >= {"from_", "to", "rule"}:
        to = edit.arguments["to"] if edit.arguments["rule"] == "block" else ~edit.arguments["to"]
        return bool(edit.arguments["from_"].any() and to.any())
    return True


def _measured_early(edits: Sequence[Resolved], views: _Views) -> Iterator[Note]:
    """Note frequency ops that measure an extent which a later edit changes."""
    for n, edit in enumerate(edits):
        if not _measures(edit) or edit.op.name == "imax":  # which counts tokens
            continue
        for state, acts in views:
            if n in acts:
                moving = [m for m in acts if edits[m].acts_on not in ("rotation", "windows")]
                at, end = (
                    _extent(views.placed(state, [m for m in moving if m <= last]).ids, views.context)
                    for last in (n, len(edits))
                )
                if not torch.equal(at, end):
                    later = next(e for e in edits[n + 1 :] if e.acts_on == "ids")
                    yield Note(
                        edit.path, f"measures the image before {_last(later.path)} changes its extent; write it last"
                    )
                    break


def _extent(ids: Tensor, context: Context) -> Tensor:
    start, stop = context.layout.range(IMAGE)
    return ids[start:stop].amax(0) - ids[start:stop].amin(0)


def _positions(views: _Views, context: Context) -> list[Note]:
    """Note unusual positions after the program, the most extreme of all views."""
    start, stop = context.layout.range(IMAGE)
    before = views.ids[start:stop]
    own = unchanged(context).frequency
    shared, rounded, near, far, span = 0, 0, math.inf, 0.0, (0.0, 0.0)
    for state, acts in views:
        placed = views.placed(state, [n for n in acts if views.edits[n].acts_on != "rotation"])
        image = placed.ids[start:stop]
        if not torch.equal(image, before):
            together = _sharing(image)
            shared = max(shared, together)
            rounded = max(rounded, _sharing(image.bfloat16().float()) - together)
            apart = _spacing(image, context.layout.grid)
            if len(apart) and not together:
                near, far = min(near, float(apart.min())), max(far, float(apart.max()))
        extent = (placed.ids.amax(0) - placed.ids.amin(0) + 1)[1:3].tolist()
        slower = placed.waves is not None and bool((placed.waves.frequency < own).any())
        if not slower and any(n > most for n, most in zip(extent, context.trained, strict=True)):
            span = max(span, tuple(extent))
    notes = []
    if shared:
        notes.append(f"{shared} of {stop - start} image tokens share their position with another")
    if rounded:
        notes.append(
            f"{rounded} image tokens share their position in bfloat16, as in code that casts ids; here ids are fp32"
        )
    if near < 1 - 1e-4:
        notes.append(f"neighbouring image tokens are down to {near:.3g} apart; models are trained with a spacing of 1")
    if far > math.pi:
        notes.append(
            f"neighbouring image tokens are up to {far:.3g} apart, above π: the fastest pair of channels turns by more "
            "than half a circle between them"
        )
    if any(span):
        rows, cols = context.trained
        notes.append(f"positions span {span[0]:.4g} × {span[1]:.4g} tokens, the model was trained on {rows} × {cols}")
    return [Note("", text) for text in notes]


def _sharing(ids: Tensor) -> int:
    """Return how many tokens have the position of another."""
    _, counts = ids.unique(dim=0, return_counts=True)
    return int(counts[counts > 1].sum())


def _spacing(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the distances in rows and columns between neighbours on the grid."""
    places = ids[:, 1:3].double().reshape(*grid, 2)
    return torch.cat([places.diff(dim=axis).norm(dim=-1).flatten() for axis in (0, 1)])


def _last(path: str) -> str:
    return path.rpartition(".")[2]
