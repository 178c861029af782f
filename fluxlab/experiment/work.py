"""The work of an experiment: its batches, a portion of the prompts at a time, and which of them a store has."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from fluxlab.experiment.cells import Batch, Cell, Settings, batches, cells, each_cell, portions, references
from fluxlab.experiment.costs import number
from fluxlab.experiment.shards import Shard
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import CELLS, REFERENCES, Store


def every_portion(experiment: Experiment, settings: Settings) -> Iterator[list[Batch]]:
    """Yield the batches of all cells, then those of all controls, a portion of the prompts at a time.

    A batch is within one portion. Cells that take activations from cells of another portion compute these again.
    """
    number = 0
    per_prompt = len(experiment.variants) * len(experiment.seeds), 2
    for folder, of, count in zip((CELLS, REFERENCES), (cells, references), per_prompt, strict=True):
        for prompts in portions(experiment, count):
            groups = batches(of(experiment, settings, prompts), settings)
            yield [Batch(number + i, folder, tuple(group)) for i, group in enumerate(groups)]
            number += len(groups)


def every_batch(experiment: Experiment, settings: Settings) -> Iterator[Batch]:
    """Yield the batches of all cells and controls, in order."""
    return chain.from_iterable(every_portion(experiment, settings))


def is_done(store: Store, experiment: Experiment, cell: Cell, folder: str) -> bool:
    """Return whether the store has a cell's image, and its attention arrays. Controls have no arrays."""
    captured = experiment.captures if folder == CELLS else ""
    return store.has(cell, folder) and (not captured or store.has_arrays(cell, captured))


@dataclass
class Survey:
    """What a store has. total, done: images, of all batches or those of a shard. incomplete: for each batch number
    whether it lacks one; 1 byte per batch is all that is kept.
    """

    total: int = 0
    done: int = 0
    incomplete: bytearray = field(default_factory=bytearray)


def survey(experiment: Experiment, settings: Settings, store: Store, shard: Shard | None = None) -> Survey:
    """Look for every image and attention array in a store."""
    found = Survey()
    for batch in every_batch(experiment, settings):
        own = shard is None or shard.has(batch.number)
        done = sum(is_done(store, experiment, cell, batch.folder) for cell in batch.cells) if own else 0
        found.total += len(batch.cells) if own else 0
        found.done += done
        found.incomplete.append(own and done < len(batch.cells))
    return found


def lacking(experiment: Experiment, settings: Settings, store: Store) -> int:
    """Return how many images have no file yet, without opening those that have one."""
    captured = experiment.captures

    def present(cell: Cell, folder: str) -> bool:
        arrays = captured and folder == CELLS
        return store.png(cell.key, folder).with_suffix(".json").is_file() and (
            not arrays or store.arrays(cell.key, captured).is_file()
        )

    every = every_batch(experiment, settings)
    return sum(not present(cell, batch.folder) for batch in every for cell in batch.cells)


def unused_images(experiment: Experiment, settings: Settings, store: Store) -> str:
    """Return a line about images in the store that are not part of the changed experiment; "" if there are none."""
    counts = store.other_cells(cell.key for cell in each_cell(experiment, settings))
    if not counts:
        return ""
    listed = ", ".join(f"{variant} ({count})" for variant, count in counts.items())
    return (
        f"the experiment has changed: {number(sum(counts.values()), 'image')} in {store.path / CELLS} "
        f"left out of the tables: {listed}"
    )
