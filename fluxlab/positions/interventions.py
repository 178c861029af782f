"""The edits of activations of a batch: which sample takes what from which, at every step and block.

`Interventions.at` returns the sites that `Flux.forward` takes. The source of an `inject` is a sample of the same batch,
so that its activations are there when they are needed and nothing is stored.
"""

import graphlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, show
from fluxlab.model.sites import OF_HEADS, Site
from fluxlab.positions.activation_ops import VELOCITY
from fluxlab.positions.apply import Resolved, resolve
from fluxlab.positions.patching import Action, Patch, blend
from fluxlab.positions.places import Before, Places, before
from fluxlab.select.layout import IMAGE, Context
from fluxlab.select.tokens import resolve_tokens

if TYPE_CHECKING:
    from fluxlab.positions.program import Program


@dataclass(frozen=True, eq=False)
class Planned:
    """An edit of activations of one sample. source: the sample it takes from, None for `ablate`.

    theirs: indices of the source's tokens, one for each of the edit's tokens; all candidates with `map: match`.
    of_velocity: whether it acts on the model's output, which belongs to all blocks together. on_image: the edit's
    tokens and the source's where both are behind the text, counted from there. heads: numbers, None for all.
    before: of `sine_cosine`, what its table is made from.
    """

    edit: Resolved
    sample: int
    source: int | None = None
    theirs: Tensor | None = None
    of_velocity: bool = False
    on_image: tuple[Tensor, Tensor] | None = None
    heads: Tensor | None = None
    before: Before | None = None

    def moved(self, device: torch.device) -> "Planned":
        """Return the edit with its indices on the device of the model. `seen_by` stays: it is read on the host."""

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        edit = replace(
            self.edit,
            tokens=move(self.edit.tokens),
            # a mask would be read back each time that it selects
            arguments={
                key: move(value.nonzero()[:, 0] if isinstance(value, Tensor) and value.dtype == torch.bool else value)
                for key, value in self.edit.arguments.items()
            },
        )
        on_image = self.on_image and (move(self.on_image[0]), move(self.on_image[1]))
        return replace(self, edit=edit, theirs=move(self.theirs), on_image=on_image, heads=move(self.heads))


class Interventions:
    """The edits of activations of a batch. Call `at` at each step."""

    def __init__(self, planned: Sequence[Planned], context: Context):
        self._planned, self._blocks = (
            [plan.moved(context.device or context.ids.device) for plan in planned],
            context.blocks,
        )
        self._groups: dict[Any, Any] = {}
        self._places: dict[Any, Places] = {}

    def at(self, step: int, t: float, tables: Sequence[tuple[Any, Any]]) -> list[Site | None] | None:
        """Return a site per block, None for a block without an edit; None if no edit acts at this step.

        tables: the rotary tables (queries, keys) of each block at this step.
        """
        active = [(plan, plan.edit.strength_at(step, t)) for plan in self._planned]
        active = [(plan, strength) for plan, strength in active if strength > 0]
        if not active:
            return None
        sites: list[Site | None] = []
        for block in range(self._blocks):
            acting = [(plan, strength) for plan, strength in active if block in plan.edit.blocks]
            actions = [_action(plan, strength, self._given(plan, step, t, block)) for plan, strength in acting]
            sites.append(Patch(actions, tables[block], self._groups) if actions else None)
        return sites

    def _given(self, plan: Planned, step: int, t: float, block: int) -> dict[str, Any]:
        """Return the arguments of a plan's op; of `sine_cosine` with the places of its tokens."""
        given = plan.edit.arguments
        if plan.before is None:
            return given
        now = plan.before.strengths(step, t, block)
        key = (id(plan), now)
        if key not in self._places:
            made = plan.before.places(now)
            same = (known for known in self._places.values() if torch.equal(known.positions, made.positions))
            self._places[key] = next(same, made)
        return {**given, "places": self._places[key]}

    def velocity(self, step: int, t: float, v: Tensor) -> Tensor:
        """Return the model's output `(B, N, C)` for the image tokens, with the edits of it at this step."""
        active = [
            (plan, strength)
            for plan in self._planned
            if plan.of_velocity and (strength := plan.edit.strength_at(step, t)) > 0
        ]
        if not active:
            return v
        v = v.clone()
        for plan, strength in active:
            own, theirs = plan.on_image
            new = plan.edit.op.function(v[plan.source][theirs], **plan.edit.arguments)
            v[plan.sample, own] = blend(v[plan.sample, own], new, strength)
        return v


def _action(plan: Planned, strength: float, given: dict[str, Any]) -> Action:
    edit = plan.edit
    return Action(
        op=edit.op.function,
        arguments=given,
        what=tuple(given["what"]),
        sample=plan.sample,
        source=plan.source,
        tokens=edit.tokens,
        theirs=plan.theirs,
        heads=plan.heads,
        seen_by=edit.seen_by,
        strength=strength,
        path=edit.path,
    )


def has_interventions(program: "Program") -> bool:
    """Return whether a program changes activations."""
    return any(edit.acts_on == "activations" for edit in program.edits)


def sources_of(program: "Program") -> list[tuple[str, dict[str, Any]]]:
    """Return the path and the source of every `inject` of a program, in order."""
    return [(join(e.path, "source"), e.arguments["source"]) for e in program.edits if "source" in e.arguments]


def with_sources(program: "Program", sources: Sequence[dict[str, Any]]) -> "Program":
    """Return a program with other sources for its `inject`s, in order."""
    left = iter(sources)
    return replace(
        program,
        edits=tuple(
            replace(e, arguments={**e.arguments, "source": next(left)}) if "source" in e.arguments else e
            for e in program.edits
        ),
    )


def compile_interventions(programs: "Sequence[Program]", context: Context, batch: int) -> Interventions | None:
    """Return the edits of activations of a batch, one program per sample or one for all. None if there are none.

    Raises UserError, with the path of the edit, for what the context or the batch does not have.
    """
    if not any(has_interventions(program) for program in programs):
        return None
    planned = []
    for b in range(batch):
        edits = programs[b % len(programs)].edits
        prompt = b % len(context.prompts) if context.prompts else 0
        for n, edit in enumerate(edits):
            if edit.acts_on == "activations":
                plan = _plan(resolve(edit, context, prompt), b, batch, context)
                if edit.op == "sine_cosine":
                    earlier = [resolve(other, context, prompt) for other in edits[:n]]
                    plan = replace(plan, before=before(context.ids[b % len(context.ids)], earlier, plan.edit))
                planned.append(plan)
    return Interventions(_in_order(planned), context)


def _plan(edit: Resolved, sample: int, batch: int, context: Context) -> Planned:
    given = edit.arguments
    heads = [site for site in given["what"] if site not in OF_HEADS]
    if edit.heads is not None and heads:
        raise UserError(f"{join(edit.path, 'heads')}: {sorted(edit.heads)}, but {heads[0]} has no heads; leave it out")
    if "source" not in given:
        if edit.seen_by is not None:
            raise UserError(f"{join(edit.path, 'seen_by')}: a key of inject, which {edit.op.name} does not take")
        return Planned(edit, sample, heads=_heads(edit))
    check_inject(given, edit.seen_by is not None, len(edit.blocks) == context.blocks, edit.path)
    source = given["source"]
    if "sample" not in source:
        raise UserError(
            f"{join(edit.path, 'source')}: {show(source)} names a cell of an experiment; "
            "in generate() give the number of a sample of the batch, from 0"
        )
    if not 0 <= source["sample"] < batch:
        raise UserError(
            f"{join(edit.path, 'source')}: {source['sample']}, expected a sample of this batch below {batch}"
        )
    velocity = VELOCITY in given["what"] and len(edit.blocks) == context.blocks
    theirs, text = _theirs(edit, source["sample"], context), context.layout.range(IMAGE)[0]
    on_image = None
    if velocity:
        behind = (edit.tokens >= text) & (theirs >= text)
        on_image = edit.tokens[behind] - text, theirs[behind] - text
    return Planned(edit, sample, source["sample"], theirs, velocity, on_image, _heads(edit))


def _heads(edit: Resolved) -> Tensor | None:
    return None if edit.heads is None else torch.tensor(sorted(edit.heads))


def check_inject(given: dict[str, Any], seen_by: bool, whole: bool, path: str) -> None:
    """Raise UserError for arguments of `inject` that do not fit together. whole: it acts in all blocks."""
    what = set(given["what"])
    if given["mode"] == "append" and what != {"keys", "values"}:
        raise UserError(f"{join(path, 'what')}: {given['what']}, expected [keys, values] with mode: append")
    if seen_by and not what <= {"keys", "values"}:
        raise UserError(f"{join(path, 'seen_by')}: only for keys and values, but what is {given['what']}")
    if what == {VELOCITY} and not whole:
        raise UserError(f"{join(path, 'blocks')}: velocity is the output of the whole model, expected all blocks")
    if VELOCITY in what and given["map"] == "match":
        raise UserError(f"{join(path, 'what')}: velocity has no map: match, which compares inputs of a block")
    if given["rotation"] == "before" and not what & {"queries", "keys"}:
        raise UserError(f"{join(path, 'rotation')}: before, but of {given['what']} nothing is rotated; leave it out")


def _theirs(edit: Resolved, source: int, context: Context) -> Tensor:
    """Return the source's token for each token of the edit, or all candidates with `map: match`."""
    given, path = edit.arguments, join(edit.path, "from")
    prompt = source % len(context.prompts) if context.prompts else 0
    chosen = edit.tokens
    if given["from_"] is not None:
        chosen = resolve_tokens(given["from_"], context, prompt, path)
    if not len(edit.tokens) or not len(chosen) or given["map"] == "match":  # words that a negative prompt lacks
        return chosen
    own, other = (context.layout.scope(tokens).rectangle() for tokens in (edit.tokens, chosen))
    if isinstance(given["map"], list):
        return _given(given["map"], chosen, len(edit.tokens), join(edit.path, "map"))
    if given["map"] == "stretch":
        if own is None or other is None:
            raise UserError(f"{join(edit.path, 'map')}: stretch needs tokens and from that fill a rectangle of a grid")
        rows, cols = (_stretched(a, b, chosen.device) for a, b in zip(own, other, strict=True))
        return chosen[(rows[:, None] * other[1] + cols[None]).flatten()]
    if len(chosen) != len(edit.tokens) or (own and other and own != other):
        sizes = [f"{a[0]} × {a[1]}" if a else str(n) for a, n in ((own, len(edit.tokens)), (other, len(chosen)))]
        raise UserError(
            f"{join(edit.path, 'map')}: tokens selects {sizes[0]} and from {sizes[1]} tokens; "
            "add map: stretch, map: match, or a list of numbers"
        )
    return chosen


def _given(numbers: list[int], chosen: Tensor, count: int, path: str) -> Tensor:
    if len(numbers) != count:
        raise UserError(f"{path}: {len(numbers)} numbers, expected one for each of the {count} tokens")
    wrong = [n for n in numbers if not 0 <= n < len(chosen)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]}, expected the number of one of the {len(chosen)} tokens of the source")
    return chosen[torch.tensor(numbers, device=chosen.device)]


def _stretched(count: int, of: int, device: torch.device) -> Tensor:
    """Return the nearest of `of` places for each of `count` places over the same length."""
    return (torch.arange(count, device=device) * 2 + 1) * of // (2 * count)


def _in_order(planned: Sequence[Planned]) -> list[Planned]:
    """Return the edits so that a source's own edits come first. Raises UserError for samples that need each other."""
    needs: dict[int, set[int]] = {}
    for plan in planned:
        needs.setdefault(plan.sample, set())
        if plan.source not in (None, plan.sample):
            needs[plan.sample].add(plan.source)
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        cycle = " → ".join(map(str, error.args[1]))
        path = next(plan.edit.path for plan in planned if plan.source is not None)
        raise UserError(f"{join(path, 'source')}: samples {cycle} inject into each other, which has no order") from None
    return sorted(planned, key=lambda plan: order.index(plan.sample))
