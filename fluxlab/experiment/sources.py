"""Cells that take activations from other cells (op inject): which they are, and the batches in which they meet."""

from collections.abc import Mapping, Sequence
from typing import Any

from fluxlab.errors import UserError, join, nearest, show
from fluxlab.experiment.cell import Cell
from fluxlab.positions import Program, sources_of, with_sources


def check_sources(variants: Mapping[str, Program], baseline: str, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise UserError for a source that is not a cell of the experiment, and for cells that take from each other."""
    known: dict[str, Sequence] = {"variant": list(variants), "prompt": prompts, "seed": seeds}
    for program in variants.values():
        for path, source in sources_of(program):
            if "sample" in source:
                listed = ", ".join(variants)
                raise UserError(f"{path}: {source['sample']} is a sample of a batch, expected a variant: {listed}")
            for key, value in source.items():
                if isinstance(value, Mapping):
                    if value["next"] % len(known[key]) == 0:
                        raise UserError(
                            f"{join(path, key)}.next: {value['next']} is the cell's own {key}: the experiment has "
                            f"{len(known[key])} in all; add another, or use another number"
                        )
                elif value not in known[key]:
                    listed = "its prompts" if key == "prompt" else ", ".join(map(str, known[key]))
                    hint = nearest(value, known[key]) if key == "variant" else ""
                    raise UserError(f"{path}: {key} {show(value)} is not in the experiment, expected {listed}{hint}")
    for name in variants:
        for prompt in prompts:
            for seed in seeds:
                _check_cycle((name, prompt, seed), variants, baseline, (prompts, seeds), ())


Place = tuple[str, str, int]
"""(variant, prompt, seed)."""


Listed = tuple[Sequence[str], Sequence[int]]
"""The prompts and the seeds of an experiment."""


def places_of(program: Program, place: Place, baseline: str, listed: Listed) -> list[Place]:
    """Return the source of every `inject` of a cell's program, in order.

    What a source leaves out is that of the cell, and the baseline for the variant.
    """
    _, prompt, seed = place
    return [
        (
            source.get("variant", baseline),
            _chosen(source.get("prompt", prompt), prompt, listed[0]),
            _chosen(source.get("seed", seed), seed, listed[1]),
        )
        for _, source in sources_of(program)
    ]


def _chosen(value: Any, own: Any, listed: Sequence) -> Any:
    """Return a source's prompt or seed; `{next: n}` counts from the cell's own, around the end of the list."""
    return listed[(listed.index(own) + value["next"]) % len(listed)] if isinstance(value, Mapping) else value


def _check_cycle(
    place: Place, variants: Mapping[str, Program], baseline: str, listed: Listed, above: tuple[Place, ...]
) -> None:
    for (path, _), source in zip(
        sources_of(variants[place[0]]), places_of(variants[place[0]], place, baseline, listed), strict=True
    ):
        if source == place:
            continue  # a cell may take from itself, at other tokens
        if source in above:
            names = " → ".join(dict.fromkeys(name for name, *_ in (*above, place, source)))
            raise UserError(f"{path}: {names} take from each other, which has no order")
        _check_cycle(source, variants, baseline, listed, (*above, place))


def numbered(together: Sequence[Cell]) -> list[Program]:
    """Return the programs of cells that are computed together, with sources as numbers of samples."""
    index = {cell.key: i for i, cell in enumerate(together)}
    return [
        with_sources(cell.program, [{"sample": index[key]} for key in cell.takes_from])
        if cell.takes_from
        else cell.program
        for cell in together
    ]


def with_sources_of(batch: Sequence[Cell]) -> list[Cell]:
    """Return a batch, followed by the sources that it lacks. They are computed with it and not stored by it."""
    together = {cell.key: cell for cell in batch}
    waiting = [source for cell in batch for source in cell.sources]
    while waiting:
        cell = waiting.pop(0)
        if cell.key not in together:
            together[cell.key] = cell
            waiting += cell.sources
    return list(together.values())


def meeting(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    """Return distinct cells in batches of up to `size` with their sources, at least one cell.

    Cells with common sources are neighbours, so that few sources are computed more than once.
    """
    group: dict[str, str] = {}

    def root(key: str) -> str:
        while group.setdefault(key, key) != key:
            key = group[key]
        return key

    for cell in cells:
        for source in with_sources_of([cell]):
            group[root(source.key)] = root(cell.key)
    order = {key: n for n, key in enumerate(dict.fromkeys(root(cell.key) for cell in cells))}
    batches: list[list[Any]] = []
    for cell in sorted(cells, key=lambda cell: order[root(cell.key)]):
        if batches and len(with_sources_of([*batches[-1], cell])) <= size:
            batches[-1].append(cell)
        else:
            batches.append([cell])
    return batches
