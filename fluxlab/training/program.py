"""A program that is part of what a model learns: applied in every step of training, and to its samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab import batching
from fluxlab.errors import UserError, join
from fluxlab.model import Rotary
from fluxlab.model.layers import BlockTables
from fluxlab.model.protocols import TransformerSizes
from fluxlab.model.sites import Site
from fluxlab.positions import OPS, Context, Layout, Program, compile_interventions, compile_programs

LASTING = ("ids", "rotation", "scale", "attention", "frequencies", "activations")
"""What the ops of such a program may act on: one table, mask and site of each block, for all captions and times."""


class Convention:
    """What a program makes of the ids of one image size: rotary tables, a mask, and edits of activations.

    rotary, mask: as `Flux.forward` takes them.
    """

    rotary: Rotary | Sequence[BlockTables]
    mask: Tensor | Sequence[Tensor | None] | None

    def __init__(self, program: Program, context: Context):
        made = batching.OnDevice(compile_programs([program], context), context.device, torch.float32)
        self.rotary, self.mask = made.at(1.0, None, torch.empty(0))
        self._program, self._context = program, context
        self._edits: dict[int, object] = {}

    def sites(self, batch: int) -> list[Site | None] | None:
        """Return the sites of one forward of `batch` samples."""
        if batch not in self._edits:
            self._edits[batch] = compile_interventions([self._program], self._context, batch)
        edits = self._edits[batch]
        blocks = self._context.blocks
        tables = [(self.rotary, self.rotary)] * blocks if isinstance(self.rotary, Rotary) else self.rotary
        return None if edits is None else edits.at(0, 1.0, tables)


def convention_for(
    program: Program, params: TransformerSizes, length: int, grid: tuple[int, int], device: str | torch.device
) -> Convention:
    """Return what a program makes of `length` text tokens and an image of `grid` tokens (rows, columns)."""
    context = batching.context(
        params,
        Layout(length, grid, pixels_per_token=4),
        (1.0, 0.0),
        None,
        torch.device(device),
        torch.float32,
        grid,
        length,
    )
    return Convention(program, context)


def read_program(config: object, path: str = "program") -> Program:
    """Return the program of a recipe. Raises UserError for one that is not the same for all captions and times."""
    program = Program.from_config(config, path)
    for edit in program.edits:
        at = join(edit.path, "op")
        if edit.acts_on not in LASTING or edit.op == "inject":
            raise UserError(f"{at}: {edit.op}, expected an op that needs no other image and no text of its own")
        if Program((edit,)).names_words:
            raise UserError(f"{edit.path}: names words, which differ from caption to caption; expected tokens: text")
        if OPS[edit.op].timed:
            raise UserError(f"{at}: {edit.op} depends on the noise level; expected an op that does not")
        for key, changes in (
            ("steps", edit.where["steps"] != "all"),
            ("strength", isinstance(edit.where["strength"], list)),
        ):
            if changes:
                raise UserError(f"{join(edit.path, key)}: a training step has no place in a schedule; leave it out")
    return program
