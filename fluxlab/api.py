"""Experiments from Python: what the command line does, as functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.cache import open_cache
from fluxlab.checkpoints.identity import fingerprint
from fluxlab.config import ModelRow, find_row, with_loras
from fluxlab.errors import UserError, show, text_key
from fluxlab.experiment.each import all_variants
from fluxlab.experiment.inputs import read_inputs, read_scenes
from fluxlab.experiment.reading import Run, read_store
from fluxlab.experiment.reference_images import read_references
from fluxlab.experiment.shards import Shard
from fluxlab.experiment.spec import Experiment, checked, read_seeds, read_variants
from fluxlab.experiment.tasks import split_tasks
from fluxlab.memory.request import Memory
from fluxlab.positions import Program
from fluxlab.probes import INDEX, Capture
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from fluxlab.experiment.cells import Settings
    from fluxlab.experiment.runner import Filled
    from fluxlab.experiment.store import Store
    from fluxlab.measure.similarity import Similarity


def make_experiment(
    prompts: str | Sequence[str] = (),
    variants: Mapping[str, Program | Mapping[str, Any]] | None = None,
    seeds: int | Sequence[int] = 1,
    *,
    model: "str | PathLike[str] | ModelRow" = "tiny",
    sampling: Sampling | None = None,
    capture: Capture | Mapping[str, Any] | str | None = None,
    name: str = "python",
    caption: str = "",
    baseline: str = "baseline",
    clip: str | None = None,
    dino: str | None = None,
    lora: Any = None,
    references: Any = None,
    task: Any = None,
    image: Any = None,
    mask: Any = None,
    target: Any = None,
    scenes: Mapping[str, Any] | None = None,
    identify: bool = True,
    cache: "str | PathLike[str] | None" = None,
) -> Experiment:
    """Return a checked experiment: variants × prompts × seeds on one model. Nothing is computed.

        half = {"a": {"op": "scale", "factor": 0.5}}
        experiment = fluxlab.make_experiment("a red fox", {"half": half}, seeds=4, sampling=fluxlab.Sampling(steps=8))

    variants: programs by name. An edit with `blocks: each` stands for one variant per block of the model. The unchanged
        baseline is added under the name `baseline` if it is missing.
    seeds: a count, from 0, or a list.
    model: a name under configs/model, a folder, a file, or a hub id. A hub id is downloaded, unless identify=False.
    sampling: the settings; None means the model's own.
    capture: what to store of attention: a file under configs/capture such as "words", or a mapping of requests.
    name: names the default run folder. clip, dino: checkpoints for similarity metrics.
    lora: merged into the transformer, as in `load_pipeline`.
    references: files of reference images: a list of paths for every prompt, or one list of paths per prompt.
    task: what makes the images of all variants: "generate", "inpaint", "upscale", "decode" or "resize", or a mapping
        with its arguments, such as {"name": "inpaint", "path": "inverted"}. The key `task` of a variant changes
        arguments, or names another task. See docs/tasks.md.
    image, mask, target: files that tasks work on: a path for every prompt, or a list with one for each prompt.
    scenes: drawn scenes in place of prompts and files, such as {"kind": "exchange", "count": 64}.
    identify: whether to hash the model's files. A run needs that; a plan does not.
    cache: the folder that notes the hashes of files, or "none"; None means the user's own (see `fluxlab.cache`).

    Raises UserError naming the argument, its value and what is expected.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence):
        raise UserError(f"prompts={show(prompts)}: expected a string or a list of strings")
    for key, value in {
        **{f"prompts[{i}]": text for i, text in enumerate(texts)},
        **{"name": name, "caption": caption, "baseline": baseline},
    }.items():
        if not isinstance(value, str):
            raise UserError(f"{key}={show(value)}: expected text; write it in quotes: '{value}'")
    row = with_loras(model if isinstance(model, ModelRow) else find_row(model), lora)
    files = {"image": image, "mask": mask, "target": target}
    if scenes is not None:
        if given := [key for key, value in {"prompts": texts, **files}.items() if value]:
            empty = ", ".join(f"{key}=[]" if key == "prompts" else f"{key}=null" for key in given)
            raise UserError(f"scenes: has the prompts and the images; write {empty}, or scenes=null")
        texts, files = read_scenes(scenes, row.size)
    programs = {text_key("variants", key, "a name"): value for key, value in (variants or {}).items()}
    if baseline not in programs and baseline == "baseline":
        programs = {baseline: {}, **programs}
    programs, tasks = split_tasks(all_variants(programs, row), task)
    settings = sampling or Sampling()
    experiment = checked(
        Experiment(
            name=name,
            caption=caption,
            model=row,
            model_digest="",
            variants=read_variants(programs),
            baseline=baseline,
            prompts=tuple(texts),
            seeds=read_seeds(seeds),
            capture=Capture.from_config(capture),
            clip=clip,
            dino=dino,
            references=read_references(references, len(texts)),
            tasks=tasks,
            inputs=read_inputs(**{"image": None, "mask": None, "target": None, **files}, prompts=len(texts)),
            **{f.name: getattr(settings, f.name) for f in fields(Sampling)},
        )
    )
    return replace(experiment, model_digest=fingerprint(row, open_cache(cache))) if identify else experiment


def default_folder(experiment: Experiment) -> Path:
    """Return the run folder if none is named. Its name contains everything that the images depend on."""
    return Path("runs", experiment.name, experiment.digest)


def run_experiment(
    experiment: Experiment,
    out: "str | PathLike[str] | None" = None,
    *,
    batch_tokens: int | None = None,
    threads: int | None = None,
    measure: bool = False,
    tracking: Mapping[str, Any] | None = None,
    engine: "Mapping[str, Any] | str" = "inline",
    cache: "str | PathLike[str] | None" = None,
    memory: "Memory | Mapping[str, Any] | str | None" = None,
) -> Run:
    """Compute the images and tables that the run folder lacks, and return the finished run.

    out: the run folder; None means `runs/<name>/<digest>`. Run again to continue after an interruption.
    batch_tokens: tokens in one forward; None chooses by the device's memory.
    measure: compute the metrics again. tracking: settings as in configs/tracking; None tracks nothing.
    engine: "inline", "ray", or settings as in configs/engine, such as {"name": "ray", "workers": 2}.
    cache: a folder for encoded prompts, or "none"; None means the user's own (see `fluxlab.cache`).
    memory: "auto", "resident", "streamed", or {"mode": "auto", "limit_gb": 12} (`fluxlab.memory.Memory`).

    Raises UserError, before anything is computed, for what does not fit the model or the folder. If an image has NaN
    or infinite values, the other images are finished before NonFiniteError is raised; `read_run` reads the folder.
    """
    folder = default_folder(experiment) if out is None else Path(out).expanduser()
    command = f"fluxlab.run_experiment(experiment, out={str(folder)!r})"
    filled = complete_store(
        experiment,
        folder,
        command,
        batch_tokens=batch_tokens,
        threads=threads,
        measure=measure,
        tracking=tracking or {"name": "none"},
        engine={"name": engine} if isinstance(engine, str) else engine,
        cache=cache,
        memory=memory,
    )
    filled.check()
    return read_store(folder)


def products() -> tuple[str, ...]:
    """Return the names of the files that every finished run folder has, next to its images."""
    from fluxlab.experiment import effects
    from fluxlab.report.products import GRID_FILE, PAGE_FILE

    return (GRID_FILE, PAGE_FILE, *effects.FILES)


def complete_store(
    experiment: Experiment,
    out: Path,
    command: str,
    *,
    batch_tokens: int | None,
    threads: int | None,
    measure: bool,
    tracking: Mapping[str, Any],
    engine: Mapping[str, Any],
    shard: Shard | None = None,
    cache: "str | PathLike[str] | None" = None,
    verify: bool = False,
    memory: "Memory | Mapping[str, Any] | str | None" = None,
) -> "Filled":
    """Complete the store at `out`: images, then tables, then the grid and the page. `command` is shown in the page.

    Files that are complete are not written again. Returns what was computed; `Filled.check` raises for images with NaN.
    With a shard, only its images are computed; the rest follows if no other shard is running and nothing is missing.
    verify: read every file to tell whether it is complete, also those that are unchanged by size and time.
    """
    from fluxlab import engines
    from fluxlab.experiment import captures, effects
    from fluxlab.experiment.costs import number
    from fluxlab.experiment.runner import fill
    from fluxlab.experiment.store import open_store
    from fluxlab.experiment.work import lacking
    from fluxlab.report.wandb import tracking as tracker

    settings, placed = tracker.checked(tracking), Memory.from_config(memory)
    with open_store(out, shard, verify) as store:
        sealed = (*products(), INDEX) if experiment.capture else products()
        finished = store.record.get("request") == experiment.request() and store.sealed(sealed)
        finished = finished and not measure and effects.measured(experiment, store)
        models = {} if finished or shard else effects.load_models(experiment)

        def images(report: Callable[[int, int], None]) -> "Filled":
            with engines.start(engine, cache, placed) as started:
                options = {"batch_tokens": batch_tokens, "threads": threads, "command": command, "shard": shard}
                return fill(experiment, store, started, report=report, **options)

        if shard:
            filled = images(lambda done, total: None)
            missing = lacking(experiment, filled.settings, store)
            if not store.lock.take_over(lambda: not lacking(experiment, filled.settings, store)):
                print(f"shard {shard} is done; {number(missing, 'image')} of other shards missing in {out}")
                return replace(filled, measured=False)
            captures.write_index(experiment, filled.settings, store)
        with tracker.start(settings, out, experiment, command) as tracked:
            if not shard:
                filled = images(tracked.progress)
            if not finished or filled.written or not store.sealed(sealed):
                tabulate(experiment, filled.settings, store, models)
            tracked.finish(lambda: read_store(out))
    return filled


def tabulate(
    experiment: Experiment, settings: "Settings", store: "Store", models: "Mapping[str, Similarity] | None" = None
) -> None:
    """Write what follows from the images of a store: tables, grid, page, manifest. models: of `effects.load_models`."""
    from fluxlab.experiment import effects
    from fluxlab.report.products import grid, page

    effects.measure(experiment, settings, store, models or effects.load_models(experiment))
    run = read_store(store.path, check=False)
    grid(run)
    page(run)
    store.seal()
