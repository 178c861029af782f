"""`blocks: each` in a variant: one variant for each block of the model."""

from collections.abc import Mapping
from typing import Any

from fluxlab.checkpoints.stored import published, stored
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.positions import Program

EACH = "each"


def one_per_block(variants: Mapping[str, Any], row: ModelRow) -> dict[str, Any]:
    """Return the variants, with each that has an edit with `blocks: each` replaced by one for every block.

    They are called `name_0`, `name_1`, …, counted through all blocks of the row's model, double blocks first. Raises
    `UserError` if a name is taken, or if the model's sizes are unknown before it is downloaded.
    """
    if not any(_has_each(program) for program in variants.values()):
        return dict(variants)
    params = (stored(row) or published(row))["transformer"].params
    return expanded(variants, params.depth + params.depth_single_blocks)


def expanded(variants: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Return the variants of `one_per_block` for a model of so many blocks."""
    result: dict[str, Any] = {}
    for name, program in variants.items():
        chosen = [(name, program)]
        if _has_each(program):
            chosen = [(f"{name}_{block}", _in_block(program, block)) for block in range(blocks)]
        for key, value in chosen:
            if key in result or (key != name and key in variants):
                raise UserError(f"variants.{name}: blocks: each makes a variant {key!r}, which exists; rename one")
            result[key] = value
    return result


def _has_each(program: Any) -> bool:
    if isinstance(program, Program) or not isinstance(program, Mapping):
        return False
    return any(isinstance(edit, Mapping) and edit.get("blocks") == EACH for edit in program.values())


def _in_block(program: Mapping[str, Any], block: int) -> dict[str, Any]:
    return {
        name: {**edit, "blocks": block} if isinstance(edit, Mapping) and edit.get("blocks") == EACH else edit
        for name, edit in program.items()
    }
