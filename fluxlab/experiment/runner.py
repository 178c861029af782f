"""Compute the images of an experiment that its store lacks. Complete images are never computed again."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fluxlab import stopping
from fluxlab.errors import BatchError, NonFiniteError, UserError, show
from fluxlab.experiment import captures, task_images
from fluxlab.experiment.cells import Batch, Cell, Settings, at_once, batches, each_cell
from fluxlab.experiment.costs import number
from fluxlab.experiment.engine import Engine
from fluxlab.experiment.reference_images import opened, sizes, tokens
from fluxlab.experiment.settings import check_counts, check_kernel, check_unchanged, halved
from fluxlab.experiment.shards import Shard
from fluxlab.experiment.sources import numbered, with_sources_of
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import CELLS, EXPERIMENT, Store
from fluxlab.experiment.versions import versions
from fluxlab.experiment.work import Survey, every_portion, is_done, survey, unused_images
from fluxlab.pipeline import Pipeline
from fluxlab.positions import region_prompts
from fluxlab.probes import INDEX, Probe, of_sample
from fluxlab.progress import Progress

MOST_FAILURES = 20
"""Cells without an image that an error message lists."""


@dataclass
class Filled:
    """What `fill` did.

    written: images computed. failures: one line per cell without an image, because of NaN or because its batch was set
    aside. errors: the different tracebacks of batches that were set aside. measured: whether the tables were written
    too, which a shard leaves to the last one.
    """

    settings: Settings
    written: int = 0
    failures: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    measured: bool = True

    def check(self) -> None:
        """Raise `NonFiniteError` or `BatchError` if a cell has no image."""
        if not self.failures:
            return
        reason = "because their batches failed" if self.errors else "because of NaN or infinity"
        lines = [f"{number(len(self.failures), 'image')} not written, {reason}:", *self.failures[:MOST_FAILURES]]
        if len(self.failures) > MOST_FAILURES:
            lines.append(f"… and {len(self.failures) - MOST_FAILURES} more; their rows in metrics.csv are empty")
        raise (BatchError if self.errors else NonFiniteError)("\n".join([*lines, *self.errors]))


def fill(
    experiment: Experiment,
    store: Store,
    engine: Engine,
    *,
    batch_tokens: int | None = None,
    threads: int | None = None,
    command: str = "",
    shard: Shard | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Filled:
    """Compute every image and every attention array that the store lacks. `report(done, total)` follows each batch.

    shard: leave the batches of other shards out.

    A batch with a missing cell is computed whole, as in an undisturbed run, so that a resumed store has the same bits.
    Complete files are not written again. A cell whose latents become NaN or infinite gets no image; the others are
    finished. Raises `UserError`, before anything is computed, for what does not fit the model or the store, and
    `stopping.Terminated` after the batch at hand.
    """
    check_counts(batch_tokens=batch_tokens, threads=threads)
    check_name(experiment, store)
    known, same = _known(experiment, store)
    settings = known if same else engine.settle(experiment, known, batch_tokens, threads)
    if shard and not same:
        engine.check(experiment, settings, same)
        with store.lock.guard():  # the first shard decides the settings, the others take them over
            store.read()
            known, same = _known(experiment, store)
            settings = known if same else settings
            if known and not same and not store.lock.alone:
                raise UserError(f"out={store.path}: shards of another experiment are running here; name another folder")
            if not same:
                check_unchanged(settings, store.path, batch_tokens=batch_tokens, threads=threads)
                _record(experiment, store, settings, command)
    check_unchanged(settings, store.path, batch_tokens=batch_tokens, threads=threads)
    stored = survey(experiment, settings, store, shard)
    if stored.done < stored.total:
        for line in engine.check(experiment, settings, same):
            print(f"note: {line}", flush=True)
    damaged = store.damaged
    if damaged:
        print(f"{store.path / EXPERIMENT}: damaged, written again", flush=True)
    if damaged or store.record.get("request") != experiment.request():
        _record(experiment, store, settings, command)
    filled = Filled(settings)
    if stored.done < stored.total:
        _compute(experiment, store, engine, filled, stored, report, command, shard)
    if shard is None:
        captures.write_index(experiment, filled.settings, store)
    return filled


def _known(experiment: Experiment, store: Store) -> tuple[Settings | None, bool]:
    """Return the store's settings, and whether they are those of this experiment."""
    known = store.settings()
    return known, known is not None and store.record["digest"] == experiment.digest


def _record(experiment: Experiment, store: Store, settings: Settings, command: str) -> None:
    unused = unused_images(experiment, settings, store)
    if unused:
        print(unused, flush=True)
    store.remove(INDEX)
    store.write_experiment(experiment, settings, versions(), command)


def check_name(experiment: Experiment, store: Store) -> None:
    """Raise `UserError` for a store that belongs to an experiment of another name: its tables would be replaced."""
    if store.name and store.name != experiment.name:
        raise UserError(
            f"out={store.path}: holds the experiment {store.name!r}, this one is {experiment.name!r}; "
            "name another folder"
        )


def _compute(
    experiment: Experiment,
    store: Store,
    engine: Engine,
    filled: Filled,
    stored: Survey,
    report: Callable[[int, int], None],
    command: str,
    shard: Shard | None,
) -> None:
    """Compute every incomplete batch, one portion after the other, in smaller batches once memory runs out."""
    settings, done = filled.settings, stored.done
    # without a terminal a line every 5 s: the first one comes with the first batch
    with Progress("images", stored.total, done, every=5, unit="image") as progress, stopping.deferred():
        for portion in every_portion(experiment, settings):
            incomplete = [batch for batch in portion if stored.incomplete[batch.number]]
            ended = {c.key for b in incomplete for c in b.cells if is_done(store, experiment, c, b.folder)}
            while incomplete and not stopping.asked():
                work = incomplete if filled.settings is settings else _split(incomplete, filled.settings, shard)
                missing = [batch for batch in work if any(cell.key not in ended for cell in batch.cells)]
                try:
                    for result in engine.compute(experiment, filled.settings, store, missing):
                        cells_of = result.batch.cells
                        filled.failures += result.failures
                        if result.error and result.error not in filled.errors:
                            filled.errors.append(result.error)
                        filled.written += len(cells_of) - len(result.failures)
                        done += sum(cell.key not in ended for cell in cells_of)
                        ended |= {cell.key for cell in cells_of}
                        progress(done, cells_of[0].variant)
                        report(done, stored.total)
                    break
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    filled.settings = halved(filled.settings, error)
                if shard is None:
                    store.write_experiment(experiment, filled.settings, versions(), command)


def _split(batches_of: Sequence[Batch], settings: Settings, shard: Shard | None) -> list[Batch]:
    """Return batches of a portion as smaller ones. Other shards keep their batches, so that each is split alone."""
    if shard is None:
        batches_of = [replace(batches_of[0], cells=tuple(cell for batch in batches_of for cell in batch.cells))]
    return [replace(batch, cells=tuple(group)) for batch in batches_of for group in batches(batch.cells, settings)]


def run_batch(
    pipe: Pipeline, settings: Settings, store: Store, batch: Sequence[Cell], folder: str, experiment: Experiment
) -> list[str]:
    """Compute a batch with its sources, and write the attention arrays that the store lacks, then the images.

    Returns one line per cell without an image, because its latents were not finite.
    """
    captured = experiment.captures if folder == CELLS else ""
    without_arrays = [i for i, cell in enumerate(batch) if captured and not store.has_arrays(cell, captured)]
    probe = Probe(experiment.capture) if without_arrays else None
    failures, together = {}, with_sources_of(batch)
    try:
        images = _images(pipe, together, settings, probe)
    except NonFiniteError as error:
        images = error.results or [None] * len(together)
        failures = error.reasons
    arrays = probe.arrays if probe else {}
    for i in without_arrays:
        if i not in failures:
            store.put_arrays(batch[i], captured, of_sample(arrays, i))
    recorded = ("height", "width", "steps", "guidance", "true_cfg", "negative_prompt", "dtype", "device")
    notes = {key: value for key, value in asdict(settings).items() if key in recorded}
    for i, (cell, image) in enumerate(zip(batch, images[: len(batch)], strict=True)):
        if i not in failures:
            given = {"references": [image.sha256 for image in cell.references]} if cell.references else {}
            store.put(cell, image, {**notes, **given}, folder)
    return [
        f"{cell.variant}, prompt {show(cell.prompt)}, seed {cell.seed}: {failures[i]}"
        for i, cell in enumerate(batch)
        if i in failures
    ]


def _images(pipe: Pipeline, cells: Sequence[Cell], settings: Settings, probe: Probe | None) -> Sequence[Any]:
    """Return the images of cells. Raises `NonFiniteError` with the others if one is not finite."""
    if all(cell.task is None for cell in cells):
        return pipe.sample(
            [cell.prompt for cell in cells],
            [cell.seed for cell in cells],
            numbered(cells),
            settings.sampling,
            probe=probe,
            references=opened([cell.references for cell in cells]),
            at_once=at_once(settings, cells),
        )
    return task_images.images_of(pipe, cells, settings)


def most_further_tokens(experiment: Experiment, settings: Settings) -> int:
    """Return the largest numbers of tokens that reference images and texts of regions add to a cell."""
    images = max((tokens(images, settings.pixels_per_token) for images in experiment.references), default=0)
    return images + settings.max_sequence_length * max(map(len, map(region_prompts, experiment.variants.values())))


def check(experiment: Experiment, pipe: Pipeline, settings: Settings) -> None:
    """Raise `UserError` for a prompt or program that does not fit the model, before anything is computed."""
    check_kernel(pipe, settings)
    task_images.check(experiment.tasks, experiment.inputs, pipe, settings, experiment.prompts[0])
    sampling = settings.sampling
    texts = [*experiment.prompts, *([sampling.negative_prompt] if sampling.negative_prompt else [])]
    pipe.text.check(texts, settings.max_sequence_length, sampling.truncate, sampling.unknown_words)
    for cell in each_cell(experiment, settings, seeds=experiment.seeds[:1]):
        of_words = cell.variant == experiment.baseline or cell.program.names_words
        if of_words or experiment.references or cell.prompt == experiment.prompts[0]:
            together = with_sources_of([cell])
            given = sizes([one.references for one in together])
            pipe.check([one.prompt for one in together], numbered(together), sampling, references=given)
