"""A trial of a program's edits, so that their errors appear before a run and not in the middle of it."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.apply import apply_edits, blocked, check_keys_are_left
from fluxlab.positions.calling import call, check_type, head_factor, try_score_factor
from fluxlab.positions.resolved import Resolved
from fluxlab.select.layout import Context


def try_out(edits: Sequence[Resolved], ids: Tensor, context: Context) -> None:
    """Call every op once. Raises UserError for an edit that does not work with the others or with the context."""
    for n, edit in enumerate(edits):
        if len(edit.tokens):
            apply_edits(ids.detach(), edits, [(n, 1.0, None)])
            if edit.acts_on == "scores":
                try_score_factor(edit, ids.detach())
            elif edit.acts_on == "heads":
                head_factor(edit, ids.new_ones(context.heads))
    windows = [edit for edit in edits if edit.acts_on == "windows"]
    for first, second in itertools.combinations(windows, 2):
        if first.blocks & second.blocks and any(a and b for a, b in zip(first.steps, second.steps, strict=True)):
            raise UserError(f"{second.path}: a second edit of windows in the same step and block as {first.path}")
    masks = [n for n, edit in enumerate(edits) if edit.acts_on in ("attention", "text")]
    heads = range(context.heads) if any(edits[n].heads is not None for n in masks) else (None,)
    at_full_strength = {
        tuple(n for n in masks if edits[n].strength_in(step, sigma, block, head) == 1)
        for step, sigma in enumerate(context.sigmas[:-1])
        for block in range(context.blocks)
        for head in heads
    }
    for together in at_full_strength if masks else ():
        if any(edit.acts_on == "text" for edit in edits):
            blocked(edits, [(n, 1.0, None) for n in together], ids)
        else:
            _try_masks([edits[n] for n in together], len(ids))


def _try_masks(edits: Sequence[Resolved], tokens: int) -> None:
    """Raise what `blocked` does at full strength, from booleans, which takes a sixth of the time with 4352 tokens."""
    forbidden = None
    for edit in edits:
        more = call(edit)
        check_type(edit, more, (tokens, tokens), torch.bool)
        forbidden = more if forbidden is None else forbidden | more
        check_keys_are_left(forbidden, edit)
