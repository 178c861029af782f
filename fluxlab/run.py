"""`python -m fluxlab.run +exp=<name> [overrides]`: compose the configs, check them, run."""

import gc
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.compose import (
    combinations,
    command_line,
    complete,
    compose,
    debugging,
    flags,
    is_users,
    launch,
    launches_jobs,
    short,
)
from fluxlab.config import config_folder, model_row, with_loras
from fluxlab.errors import NonFiniteError, UserError
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from fluxlab.experiment.spec import Experiment


INTERRUPTED = "interrupted; finished images are kept, the same command continues from here"

_SamplingConfig = make_dataclass(
    "_SamplingConfig", [(f.name, f.type, field(default=f.default)) for f in fields(Sampling)]
)
"""`Sampling`, not frozen: OmegaConf makes a frozen schema read-only."""


@dataclass
class RunConfig(_SamplingConfig):
    """The schema of `configs/config.yaml`: any other key, or a value of another type, is an error.

    The settings of `Sampling` are keys too.
    """

    model: dict[str, Any] = field(default_factory=dict)
    name: str = "???"
    caption: str = ""
    variants: dict[str, Any] = field(default_factory=dict)
    baseline: str = "baseline"
    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    seeds: Any = 1
    plugins: list[str] = field(default_factory=list)
    lora: Any = None
    references: Any = None
    task: Any = None
    image: Any = None
    mask: Any = None
    target: Any = None
    scenes: Any = None
    batch_tokens: int | None = None
    threads: int | None = None
    clip: str | None = None
    dino: str | None = None
    out: str | None = None
    cache: str | None = None
    capture: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    shard: str | None = None
    plan: bool = False
    measure: bool = False
    verify: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C, 143
    after SIGTERM.

    `arguments` are the words after `python -m fluxlab.run`; None means those of this process. May be called from a
    notebook, from several threads, and inside another Hydra application.
    """
    if arguments is None:
        gc.disable()  # until `run` has imported what it needs
    try:
        return command_line(arguments, _main, INTERRUPTED)
    finally:
        if arguments is None:
            gc.enable()


def _main(arguments: list[str]) -> None:
    asked = flags(arguments)
    config = ("config", RunConfig, "schema", asked.overrides, asked.config_dir)
    named = any(re.match(r"\+{1,2}exp=", argument) for argument in asked.overrides)
    if asked.shell_completion:
        complete(*config)
    elif asked.help or not asked.overrides:
        print(usage(asked.config_dir))
    elif not named:  # a forgotten + must not look like a run that is done
        raise UserError(f"{' '.join(asked.overrides)}: no experiment named; add +exp=<name>")
    elif asked.cfg:
        print(compose(*config, show=True), end="")
    elif asked.multirun:
        _run_combinations(asked.overrides, asked.config_dir)
    else:
        run(compose(*config), _command(arguments))


def _command(words: list[str], folder: Path | None = None) -> str:
    """Return the command line that is kept in the run folder: that of the whole run, for a shard too."""
    words = [word for word in words if not re.match(r"\+{0,2}shard=", word)]
    return f"python -m fluxlab.run {shlex.join([*(['--config-dir', str(folder)] if folder else []), *words])}"


def _run_combinations(overrides: list[str], folder: Path | None) -> None:
    """Run every combination of the values in `overrides` (-m), and print which folder holds which.

    A combination with an error that the user can fix is reported, and the others are run. Raises UserError before
    anything runs if two combinations have the same folder, and at the end if some of them failed.
    """
    every = combinations("config", RunConfig, "schema", overrides, folder)
    failures: dict[int, Exception] = {}
    folders: dict[int, Path] = {}
    for i, combination in enumerate(every):
        with _reported(failures, i, combination.settings):
            folders[i] = out_folder(combination.config, read(combination.config))
    _check_folders({i: (path, every[i].settings) for i, path in folders.items()})
    if launches_jobs(overrides):
        launch("config", RunConfig, "schema", overrides, folder, lambda c, words: run(c, _command(words, folder)))
    else:
        for i in folders:
            with _reported(failures, i, every[i].settings):
                run(every[i].config, _command(every[i].words, folder))
    print(f"{len(every)} combinations:")
    for i, combination in enumerate(every):
        print(f"  {'failed' if i in failures else folders[i]}  {combination.settings}")
    if failures:
        kind = NonFiniteError if any(isinstance(error, NonFiniteError) for error in failures.values()) else UserError
        raise kind(f"{len(failures)} of the {len(every)} combinations failed; the others are done")


@contextmanager
def _reported(failures: dict[int, Exception], i: int, settings: str) -> Iterator[None]:
    """Print an error that the user can fix, and one of images with NaN, and note it under `i` instead of raising it."""
    try:
        yield
    except (UserError, OSError, NonFiniteError) as error:
        if debugging() or not (is_users(error) or isinstance(error, NonFiniteError)):
            raise
        failures[i] = error
        print(short(f"{settings}: {error}" if settings else str(error)), file=sys.stderr)


def _check_folders(folders: dict[int, tuple[Path, str]]) -> None:
    """Raise UserError if two combinations would write into one folder: the second would replace the tables."""
    seen: dict[Path, str] = {}
    for path, settings in folders.values():
        if path in seen:
            key = next((word.partition("=")[0].lstrip("+") for word in settings.split("  ")), "")
            raise UserError(
                f"-m: {seen[path]} and {settings} would both be written into {path}\n"
                f"Name a folder that differs between them, for instance 'out={path}/${{{key}}}'."
            )
        seen[path] = settings


def read(config: RunConfig) -> "Experiment":
    """Return the experiment of a config. Raises UserError naming the key, its value and what is expected."""
    from fluxlab.api import make_experiment
    from fluxlab.checkpoints.stored import is_local
    from fluxlab.experiment.prompts import read_prompts
    from fluxlab.experiment.spec import check_baseline
    from fluxlab.positions import load_plugins

    prompts = read_prompts(Path(config.prompts_file)) if config.prompts_file else config.prompts
    row = with_loras(model_row(config.model, f"model {config.model.get('name', '')}".strip()), config.lora)
    load_plugins(config.plugins)
    check_baseline(config.baseline, config.variants)  # the one that was removed is not added again
    return make_experiment(
        prompts,
        config.variants,
        config.seeds,
        model=row,
        sampling=Sampling(**{f.name: getattr(config, f.name) for f in fields(Sampling)}),
        capture=config.capture,
        name=config.name,
        caption=config.caption,
        baseline=config.baseline,
        clip=config.clip,
        dino=config.dino,
        references=config.references,
        task=config.task,
        image=config.image,
        mask=config.mask,
        target=config.target,
        scenes=config.scenes,
        identify=not config.plan or is_local(row),  # a plan downloads nothing
        cache=config.cache,
    )


def out_folder(config: RunConfig, experiment: "Experiment") -> Path:
    """Return the run folder of a config."""
    from fluxlab.api import default_folder

    return Path(config.out).expanduser() if config.out else default_folder(experiment)


def run(config: RunConfig, command: str) -> None:
    """Complete the run folder of a config, or print the plan, and print what was done. `command` is kept in the folder.

    Raises NonFiniteError, after everything else is finished, if an image has NaN or infinite values.
    """
    from fluxlab import engines
    from fluxlab.api import complete_store, products
    from fluxlab.experiment import captures, effects
    from fluxlab.experiment.costs import number
    from fluxlab.experiment.shards import read_shard
    from fluxlab.experiment.store import find_store
    from fluxlab.memory.request import Memory

    if not gc.isenabled():  # searching the 280,000 objects of the imports for garbage takes a tenth of a short run
        gc.freeze()
        gc.enable()
    shard, memory = read_shard(config.shard), Memory.from_config(config.memory)
    engines.checked(config.engine)
    experiment = read(config)
    out = out_folder(config, experiment)
    if config.plan:
        from fluxlab.experiment.plan import plan

        named = out if config.out or experiment.model_digest else None
        print(plan(experiment, named, config.batch_tokens, config.threads, memory))
        return
    print(f"{experiment.name}: {experiment.caption}")
    counts = (("variant", experiment.variants), ("prompt", experiment.prompts), ("seed", experiment.seeds))
    cells = " × ".join(number(len(items), word) for word, items in counts)
    print("  ".join(filter(None, (f"{cells} → {out}", captures.names(experiment)))), flush=True)
    filled = complete_store(
        experiment,
        out,
        command,
        batch_tokens=config.batch_tokens,
        threads=config.threads,
        measure=config.measure,
        tracking=config.tracking,
        engine=config.engine,
        shard=shard,
        cache=config.cache,
        verify=config.verify,
        memory=memory,
    )
    if not filled.measured:
        return filled.check()
    store = find_store(out)
    effects.show(store, experiment.baseline)
    print("  ".join(str(out / name) for name in products()))
    if captured := captures.summary(store):
        print(captured)
    filled.check()


def usage(folder: Path | None = None) -> str:
    """Return the help: what a command looks like, and the experiments, a user's own in `folder` among them."""
    from fluxlab.compose.yaml_source import decode, experiment_files, read_yaml

    lines = []
    for name, file in experiment_files([config_folder(), *([folder] if folder else [])]):
        try:
            values = read_yaml(file)
            caption = str(decode(values.get("caption", ""))) if isinstance(values, dict) else ""
        except UserError as error:
            caption = f"(cannot be read: {str(error).removeprefix(f'{file}, ')})"
        lines.append(f"  {name:<15} {caption}")
    return "\n".join([_USAGE, *lines, "", _KEYS])


_USAGE = """python -m fluxlab.run +exp=<name> [key=value …]

Experiments (configs/exp; --config-dir <folder> adds your own):"""
_KEYS = """Keys (configs/config.yaml lists all; null means the model's own):
  prompts='["a cat","a red fox"]'  prompts_file=<file>  seeds=4 or seeds=[3,5]  steps  height  width  guidance
  device  dtype  out=<folder>  model=tiny, schnell, dev, … or model=local model.path=<folder, file or hub id>
  variants.half.a.factor=0.7  '~variants.zero'  '+variants.mine={a: {op: rotate, degrees: 30}}'
  +op@variants.mine.a=scale variants.mine.a.factor=0.8
  capture=words stores attention: one map per word, block and step; '+capture.cats={kind: words, words: [cat]}'
  plan=true prints what would run; --cfg job prints the composed config
  -m runs every combination of a=1,2 b=3,4; name the folder yourself with 'out=runs/mine/${a}-${b}'
Prompts and names are text: quote what looks like a number. FLUXLAB_DEBUG=1 shows the traceback of an error.
The same command again completes what is missing."""


if __name__ == "__main__":
    sys.exit(main())
