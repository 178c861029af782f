"""From an experiment to its pictures in a store: what is there stays, what is missing is made."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fluxlab.checkpoints import default_device
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.experiment import captures
from fluxlab.experiment.cells import Cell, Settings, batches, cells, references
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import CELLS, REFERENCES, Store
from fluxlab.experiment.versions import versions
from fluxlab.model.attention import kernel
from fluxlab.pipeline import Pipeline
from fluxlab.probes import INDEX, Probe, of_sample
from fluxlab.progress import Progress

Load = Callable[[ModelRow, torch.dtype | None, str], Pipeline]

CPU_BATCH_TOKENS = 4480
"""On a CPU: 16 pictures of the embedded model, one of FLUX.1. Larger batches gain nothing there."""


def fill(
    experiment: Experiment,
    store: Store,
    load: Load,
    *,
    batch_tokens: int | None = None,
    threads: int | None = None,
    command: str = "",
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Settings:
    """Make every picture that the store lacks, and what is captured of its attention; return how. `told(done, total)`
    hears of every batch.

    A batch with a missing cell is computed whole, in the composition that an undisturbed run has, so that a resumed
    store has the same bits; what is there is not written again. Raises `UserError` for what does not fit the model or
    the store, before anything is run.
    """
    check_counts(batch_tokens=batch_tokens, threads=threads)
    known = store.settings()
    same = known is not None and store.record["digest"] == experiment.digest
    pipe = None if same else load(experiment.model, dtype_of(experiment.dtype), device_of(experiment, known))
    settings = known if same else resolve(experiment, pipe, known, batch_tokens, threads)
    refuse_others(settings, store.path, batch_tokens=batch_tokens, threads=threads)
    work = [(cells(experiment, settings), CELLS), (references(experiment, settings), REFERENCES)]
    every = {(cell.key, folder): cell for part, folder in work for cell in part}
    done = {(key, folder) for (key, folder), cell in every.items() if there(store, experiment, cell, folder)}
    if len(done) < len(every):
        if pipe is None:
            pipe = load(experiment.model, dtype_of(experiment.dtype), settings.device)
        check(experiment, pipe, settings)
        captures.check(experiment, pipe, settings, fixed=same)
    if store.record.get("request") != experiment.request():
        store.remove(INDEX)
        store.write_experiment(experiment, settings, versions(), command)
    if len(done) < len(every):
        settings = _make(experiment, store, pipe, settings, work, done, told, command)
    captures.write_index(experiment, settings, store)
    return settings


def check_counts(**asked: int | None) -> None:
    """Raise for a number of tokens or threads that is none."""
    for key, value in asked.items():
        if value is not None and value < 1:
            raise UserError(f"{key}={value}: a whole number from 1 is needed, or null")


def refuse_others(settings: Settings, out: Path | None, **asked: int | None) -> None:
    """Raise for what a store's pictures were not made with."""
    for key, value in asked.items():
        if value is not None and value != getattr(settings, key):
            raise UserError(
                f"{key}={value}: the pictures in {out} were made with {getattr(settings, key)}, and another value "
                "changes their last bits; leave it out, or name another out= folder"
            )


def there(store: Store, experiment: Experiment, cell: Cell, folder: str) -> bool:
    """Whether nothing of a cell is missing. References are pictures only."""
    wanted = experiment.captures if folder == CELLS else ""
    return store.has(cell, folder) and (not wanted or store.has_arrays(cell, wanted))


def _make(
    experiment: Experiment,
    store: Store,
    pipe: Pipeline,
    settings: Settings,
    work: Sequence[tuple[Sequence[Cell], str]],
    done: set[tuple[str, str]],
    told: Callable[[int, int], None],
    command: str,
) -> Settings:
    """Compute every batch of `work` that is not all `done`; with smaller batches from where memory does not suffice."""
    total = len({(cell.key, folder) for part, folder in work for cell in part})
    # every 5 s where there is no terminal: the first line comes with the first batch
    with Progress("pictures", total, len(done), every=5, unit="picture") as progress, _threads(settings.threads):
        while True:
            try:
                for part, folder in work:
                    for batch in batches(part, settings):
                        if all((cell.key, folder) in done for cell in batch):
                            continue
                        run_batch(pipe, settings, store, batch, folder, experiment)
                        done |= {(cell.key, folder) for cell in batch}
                        progress(len(done), batch[0].variant)
                        told(len(done), total)
                return settings
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                settings = halved(settings, error)
                store.write_experiment(experiment, settings, versions(), command)


def run_batch(
    pipe: Pipeline, settings: Settings, store: Store, batch: Sequence[Cell], folder: str, experiment: Experiment
) -> None:
    """One forward for a batch, and its pictures to the store; before them, what a capture lacks of its cells."""
    wanted = experiment.captures if folder == CELLS else ""
    lacking = [i for i, cell in enumerate(batch) if wanted and not store.has_arrays(cell, wanted)]
    probe = Probe(experiment.capture) if lacking else None
    images = pipe.sample(
        [cell.prompt for cell in batch],
        [cell.seed for cell in batch],
        [cell.program for cell in batch],
        settings.sampling,
        probe=probe,
    )
    arrays = probe.arrays if probe else {}
    for i in lacking:
        store.put_arrays(batch[i], wanted, of_sample(arrays, i))
    shown = ("height", "width", "steps", "guidance", "true_cfg", "negative_prompt", "dtype", "device")
    notes = {key: value for key, value in asdict(settings).items() if key in shown}
    for cell, image in zip(batch, images, strict=True):
        store.put(cell, image, notes, folder)


def resolve(
    experiment: Experiment, pipe: Pipeline, known: Settings | None, batch_tokens: int | None, threads: int | None
) -> Settings:
    """What was left to the model, the device and the store; `known` is how the store's other pictures were made."""
    height, width = experiment.height or pipe.size[0], experiment.width or pipe.size[1]
    rows, cols = pipe.grid(height, width)
    tokens = rows * cols + pipe.max_sequence_length
    device = pipe.device.type if pipe.device.index is None else str(pipe.device)
    weights = (pipe.transformer, pipe.autoencoder, pipe.text.t5, pipe.text.clip)
    dtypes = [next(module.parameters()).dtype for module in weights]  # left as stored, they may differ
    if known is not None and known.device.split(":")[0] == device.split(":")[0]:
        batch_tokens, threads = batch_tokens or known.batch_tokens, threads or known.threads
    return Settings(
        model_digest=experiment.model_digest,
        height=height,
        width=width,
        steps=pipe.steps if experiment.steps is None else experiment.steps,
        schedule=pipe.schedule.config(),
        guidance=pipe.guidance if experiment.guidance is None else experiment.guidance,
        true_cfg=experiment.true_cfg,
        negative_prompt=experiment.negative_prompt,
        max_sequence_length=pipe.max_sequence_length,
        device=device,
        dtype="+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        batch_tokens=batch_tokens or default_batch_tokens(pipe),
        threads=threads or torch.get_num_threads(),
        kernel=kernel(pipe.device.type, pipe.dtype, tokens),
        tokens=tokens,
        pixels_per_token=pipe.pixels_per_token,
    )


def default_batch_tokens(pipe: Pipeline, unloaded: int = 0) -> int:
    """From the device's free memory once the model is loaded: half of it, at what the widest block holds a token.

    unloaded: bytes of weights that are still to be loaded.
    """
    if pipe.device.type != "cuda":
        return CPU_BATCH_TOKENS
    free = torch.cuda.mem_get_info(pipe.device)[0] - unloaded
    return max(1, int(free / 2 / bytes_a_token(pipe)))


def bytes_a_token(pipe: Pipeline) -> float:
    """Of a token in the widest block: q, k, v, MLP and their inputs and copies."""
    return pipe.dtype.itemsize * pipe.transformer.params.hidden_size * (12 + 4 * pipe.transformer.params.mlp_ratio)


def check(experiment: Experiment, pipe: Pipeline, settings: Settings) -> None:
    """Raise for every prompt and program that the model cannot take, before anything is run."""
    now = kernel(pipe.device.type, pipe.dtype, settings.tokens)
    if now != settings.kernel:
        raise UserError(
            f"this folder's pictures were made with the attention kernel {settings.kernel!r}, here it would be "
            f"{now!r}; name another out= folder"
        )
    sampling = settings.sampling
    texts = [*experiment.prompts, *([sampling.negative_prompt] if sampling.negative_prompt else [])]
    pipe.text.check(texts, settings.max_sequence_length, sampling.truncate, sampling.unknown_words)
    untouched, worded = experiment.variants[experiment.baseline], []
    for program in experiment.variants.values():
        worded += [(prompt, program) for prompt in experiment.prompts[: None if program.names_words else 1]]
    for prompt, program in [*((prompt, untouched) for prompt in experiment.prompts), *worded]:
        pipe.check([prompt], [program], settings.sampling)


def halved(settings: Settings, error: Exception) -> Settings:
    """Settings with half the batch, said once; anything but a lack of memory is raised again."""
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    lack = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in told
    if not lack:
        raise error
    if settings.batch_tokens // settings.tokens <= 1:
        raise UserError(
            f"out of memory with one picture of {settings.height} × {settings.width} ({told[:120]}); "
            "smaller height= and width=, or dtype=bfloat16, need less"
        ) from error
    half = settings.batch_tokens // 2
    print(f"out of memory: batch_tokens {settings.batch_tokens} → {half}, kept for this folder", file=sys.stderr)
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return replace(settings, batch_tokens=half)


def dtype_of(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def device_of(experiment: Experiment, known: Settings | None) -> str:
    """Return the requested device, else the store's, else the default one (CUDA, mps, CPU)."""
    if experiment.device:
        return experiment.device
    return known.device if known else default_device()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
