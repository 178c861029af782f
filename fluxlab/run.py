"""`python -m fluxlab.run +exp=<name> [overrides]`: compose the configs, check them, run."""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.compose import compose, flags, guarded, hydra_main, to_schema
from fluxlab.config import config_folder, model_row
from fluxlab.errors import UserError

if TYPE_CHECKING:
    from fluxlab.experiment.spec import Experiment


@dataclass
class RunConfig:
    """The schema of `configs/config.yaml`: a key that is not here, or a value of another type, is an error."""

    model: dict[str, Any] = field(default_factory=dict)
    name: str = "???"
    caption: str = ""
    variants: dict[str, Any] = field(default_factory=dict)
    baseline: str = "baseline"
    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    seeds: Any = 1
    plugins: list[str] = field(default_factory=list)
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    negative_prompt: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_tokens: int | None = None
    threads: int | None = None
    clip: str | None = None
    dino: str | None = None
    out: str | None = None
    capture: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    plan: bool = False
    measure: bool = False


def main(arguments: list[str] | None = None) -> int:
    """0 when done, 2 for what the user can mend, 130 when interrupted."""
    if arguments is None:
        arguments = sys.argv[1:]
        # plugins lie here; `python -m` looks here too, an installed script only in its own folder
        if not sys.flags.safe_path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
    return guarded(
        lambda: _main(arguments), "interrupted; what was finished is kept, the same command goes on from here"
    )


def _main(arguments: list[str]) -> None:
    asked = flags(arguments)
    command = f"python -m fluxlab.run {shlex.join(arguments)}"
    named = any(argument.startswith("+exp=") for argument in asked.overrides)
    if asked.shell_completion or (asked.multirun and named):
        hydra_main(arguments, RunConfig, "schema", "config", lambda c: run(to_schema(c, RunConfig), _own(asked)))
    elif asked.help or not asked.overrides:
        print(usage(asked.config_dir))
    elif not named:  # a forgotten + must not look like a run that is done
        raise UserError(f"{' '.join(arguments)}: no experiment named; add +exp=<name>")
    elif asked.cfg:
        print(compose("config", RunConfig, "schema", asked.overrides, asked.config_dir, show=True), end="")
    else:
        run(compose("config", RunConfig, "schema", asked.overrides, asked.config_dir), command)


def _own(asked: argparse.Namespace) -> str:
    """Return the command that repeats the current combination of -m alone."""
    from hydra.core.hydra_config import HydraConfig

    folder = ["--config-dir", str(asked.config_dir)] if asked.config_dir else []
    return f"python -m fluxlab.run {shlex.join([*folder, *HydraConfig.get().overrides.task])}"


def read(config: RunConfig) -> "Experiment":
    """The experiment that a config asks for. Raises `UserError` naming the key, its value, and what to do."""
    from fluxlab.checkpoints.identity import fingerprint
    from fluxlab.experiment.prompts import read_prompts
    from fluxlab.experiment.spec import Experiment, checked, read_seeds, read_variants
    from fluxlab.positions import load_plugins
    from fluxlab.probes import Capture

    seeds = read_seeds(config.seeds)
    prompts = read_prompts(Path(config.prompts_file)) if config.prompts_file else config.prompts
    row = model_row(config.model, f"model {config.model.get('name', '')}".strip())
    load_plugins(config.plugins)
    variants = read_variants(config.variants)
    asked = Experiment(
        name=config.name,
        caption=config.caption,
        model=row,
        model_digest="",
        variants=variants,
        baseline=config.baseline,
        prompts=tuple(prompts),
        seeds=seeds,
        capture=Capture.from_config(config.capture),
        **{key: getattr(config, key) for key in _PLAIN},
    )
    experiment = checked(asked)
    if config.plan:
        from fluxlab.checkpoints.stored import here

        if not here(row):  # a plan fetches nothing
            return experiment
    return replace(experiment, model_digest=fingerprint(row))


_PLAIN = ("height", "width", "steps", "guidance", "true_cfg", "negative_prompt", "device", "dtype", "clip", "dino")


def run(config: RunConfig, command: str) -> None:
    """Fill the experiment's store: pictures, then numbers, then the grid; what is there already stays."""
    experiment = read(config)
    out = Path(config.out or f"runs/{experiment.name}/{experiment.digest}")
    from fluxlab.experiment import captures, effects
    from fluxlab.experiment.reading import read_store
    from fluxlab.experiment.runner import fill
    from fluxlab.experiment.store import open_store
    from fluxlab.loading import load_row
    from fluxlab.probes import INDEX
    from fluxlab.report.products import GRID_FILE, PAGE_FILE, grid, page
    from fluxlab.report.wandb import tracking as tracker

    if config.plan:
        from fluxlab.experiment.plan import plan

        named = out if config.out or experiment.model_digest else None
        print(plan(experiment, named, config.batch_tokens, config.threads))
        return
    print(f"{experiment.name}: {experiment.caption}")
    counts = (("variant", experiment.variants), ("prompt", experiment.prompts), ("seed", experiment.seeds))
    asked = " × ".join(f"{len(n)} {word}{'s' * (len(n) != 1)}" for word, n in counts)
    print("  ".join(part for part in (f"{asked} → {out}", captures.names(experiment)) if part), flush=True)
    products = (GRID_FILE, PAGE_FILE, *effects.FILES)
    tracking = tracker.checked(config.tracking)
    with open_store(out) as store:
        sealed = (*products, INDEX) if experiment.capture else products
        finished = store.record.get("request") == experiment.request() and store.sealed(sealed)
        finished = finished and not config.measure and effects.measured(experiment, store)
        similarities = {} if finished else effects.load_models(experiment)
        with tracker.start(tracking, out, experiment, command) as tracked:
            settings = fill(
                experiment,
                store,
                load_row,
                batch_tokens=config.batch_tokens,
                threads=config.threads,
                command=command,
                told=tracked.pictures,
            )
            if not finished or not store.sealed(sealed):
                effects.measure(experiment, settings, store, similarities)
                made = read_store(out)
                grid(made)
                page(made)
                store.seal()
            tracked.finish(read_store(out))
        effects.show(store, experiment.baseline)
        told = captures.summary(store)
    print("  ".join(str(out / name) for name in products))
    if told:
        print(told)


def usage(folder: Path | None = None) -> str:
    """What a command line looks like, and which experiments there are, a user's own in `folder` among them."""
    from omegaconf import OmegaConf

    folders = [config_folder(), *([folder] if folder else [])]
    files = sorted({file.stem: file for one in folders for file in (one / "exp").glob("*.yaml")}.values())
    lines = [f"  {file.stem:<16}{OmegaConf.load(file).get('caption', '')}" for file in files]
    return "\n".join([_USAGE, *lines, "", _KEYS])


_USAGE = """python -m fluxlab.run +exp=<name> [key=value …]

Experiments (configs/exp; --config-dir <folder> adds your own):"""
_KEYS = """Keys (configs/config.yaml has all; null means the model's own):
  prompts='["a cat","a dog"]'  prompts_file=<file>  seeds=4 or seeds=[3,5]  steps  height  width  guidance
  device  dtype  out=<folder>  model=tiny, schnell, dev, … or model=local model.path=<folder, file or hub id>
  variants.half.a.factor=0.7  '~variants.zero'  '+variants.mine={a: {op: rotate, degrees: 30}}'
  +op@variants.mine.a=scale variants.mine.a.factor=0.8
  capture=words keeps attention, a map a word, block and step; '+capture.cats={kind: words, words: [cat]}'
  plan=true says what would run; --cfg job prints the composed config; -m runs all combinations of a=1,2 b=3,4
The same command again finishes what is missing."""


if __name__ == "__main__":
    sys.exit(main())
