"""What a program does at each step, as values to compare: programs that act alike up to a step can share its cost."""

import json
from collections.abc import Sequence

from fluxlab.errors import join
from fluxlab.positions.program import Program
from fluxlab.select.where import resolve_steps, strength_at

Action = tuple[tuple[str, float], ...]
"""The edits that act at one step, in order, each with its strength."""


def actions(program: Program, sigmas: Sequence[float]) -> list[Action]:
    """Return for each step what the program does. Equal values give equal tables and masks for the same prompt.

    Programs whose edits are spelled differently count as different, even if they have the same effect. sigmas: the
    schedule, one value more than steps. Raises `UserError` for steps that the schedule does not have.
    """
    edits = [_when(edit, sigmas) for edit in program.edits]
    return [
        tuple((what, strengths[step]) for what, strengths in edits if strengths[step] > 0)
        for step in range(len(sigmas) - 1)
    ]


def _when(edit, sigmas: Sequence[float]) -> tuple[str, list[float]]:
    """Return what an edit does, without when, and its strength at each step."""
    steps = resolve_steps(edit.where["steps"], sigmas, join(edit.path, "steps"))
    where = {key: value for key, value in edit.where.items() if key not in ("steps", "strength")}
    what = json.dumps([edit.op, edit.arguments, where], sort_keys=True, ensure_ascii=False)
    strength = edit.where["strength"]
    return what, [strength_at(strength, t) if acts else 0.0 for t, acts in zip(sigmas, steps, strict=False)]
