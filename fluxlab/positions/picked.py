"""Programs whose edits act on tokens that a probe picks: which they are, and the same programs with tokens in numbers.

While an image is computed, each step has a program of its own, with the tokens that were found for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fluxlab.errors import UserError, join
from fluxlab.positions.edit import Edit
from fluxlab.positions.program import Program
from fluxlab.select.arguments import is_list
from fluxlab.select.layout import Layout
from fluxlab.select.picked import check_count, is_picked, key_of, pick_of, picked
from fluxlab.select.where import resolve_steps, strength_at

EXAMPLE = "tokens picked by a probe: random ones as an example"


def picks(edit: Edit) -> list[tuple[str, dict[str, Any]]]:
    """Return the path and the selection of all tokens of an edit that a probe picks."""
    return [
        found
        for part in (edit.where, edit.arguments)
        for key, value in part.items()
        for found in _find(value, join(edit.path, key))
    ]


def _find(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_picked(value):
        yield path, value
    elif is_list(value):
        for i, part in enumerate(value):
            yield from _find(part, f"{path}[{i}]")


def has_picks(program: Program) -> bool:
    """Return whether a probe picks tokens for some edit of a program."""
    return any(picks(edit) for edit in program.edits)


def without_picks(program: Program) -> Program:
    """Return the program whose attention the probe reads: the edits of which all tokens are known."""
    return Program(tuple(edit for edit in program.edits if not picks(edit)))


def acting(program: Program, sigmas: Sequence[float], step: int, t: float) -> list[dict[str, Any]]:
    """Return the selections of edits that act at a step, each once."""
    found = {}
    for edit in program.edits:
        for path, selection in picks(edit):
            steps = resolve_steps(edit.where.get("steps", "all"), sigmas, join(path.rpartition(".")[0], "steps"))
            if steps[step] and strength_at(edit.where.get("strength", 1.0), t) > 0:
                found[key_of(selection)] = selection
    return list(found.values())


def measured(selections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the selections that need attention, not random ones."""
    return [selection for selection in selections if pick_of(selection)[0] != "random"]


def with_tokens(program: Program, tokens: Mapping[str, list[int]]) -> Program:
    """Return the program with tokens in numbers. tokens: indices into the sequence, by `key_of` of the selection.

    Edits of which some tokens are missing, because they do not act, are left out.
    """
    edits = []
    for edit in program.edits:
        found = picks(edit)
        if all(key_of(selection) in tokens for _, selection in found):
            edits.append(_filled(edit, lambda selection: tokens[key_of(selection)]) if found else edit)
    return Program(tuple(edits))


def example(program: Program, layout: Layout) -> Program:
    """Return the program with random tokens in place of those that a probe picks, to check, draw and annotate it.

    Raises `UserError` for more tokens than there are.
    """

    def random(selection: Mapping[str, Any]) -> list[int]:
        of = {"random": pick_of(selection)[1], "of": selection["of"], "seed": 0}
        return picked(of, layout, 0, None)

    edits = []
    for edit in program.edits:
        for path, selection in picks(edit):
            check_count(selection, layout, path)
        edits.append(_filled(edit, random) if picks(edit) else edit)
    return Program(tuple(edits))


def _filled(edit: Edit, tokens: Callable[[Mapping[str, Any]], list[int]]) -> Edit:
    def fill(value: Any) -> Any:
        if is_picked(value):
            return {"indices": tokens(value), "of": "all"}
        return [fill(part) for part in value] if is_list(value) and any(map(_any_picked, value)) else value

    where, arguments = ({key: fill(value) for key, value in part.items()} for part in (edit.where, edit.arguments))
    return replace(edit, where=where, arguments=arguments)


def _any_picked(value: Any) -> bool:
    return is_picked(value) or (is_list(value) and any(map(_any_picked, value)))


def check_readable(program: Program) -> None:
    """Raise `UserError` if the attention that picks tokens is an average over several tables."""
    windows = next((edit for edit in without_picks(program).edits if edit.acts_on == "windows"), None)
    for edit in program.edits:
        for path, selection in picks(edit) if windows else ():
            if pick_of(selection)[0] != "random":
                raise UserError(
                    f"{path}: picked by attention, which has no single value in a program with {windows.op} "
                    f"({windows.path}); leave one of them out"
                )


def measuring_steps(program: Program, sigmas: Sequence[float]) -> list[bool]:
    """Return for each step whether a forward pass before it picks tokens by their attention."""
    return [bool(measured(acting(program, sigmas, step, t))) for step, t in enumerate(sigmas[:-1])]
