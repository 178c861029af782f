"""`each` in a variant: one variant for each value of a list, `{each: […]}`, or block of the model, `blocks: each`."""

from collections.abc import Iterator, Mapping
from typing import Any

from fluxlab.checkpoints.stored import published, stored
from fluxlab.config import ModelRow
from fluxlab.errors import UserError, join, show
from fluxlab.positions import Program
from fluxlab.select.arguments import is_list

EACH = "each"


def all_variants(variants: Mapping[str, Any], row: ModelRow) -> dict[str, Any]:
    """Return the variants, with each that contains `each` replaced by one for every value, or for every block.

    They are called `name_0`, `name_1`, … Blocks are counted through all blocks of the row's model, double blocks first.
    Several lists in a variant are of the same length and are read together, so that name_0 has the first value of all.
    A variant with lists and `blocks: each` has all blocks for every value: `name_0_0`, `name_0_1`, …

    Raises `UserError` for lists that are empty or of different lengths, if a name is taken, or if the model's sizes are
    needed and unknown before it is downloaded.
    """
    if not any(_has_each_block(program) for program in variants.values()):
        return expanded(variants, 0)
    params = (stored(row) or published(row))["transformer"].params
    return expanded(variants, params.depth + params.depth_single_blocks)


def expanded(variants: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Return the variants of `all_variants` for a model of so many blocks."""
    result: dict[str, Any] = {}
    for name, program in variants.items():
        chosen = {name: program}
        if count := _values(program, f"variants.{name}"):
            chosen = {f"{name}_{i}": _with_value(program, i) for i in range(count)}
        if _has_each_block(program):
            chosen = {f"{key}_{block}": _in_block(one, block) for key, one in chosen.items() for block in range(blocks)}
        each = f"blocks: {EACH}" if _has_each_block(program) else EACH
        for key, value in chosen.items():
            if key in result or (key != name and key in variants):
                raise UserError(f"variants.{name}: {each} makes a variant {key!r}, which exists; rename one")
            result[key] = value
    return result


def _values(program: Any, path: str) -> int:
    """Return how many values the lists of a program have, 0 if it has no list. Raises `UserError`."""
    found = {} if isinstance(program, Program) else dict(_lists(program, path))
    for where, values in found.items():
        if not is_list(values) or not values:
            raise UserError(f"{where}.{EACH}: {show(values)}; expected a list of values, one for each variant")
    first = next(iter(found), "")
    for where, values in found.items():
        if len(values) != len(found[first]):
            raise UserError(
                f"{where}.{EACH}: has {len(values)} values and {first}.{EACH} has {len(found[first])}; they are read "
                "together and need the same number"
            )
    return len(found[first]) if found else 0


def _lists(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if set(value) == {EACH}:
            yield path, value[EACH]
            return
        for key, part in value.items():
            yield from _lists(part, join(path, key))
    elif is_list(value):
        for i, part in enumerate(value):
            yield from _lists(part, f"{path}[{i}]")


def _with_value(value: Any, i: int) -> Any:
    """Return a program with value number i of each list in its place."""
    if isinstance(value, Mapping):
        return value[EACH][i] if set(value) == {EACH} else {key: _with_value(part, i) for key, part in value.items()}
    return [_with_value(part, i) for part in value] if is_list(value) else value


def _has_each_block(program: Any) -> bool:
    if isinstance(program, Program) or not isinstance(program, Mapping):
        return False
    return any(isinstance(edit, Mapping) and edit.get("blocks") == EACH for edit in program.values())


def _in_block(program: Mapping[str, Any], block: int) -> dict[str, Any]:
    return {
        name: {**edit, "blocks": block} if isinstance(edit, Mapping) and edit.get("blocks") == EACH else edit
        for name, edit in program.items()
    }
