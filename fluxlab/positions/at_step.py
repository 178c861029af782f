"""A program at one step, block, side and head of a sequence, in numbers: the positions before and after. No drawing."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.families import FAMILIES
from fluxlab.model import TRANSFORMERS
from fluxlab.positions.apply import Resolved, resolve
from fluxlab.positions.compiled import Compiled
from fluxlab.positions.compiling import compile_programs
from fluxlab.positions.picked import EXAMPLE, example, has_picks
from fluxlab.positions.program import Program
from fluxlab.positions.waves import Waves, unchanged
from fluxlab.select.arguments import AXES, EVERY_AXIS
from fluxlab.select.layout import Context, Layout
from fluxlab.select.words import Prompt, split_words

FLUX = TRANSFORMERS["dev"]
INDEX, ROW, COL = range(len(AXES))


@dataclass(frozen=True, eq=False)
class ProgramAtStep:
    """A program at one step, block, side and head of a sequence.

    before, after: positions `(N, A)` on that side. Dropped rotation counts as position 0. query: the query token that
    sees the keys at `after`, None if all queries do. labels: which of step, block, head, side and query matter, in
    words, and "same" if no position changed.
    """

    program: Program
    context: Context
    compiled: Compiled
    step: int
    block: int
    side: str
    head: int
    query: int | None
    before: Tensor
    after: Tensor
    labels: Mapping[str, str]


def sequence(
    *,
    grid: tuple[int, int] = (16, 16),
    text: int = 24,
    references: Sequence[tuple[int, int]] = (),
    prompt: Prompt | str | None = None,
    axes_dim: Sequence[int] = FLUX.axes_dim,
    theta: float = FLUX.theta,
    double: int = FLUX.depth,
    single: int = FLUX.depth_single_blocks,
    heads: int = FLUX.num_heads,
    steps: int = 28,
    trained: tuple[int, int] = (64, 64),
) -> Context:
    """Return the context of a sequence, without a model: of FLUX.1, or with four numbers in `axes_dim` of FLUX.2.

    Tokens have the ids of the family (`fluxlab.families`): in FLUX.1 text is at (0, 0, 0), image tokens are at
    (0, row, col), and those of reference image k at (k + 1, row, col). The schedule is even. A prompt given as a string
    has one token per word or punctuation mark, unlike T5. A `Prompt` has the spans of its tokenizer. trained: the grid
    that the model was trained on. Raises UserError for sizes that are not whole numbers.
    """
    counts = {"text": (text, 0), "double": (double, 0), "single": (single, 0), "heads": (heads, 1), "steps": (steps, 1)}
    counts |= {f"{key} {size[0]}x{size[1]}": (min(size), 1) for key, size in [("grid", grid), ("trained", trained)]}
    counts |= {f"references[{k}]": (min(size), 1) for k, size in enumerate(references)}
    for key, (n, least) in counts.items():
        if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
            raise UserError(f"{key}: {n!r}, expected a whole number from {least}")
    if double + single < 1:
        raise UserError("double, single: 0, expected at least one block")
    family = next((f for f in FAMILIES.values() if len(f.axes) == len(axes_dim)), None)
    if family is None or any(d < 2 or d % 2 for d in axes_dim):
        raise UserError(
            f"axes_dim: {tuple(axes_dim)}, expected an even number for each of {', '.join(AXES)}, or of t, h, w, l"
        )
    if not 1 < theta < math.inf:
        raise UserError(f"theta: {theta!r}, expected a finite number above 1")
    ids = family.ids(text, [grid, *references])
    if isinstance(prompt, str):
        spans = split_words(prompt)[:text]
        prompt = Prompt(prompt, tuple(spans))
    return Context(
        ids=torch.cat(ids)[None],
        layout=Layout(text, tuple(grid), tuple(tuple(size) for size in references)),
        axes_dim=tuple(axes_dim),
        theta=theta,
        double=double,
        single=single,
        heads=heads,
        sigmas=tuple(1 - i / steps for i in range(steps + 1)),
        prompts=None if prompt is None else [prompt],
        trained=tuple(trained),
    )


def program_at_step(
    program: Program | Mapping[str, Any] | None,
    context: Context,
    *,
    step: int | None = None,
    block: int | None = None,
    side: str | None = None,
    head: int | None = None,
) -> ProgramAtStep:
    """Return a program at the given step, block, side and head, by default the first where it acts.

    Of a batch, the first sample is used. Raises UserError for a step, block, side or head that the context lacks.
    """
    program = Program.from_config(program)
    picked, program = has_picks(program), example(program, context.layout)
    compiled = compile_programs([program], context)
    edits = [resolve(edit, context, 0) for edit in program.edits]
    if side not in (None, "queries", "keys"):
        raise UserError(f"side: {side!r}, expected queries or keys")
    options = (
        _options("step", step, context.steps),
        _options("block", block, context.blocks),
        _options("head", head, context.heads),
        ("queries", "keys") if side is None else (side,),
    )

    def acting(s: int, b: int, h: int, shown: str) -> list[Resolved]:
        at_work = [edit for edit in edits if edit.strength_in(s, context.sigmas[s], b, h) > 0]
        scores = ("attention", "scores", "heads", "text")
        return [edit for edit in at_work if edit.touches(shown, h) or edit.acts_on in scores]

    first = next(
        (spot for spot in itertools.product(*options) if acting(*spot)), tuple(values[0] for values in options)
    )
    s, b, h, shown = first
    limited = [edit.seen_by for edit in acting(*first) if edit.seen_by is not None]
    query = int(limited[0].nonzero()[0]) if limited else None
    before = context.ids[0].detach().cpu()
    after = compiled.ids(context.sigmas[s], b, shown, h, query=query).detach().cpu()
    labels = {}
    if step is not None or any(not all(edit.steps) or isinstance(edit.strength, list) for edit in edits):
        labels["step"] = f"step {s} (σ {context.sigmas[s]:.3g})"
    if block is not None or any(len(edit.blocks) < context.blocks for edit in edits):
        labels["block"] = f"block {b} ({f'double {b}' if b < context.double else f'single {b - context.double}'})"
    if head is not None or any(edit.heads is not None for edit in edits):
        labels["head"] = f"head {h}"
    if side is not None or any(edit.side != "both" for edit in edits):
        labels["side"] = shown
    if query is not None:
        name, _, start, _ = next(group for group in token_groups(context.layout) if group[2] <= query < group[3])
        labels["query"] = f"as {name} token {query - start} sees them"
    windows = compiled.windows(context.sigmas[s], b)
    if windows > 1:
        labels["windows"] = f"the first of {windows} windows"
    if picked:
        labels["picked"] = EXAMPLE
    if program and torch.equal(after, before):
        labels["same"] = "positions unchanged"
    waves, own = compiled.waves(context.sigmas[s], b, shown, h, query=query), unchanged(context)
    if not all((x == y).all() for x, y in zip(waves, own, strict=True)):
        labels["waves"] = _changed_waves(waves, own)
    return ProgramAtStep(program, context, compiled, s, b, shown, h, query, before, after, labels)


def _changed_waves(waves: Waves, own: Waves) -> str:
    """Return `frequencies × 0.5 to 1, gain 1.1`."""
    parts = []
    for name, values in (
        ("frequencies ×", waves.frequency / own.frequency),
        ("gain", waves.gain),
        ("scores of queries ×", waves.score),
    ):
        low, high = float(values.detach().min()), float(values.detach().max())
        if low != 1 or high != 1:
            parts.append(f"{name} {low:.4g}" + (f" to {high:.4g}" if high > low else ""))
    return ", ".join(parts)


def _options(key: str, value: int | None, count: int) -> Sequence[int]:
    if value is None:
        return range(count)
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value < count:
        raise UserError(f"{key}: {value!r}, expected a whole number from 0 to {count - 1}")
    return (int(value),)


def token_groups(layout: Layout) -> list[tuple[str, int, int, int]]:
    """Return (name, kind, first token, one past the last) for text, image and each reference image."""
    names = ["text", "image", *(f"reference {k}" for k in range(len(layout.references)))]
    return [(name, kind, *layout.range(kind)) for kind, name in enumerate(names)]


def summary(ids: Tensor) -> str:
    """Describe positions `(n, A)`: `256 tokens, index 0, row 0 to 15, col 0 to 15, in 256 places`."""
    if not len(ids):
        return "no tokens"
    ends = zip(EVERY_AXIS[: ids.shape[1]], ids.amin(0).tolist(), ids.amax(0).tolist(), strict=True)
    ranges = [f"{name} {low:.4g}" + (f" to {high:.4g}" if high > low else "") for name, low, high in ends]
    count = len(set(rounded(ids)))
    return ", ".join([f"{len(ids)} tokens", *ranges, f"in {count} place{'s' if count > 1 else ''}"])


def rounded(ids: Tensor) -> list[tuple[float, float]]:
    """Return (row, col) of each token, rounded so that positions that look equal are equal."""
    return [(round(r, 4) + 0.0, round(c, 4) + 0.0) for _, r, c, *_ in ids.tolist()]
