"""What a run has to do, in numbers that are added up batch by batch: nothing here grows with the number of cells."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fluxlab.experiment.cells import Batch, Cell, Settings, in_one_forward, picking_rows, step_rows
from fluxlab.experiment.sources import with_sources_of
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import CELLS, Store
from fluxlab.experiment.work import every_batch


@dataclass
class Outlook:
    """Of all batches: how many, their cells, distinct images and controls, the largest, and samples in one forward.

    stored: images that the store has. arrays: files of attention arrays that it has. The rest is of `left`, the batches
    that are not done: images with the sources that are computed again, the largest group of these, samples in one
    forward, the prompts, and over all steps the samples that are computed (`rows`), those computed before to pick
    tokens (`picking`), and the forwards.
    """

    batches: int = 0
    distinct: int = 0
    controls: dict[str, int] = field(default_factory=dict)
    largest: int = 0
    together: int = 1
    stored: int = 0
    arrays: int = 0
    left: int = 0
    images: int = 0
    group: Sequence[Cell] = ()
    left_together: int = 1
    prompts: dict[str, None] = field(default_factory=dict)
    rows: int = 0
    picking: int = 0
    forwards: int = 0

    @property
    def every(self) -> int:
        """The images of cells and controls."""
        return self.distinct + sum(self.controls.values())


def outlook(experiment: Experiment, settings: Settings, store: Store | None) -> Outlook:
    """Go through all batches of an experiment once."""
    found = Outlook()
    for batch in every_batch(experiment, settings):
        samples = with_sources_of(batch.cells)
        together = in_one_forward(samples, settings)
        found.batches += 1
        found.largest = max(found.largest, len(batch.cells))
        found.together = max(found.together, together)
        if batch.folder == CELLS:
            found.distinct += len(batch.cells)
        else:
            for cell in batch.cells:
                found.controls[cell.variant] = found.controls.get(cell.variant, 0) + 1
        images, arrays = _stored(experiment, batch, store) if store else ([], [])
        found.stored += sum(images)
        found.arrays += sum(arrays)
        if not store or not all((*images, *arrays)):
            _add(found, samples, together, settings)
    return found


def _stored(experiment: Experiment, batch: Batch, store: Store) -> tuple[list[bool], list[bool]]:
    """Return for every cell of a batch whether the store has its image, and its attention arrays if it has any."""
    captured = experiment.captures if batch.folder == CELLS else ""
    arrays = [store.has_arrays(cell, captured) for cell in batch.cells] if captured else []
    return [store.has(cell, batch.folder) for cell in batch.cells], arrays


def _add(found: Outlook, samples: Sequence[Cell], together: int, settings: Settings) -> None:
    """Add a batch that is not done."""
    rows, picking = step_rows(samples, settings), picking_rows(samples, settings)
    found.left += 1
    found.images += len(samples)
    found.group = max(found.group, samples, key=len)
    found.left_together = max(found.left_together, together)
    found.prompts |= dict.fromkeys(cell.prompt for cell in samples)
    found.rows += sum(rows)
    found.picking += sum(picking)
    found.forwards += sum(-(-n // together) for n in (*rows, *picking))
