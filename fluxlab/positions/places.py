"""Positions that are added to hidden states as a table of sines and cosines, in place of a rotation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.positions.apply import apply_edits
from fluxlab.positions.resolved import Resolved


class Places:
    """Rows and columns of some tokens, `(n, 2)`, and their sine-cosine tables. path: of the edit, for errors."""

    def __init__(self, positions: Tensor, path: str):
        self.positions, self._path = positions, path
        self._tables: dict[tuple, Tensor] = {}

    def table(self, width: int, base: float, like: Tensor) -> Tensor:
        """Return the table `(n, width)` with the device and dtype of `like`, made once.

        Raises UserError for a width that is no multiple of 4.
        """
        if width % 4:
            raise UserError(f"{self._path}: hidden states are {width} wide, sine_cosine expects a multiple of 4")
        key = (width, base, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = sine_cosine_table(self.positions, width, base).to(like.dtype).to(like.device)
        return self._tables[key]


def sine_cosine_table(positions: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Return the sine-cosine table `(n, width)`, fp64, of positions `(n, 2)`, row and column.

    The first half encodes the column, the second the row, as in the table of SD3 (arXiv 2403.03206). Each half has the
    sines of all frequencies, then the cosines.
    """
    pair = torch.arange(width // 4, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, :, None] * base ** (-pair / len(pair))
    row, col = torch.cat((angles.sin(), angles.cos()), dim=-1).unbind(1)
    return torch.cat((col, row), dim=-1)


@dataclass(frozen=True, eq=False)
class Before:
    """What a sine-cosine table is made from: unchanged ids `(N, A)`, the edits of ids before it, and its edit.

    It stays on the host, where programs are resolved.
    """

    ids: Tensor
    edits: tuple[Resolved, ...]
    of: Resolved

    def strengths(self, step: int, t: float, block: int) -> tuple[float, ...]:
        """Return the strength of each edit at a step and block."""
        return tuple(edit.strength_in(step, t, block, None) for edit in self.edits)

    def places(self, strengths: Sequence[float]) -> Places:
        """Return where edits of these strengths leave the tokens of the table."""
        now = [(n, strength, None) for n, strength in enumerate(strengths) if strength > 0]
        return Places(apply_edits(self.ids, self.edits, now).ids[self.of.tokens, 1:3], self.of.path)


def before(ids: Tensor, edits: Sequence[Resolved], of: Resolved) -> Before:
    """Return what the table of the edit `of` is made from. edits: all that come before it.

    Raises UserError for an edit that gives a token more than one position.
    """
    moving = tuple(edit for edit in edits if edit.acts_on == "ids")
    for edit in moving:
        limits = {"side": edit.side != "both", "heads": edit.heads is not None, "seen_by": edit.seen_by is not None}
        for key, given in limits.items():
            if given:
                raise UserError(f"{edit.path}.{key}: hidden states have one position, leave it out before sine_cosine")
    return Before(ids, moving, of)
