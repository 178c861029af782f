"""A program at one place of a sequence, in numbers: where its tokens stand before and after. No pictures in here."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model import TRANSFORMERS
from fluxlab.positions.apply import resolve
from fluxlab.positions.compiled import Compiled, compile_programs
from fluxlab.positions.program import Program
from fluxlab.select.arguments import AXES
from fluxlab.select.layout import Context, Layout
from fluxlab.select.words import Prompt

FLUX = TRANSFORMERS["dev"]
INDEX, ROW, COL = range(len(AXES))


@dataclass(frozen=True, eq=False)
class View:
    """A program at one step, block, side and head of a sequence.

    before, after: positions `(N, A)` of that side, dropped rotation as 0. query: the token that sees the keys so, None
    where all do. told: what of step, block, head, side and query matters, and whether nothing moved, in words.
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
    told: Mapping[str, str]


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
) -> Context:
    """FLUX.1's sequence: text at (0, 0, 0), image tokens at (0, row, col), those of reference k at (k + 1, row, col).

    The schedule is even. A prompt given as a string counts one token a word, which T5 does not; a `Prompt` brings its
    tokenizer's spans. Raises `UserError` for sizes that are not whole numbers.
    """
    counts = {"text": (text, 0), "double": (double, 0), "single": (single, 0), "heads": (heads, 1), "steps": (steps, 1)}
    counts |= {f"{key} {size[0]}x{size[1]}": (min(size), 1) for key, size in [("grid", grid)]}
    counts |= {f"references[{k}]": (min(size), 1) for k, size in enumerate(references)}
    for key, (n, least) in counts.items():
        if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
            raise UserError(f"{key}: {n!r}, expected a whole number from {least}")
    if double + single < 1:
        raise UserError("double, single: 0, expected at least one block")
    if len(axes_dim) != len(AXES) or any(d < 2 or d % 2 for d in axes_dim):
        raise UserError(f"axes_dim: {tuple(axes_dim)}, expected an even number for each of {', '.join(AXES)}")
    if not 1 < theta < math.inf:
        raise UserError(f"theta: {theta!r}, expected a finite number above 1")
    kinds = [torch.zeros(text, len(AXES), dtype=torch.float32)]
    for index, (rows, cols) in enumerate((grid, *references)):
        kinds.append(
            torch.cartesian_prod(torch.tensor([float(index)]), torch.arange(float(rows)), torch.arange(float(cols)))
        )
    if isinstance(prompt, str):
        spans = [match.span() for match in re.finditer(r"\w+(?:['-]\w+)*|[^\w\s]", prompt)][:text]
        prompt = Prompt(prompt, (*spans, *[(0, 0)] * (text - len(spans))))
    return Context(
        ids=torch.cat(kinds)[None],
        layout=Layout(text, tuple(grid), tuple(tuple(size) for size in references)),
        axes_dim=tuple(axes_dim),
        theta=theta,
        double=double,
        single=single,
        heads=heads,
        sigmas=tuple(1 - i / steps for i in range(steps + 1)),
        prompts=None if prompt is None else [prompt],
    )


def view(
    program: Program | Mapping[str, Any] | None,
    context: Context,
    *,
    step: int | None = None,
    block: int | None = None,
    side: str | None = None,
    head: int | None = None,
) -> View:
    """A program where it acts first, or at the step, block, side and head that are given. Of a batch, the first sample.

    Raises `UserError` for what the sequence does not have.
    """
    program = Program.from_config(program)
    compiled = compile_programs([program], context)
    edits = [resolve(edit, context, 0) for edit in program.edits]
    if side not in (None, "queries", "keys"):
        raise UserError(f"side: {side!r}, expected queries or keys")
    choices = (
        _choices("step", step, context.steps),
        _choices("block", block, context.blocks),
        _choices("head", head, context.heads),
        ("queries", "keys") if side is None else (side,),
    )

    def acting(spot: tuple[int, int, int, str]) -> list:
        s, b, h, one = spot
        found = [edit for edit in edits if edit.strength_in(s, context.sigmas[s], b, h) > 0]
        return [edit for edit in found if edit.touches(one, h) or edit.acts_on == "attention"]

    spot = next(filter(acting, itertools.product(*choices)), tuple(some[0] for some in choices))
    s, b, h, one = spot
    limited = [edit.seen_by for edit in acting(spot) if edit.seen_by is not None]
    query = int(limited[0].nonzero()[0]) if limited else None
    told = {}
    if step is not None or any(not all(edit.steps) or isinstance(edit.strength, list) for edit in edits):
        told["step"] = f"step {s} (σ {context.sigmas[s]:.3g})"
    if block is not None or any(len(edit.blocks) < context.blocks for edit in edits):
        told["block"] = f"block {b} ({f'double {b}' if b < context.double else f'single {b - context.double}'})"
    if head is not None or any(edit.heads is not None for edit in edits):
        told["head"] = f"head {h}"
    if side is not None or any(edit.side != "both" for edit in edits):
        told["side"] = one
    if query is not None:
        name, _, start, _ = next(kind for kind in kinds(context.layout) if kind[2] <= query < kind[3])
        told["query"] = f"as {name} token {query - start} sees them"
    before = context.ids[0].detach().cpu()
    after = compiled.ids(context.sigmas[s], b, one, h, query=query).detach().cpu()
    if program and torch.equal(after, before):
        told["same"] = "positions unchanged"
    return View(program, context, compiled, s, b, one, h, query, before, after, told)


def _choices(key: str, chosen: int | None, count: int) -> Sequence[int]:
    if chosen is None:
        return range(count)
    if isinstance(chosen, bool) or not isinstance(chosen, Integral) or not 0 <= chosen < count:
        raise UserError(f"{key}: {chosen!r}, expected a whole number from 0 to {count - 1}")
    return (int(chosen),)


def kinds(layout: Layout) -> list[tuple[str, int, int, int]]:
    """(name, kind, first token, one past the last) of each kind of tokens."""
    names = ["text", "image", *(f"reference {k}" for k in range(len(layout.references)))]
    return [(name, kind, *layout.range(kind)) for kind, name in enumerate(names)]


def summary(ids: Tensor) -> str:
    """`256 tokens, index 0, row 0 to 15, col 0 to 15, in 256 places` of positions `(n, A)`."""
    if not len(ids):
        return "no tokens"
    ends = zip(AXES, ids.amin(0).tolist(), ids.amax(0).tolist(), strict=True)
    ranges = [f"{name} {low:.4g}" + (f" to {high:.4g}" if high > low else "") for name, low, high in ends]
    count = len(set(places(ids)))
    return ", ".join([f"{len(ids)} tokens", *ranges, f"in {count} place{'s' if count > 1 else ''}"])


def places(ids: Tensor) -> list[tuple[float, float]]:
    """(row, col) of each, equal where nobody could see a difference."""
    return [(round(r, 4) + 0.0, round(c, 4) + 0.0) for _, r, c in ids.tolist()]
