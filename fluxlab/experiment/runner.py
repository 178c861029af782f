"""Compute the images of an experiment that its store lacks. Complete images are never computed again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from fluxlab.config import ModelRow
from fluxlab.errors import NonFiniteError, UserError, show
from fluxlab.experiment import captures
from fluxlab.experiment.cells import Cell, Settings, batches, cells, references
from fluxlab.experiment.costs import number
from fluxlab.experiment.settings import (
    check_counts,
    check_kernel,
    check_unchanged,
    device_of,
    dtype_of,
    halved,
    resolve,
)
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import CELLS, EXPERIMENT, REFERENCES, Store
from fluxlab.experiment.versions import versions
from fluxlab.pipeline import Pipeline
from fluxlab.probes import INDEX, Probe, of_sample
from fluxlab.progress import Progress

Load = Callable[[ModelRow, torch.dtype | None, str], Pipeline]

Work = Sequence[tuple[Sequence[Cell], str]]
"""Cells with the folder of the store that their images belong in."""


MOST_FAILURES = 20
"""Cells without an image that an error message lists."""


@dataclass
class Filled:
    """What `fill` did. written: images computed. failures: one line per cell without an image, because of NaN."""

    settings: Settings
    written: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise `NonFiniteError` if a cell has no image."""
        if self.failures:
            count = number(len(self.failures), "image")
            lines = [f"{count} not written, because of NaN or infinity:", *self.failures[:MOST_FAILURES]]
            if len(self.failures) > MOST_FAILURES:
                lines.append(f"… and {len(self.failures) - MOST_FAILURES} more; their rows in metrics.csv are empty")
            raise NonFiniteError("\n".join(lines))


def fill(
    experiment: Experiment,
    store: Store,
    load: Load,
    *,
    batch_tokens: int | None = None,
    threads: int | None = None,
    command: str = "",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Filled:
    """Compute every image and every attention array that the store lacks. `report(done, total)` follows each batch.

    A batch with a missing cell is computed whole, as in an undisturbed run, so that a resumed store has the same bits.
    Complete files are not written again. A cell whose latents become NaN or infinite gets no image; the others are
    finished. Raises `UserError`, before anything is computed, for what does not fit the model or the store.
    """
    check_counts(batch_tokens=batch_tokens, threads=threads)
    check_name(experiment, store)
    known = store.settings()
    same = known is not None and store.record["digest"] == experiment.digest
    pipe = None if same else load(experiment.model, dtype_of(experiment.dtype), device_of(experiment, known))
    settings = known if same else resolve(experiment, pipe, known, batch_tokens, threads)
    check_unchanged(settings, store.path, batch_tokens=batch_tokens, threads=threads)
    work: Work = [(cells(experiment, settings), CELLS), (references(experiment, settings), REFERENCES)]
    needed = {(cell.key, folder): cell for part, folder in work for cell in part}
    done = {(key, folder) for (key, folder), cell in needed.items() if is_done(store, experiment, cell, folder)}
    if len(done) < len(needed):
        if pipe is None:
            pipe = load(experiment.model, dtype_of(experiment.dtype), settings.device)
        check(experiment, pipe, settings)
        captures.check(experiment, pipe, settings, fixed=same)
    damaged = store.damaged
    if damaged:
        print(f"{store.path / EXPERIMENT}: damaged, written again", flush=True)
    if damaged or store.record.get("request") != experiment.request():
        unused = unused_images(experiment, settings, store)
        if unused:
            print(unused, flush=True)
        store.remove(INDEX)
        store.write_experiment(experiment, settings, versions(), command)
    filled = Filled(settings)
    if len(done) < len(needed):
        _compute(experiment, store, pipe, filled, work, done, report, command)
    captures.write_index(experiment, filled.settings, store)
    return filled


def check_name(experiment: Experiment, store: Store) -> None:
    """Raise `UserError` for a store that belongs to an experiment of another name: its tables would be replaced."""
    if store.name and store.name != experiment.name:
        raise UserError(
            f"out={store.path}: holds the experiment {store.name!r}, this one is {experiment.name!r}; "
            "name another folder"
        )


def is_done(store: Store, experiment: Experiment, cell: Cell, folder: str) -> bool:
    """Return whether the store has a cell's image, and its attention arrays. Controls have no arrays."""
    captured = experiment.captures if folder == CELLS else ""
    return store.has(cell, folder) and (not captured or store.has_arrays(cell, captured))


def unused_images(experiment: Experiment, settings: Settings, store: Store) -> str:
    """Return a line about images in the store that are not part of the changed experiment; "" if there are none."""
    counts = store.other_cells({cell.key for cell in cells(experiment, settings)})
    if not counts:
        return ""
    listed = ", ".join(f"{variant} ({count})" for variant, count in counts.items())
    return (
        f"the experiment has changed: {number(sum(counts.values()), 'image')} in {store.path / CELLS} "
        f"left out of the tables: {listed}"
    )


def _compute(
    experiment: Experiment,
    store: Store,
    pipe: Pipeline,
    filled: Filled,
    work: Work,
    done: set[tuple[str, str]],
    report: Callable[[int, int], None],
    command: str,
) -> None:
    """Compute every batch of `work` that is not all `done`, in smaller batches once memory runs out."""
    total = len({(cell.key, folder) for part, folder in work for cell in part})
    finished = set(done)
    # without a terminal a line every 5 s: the first one comes with the first batch
    with (
        Progress("images", total, len(finished), every=5, unit="image") as progress,
        _threads(filled.settings.threads),
    ):
        while True:
            try:
                for part, folder in work:
                    for batch in batches(part, filled.settings):
                        if all((cell.key, folder) in finished for cell in batch):
                            continue
                        failures = run_batch(pipe, filled.settings, store, batch, folder, experiment)
                        filled.failures += failures
                        filled.written += len(batch) - len(failures)
                        finished |= {(cell.key, folder) for cell in batch}
                        progress(len(finished), batch[0].variant)
                        report(len(finished), total)
                return
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                filled.settings = halved(filled.settings, error)
                store.write_experiment(experiment, filled.settings, versions(), command)


def run_batch(
    pipe: Pipeline, settings: Settings, store: Store, batch: Sequence[Cell], folder: str, experiment: Experiment
) -> list[str]:
    """Compute a batch, and write the attention arrays that the store lacks, then the images.

    Returns one line per cell without an image, because its latents were not finite.
    """
    captured = experiment.captures if folder == CELLS else ""
    without_arrays = [i for i, cell in enumerate(batch) if captured and not store.has_arrays(cell, captured)]
    probe = Probe(experiment.capture) if without_arrays else None
    failures = {}
    try:
        images = pipe.sample(
            [cell.prompt for cell in batch],
            [cell.seed for cell in batch],
            [cell.program for cell in batch],
            settings.sampling,
            probe=probe,
        )
    except NonFiniteError as error:
        images = error.results or [None] * len(batch)
        failures = error.reasons
    arrays = probe.arrays if probe else {}
    for i in without_arrays:
        if i not in failures:
            store.put_arrays(batch[i], captured, of_sample(arrays, i))
    recorded = ("height", "width", "steps", "guidance", "true_cfg", "negative_prompt", "dtype", "device")
    notes = {key: value for key, value in asdict(settings).items() if key in recorded}
    for i, (cell, image) in enumerate(zip(batch, images, strict=True)):
        if i not in failures:
            store.put(cell, image, notes, folder)
    return [
        f"{cell.variant}, prompt {show(cell.prompt)}, seed {cell.seed}: {failures[i]}"
        for i, cell in enumerate(batch)
        if i in failures
    ]


def check(experiment: Experiment, pipe: Pipeline, settings: Settings) -> None:
    """Raise `UserError` for a prompt or program that does not fit the model, before anything is computed."""
    check_kernel(pipe, settings)
    sampling = settings.sampling
    texts = [*experiment.prompts, *([sampling.negative_prompt] if sampling.negative_prompt else [])]
    pipe.text.check(texts, settings.max_sequence_length, sampling.truncate, sampling.unknown_words)
    baseline = experiment.variants[experiment.baseline]
    pairs = [(prompt, baseline) for prompt in experiment.prompts]
    for program in experiment.variants.values():
        prompts = experiment.prompts if program.names_words else experiment.prompts[:1]
        pairs += [(prompt, program) for prompt in prompts]
    for prompt, program in pairs:
        pipe.check([prompt], [program], sampling)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
