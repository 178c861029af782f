"""`python -m fluxlab.learn +exp=<name> objective=<name> [overrides]`: find arguments of a program by gradients."""

import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.compose import command_line, compose, flags
from fluxlab.config import config_folder, model_row, with_loras
from fluxlab.errors import UserError, nearest, show
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from fluxlab.experiment.spec import Experiment
    from fluxlab.learning import Template
    from fluxlab.learning.objectives import Place

_SamplingConfig = make_dataclass(
    "_SamplingConfig", [(f.name, f.type, field(default=f.default)) for f in fields(Sampling)]
)


@dataclass
class LearnConfig(_SamplingConfig):
    """The schema of `configs/learn.yaml`. The settings of `Sampling` are keys too."""

    model: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)
    name: str = "???"
    caption: str = ""
    variants: dict[str, Any] = field(default_factory=dict)
    variant: str | None = None
    baseline: str = "baseline"
    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None
    held_out: list[str] = field(default_factory=list)
    seeds: Any = 1
    starts: int = 1
    updates: int = 60
    rate: float = 0.05
    batch: int = 2
    memory_gb: float | None = None
    plugins: list[str] = field(default_factory=list)
    lora: Any = None
    threads: int | None = None
    out: str | None = None
    cache: str | None = None
    plan: bool = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code, as `fluxlab.run.main` does."""
    return command_line(arguments, _main, "interrupted; the same command continues from the last update")


def _main(arguments: list[str]) -> None:
    asked = flags(arguments)
    if asked.help or not asked.overrides:
        print(_USAGE)
        return
    if asked.multirun:
        raise UserError("-m: one search at a time; run the command once per combination")
    if not any(re.match(r"\+{1,2}exp=", word) for word in asked.overrides):
        raise UserError(f"{' '.join(asked.overrides)}: no experiment named; add +exp=<name>")
    config = ("learn", LearnConfig, "learn_schema", asked.overrides, asked.config_dir)
    if asked.cfg:
        print(compose(*config, show=True), end="")
        return
    learn(compose(*config), f"python -m fluxlab.learn {shlex.join(arguments)}")


@dataclass(frozen=True)
class Search:
    """A checked config: what is learned, on which places, and where its score is measured afterwards."""

    experiment: "Experiment"
    variant: str
    template: "Template"
    objective: dict[str, Any]
    train: "tuple[Place, ...]"
    held_out: "tuple[Place, ...]"
    prompts: tuple[str, ...]
    digest: str


def read(config: LearnConfig) -> Search:
    """Return the search of a config. Raises UserError naming the key, its value and what is expected."""
    from fluxlab.api import make_experiment
    from fluxlab.checkpoints.stored import is_local
    from fluxlab.experiment.prompts import read_prompts
    from fluxlab.learning import has_learned, read_objective, read_template
    from fluxlab.learning.objectives import check_prompts
    from fluxlab.positions import load_plugins

    load_plugins(config.plugins)
    for key in ("starts", "updates", "batch"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: expected a whole number of at least 1")
    if not 0 < config.rate <= 1:
        raise UserError(f"rate={config.rate:g}: expected a share of an argument's range, above 0 and at most 1")
    objective = read_objective(config.objective)
    with_learn = [name for name, program in config.variants.items() if has_learned(program)]
    if config.variant is not None and config.variant not in with_learn:
        raise UserError(
            f"variant={config.variant}: not a variant with learn, which are {', '.join(with_learn) or 'none'}"
            f"{nearest(config.variant, with_learn)}"
        )
    if not with_learn:
        raise UserError(
            "variants: none has an argument to learn; write {learn: <start>} in place of a number:\n"
            "'+variants.mine={a: {op: offset, by: {row: {learn: 5, min: -16, max: 16}}}}'"
        )
    if len(with_learn) > 1 and config.variant is None:
        raise UserError(f"variants: {', '.join(with_learn)} have arguments to learn; choose one with variant=")
    name = config.variant or with_learn[0]
    template = read_template(config.variants[name], f"variants.{name}")
    prompts = read_prompts(Path(config.prompts_file)) if config.prompts_file else config.prompts
    prompts, held = list(prompts), list(config.held_out)
    check_prompts(objective, prompts + held)
    both = [prompt for prompt in held if prompt in prompts]
    if both:
        raise UserError(f"held_out: {show(both[0])} is one of prompts too; held-out prompts are not learned from")
    row = with_loras(model_row(config.model, f"model {config.model.get('name', '')}".strip()), config.lora)
    experiment = make_experiment(
        prompts + held,
        {"baseline": {}, name: template.program},
        config.seeds,
        model=row,
        sampling=Sampling(**{f.name: getattr(config, f.name) for f in fields(Sampling)}),
        name=config.name,
        caption=config.caption,
        identify=not config.plan or is_local(row),
        cache=config.cache,
    )
    train, test = split(prompts, held, experiment.seeds)
    asked = {
        "experiment": experiment.digest,
        "learned": [[a.path, a.start, a.low, a.high] for a in template.learned],
        "objective": objective,
        "train": [[place.prompt, place.seed] for place in train],
        "search": [config.starts, config.updates, config.rate, config.batch],
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return Search(experiment, name, template, objective, train, test, tuple(prompts + held), digest)


def split(prompts: list[str], held: list[str], seeds: "tuple[int, ...]") -> "tuple[tuple[Place, ...], ...]":
    """Return the places to learn from, and those held out.

    Without `held_out` the last half of the prompts is held out, or of one prompt the last half of the seeds.
    """
    from fluxlab.learning.objectives import Place

    if not held and len(prompts) > 1:
        half = (len(prompts) + 1) // 2
        prompts, held = prompts[:half], prompts[half:]
    if held:
        return tuple(tuple(Place(p, s) for p in part for s in seeds) for part in (prompts, held))
    half = (len(seeds) + 1) // 2
    if half == len(seeds):
        raise UserError("held_out=[]: one prompt and one seed leave nothing to hold out; add held_out=[…] or seeds=2")
    return tuple(tuple(Place(p, s) for p in prompts for s in part) for part in (seeds[:half], seeds[half:]))


def learn(config: LearnConfig, command: str) -> None:
    """Run or resume a search, and write its result, or print the plan. Prints what was found."""
    from fluxlab.checkpoints import check_device, default_device, dtype_of
    from fluxlab.conditioning import Texts
    from fluxlab.engines.inline import threads
    from fluxlab.experiment.settings import threads_of
    from fluxlab.learning import check_smooth, fit
    from fluxlab.learning.fit import Problem
    from fluxlab.learning.objectives import make_objective
    from fluxlab.learning.plan import keeps_all
    from fluxlab.learning.result import Report, finish, interval_text
    from fluxlab.loading import load_row
    from fluxlab.training.state import locked

    search = read(config)
    e, template = search.experiment, search.template
    out = Path(config.out).expanduser() if config.out else Path("runs", e.name, f"learn-{search.digest}")
    device, dtype = check_device(e.device or default_device()), dtype_of(e.dtype, e.model)
    asked, batch = replace(e.sampling, dtype=None, device=None), min(config.batch, len(search.train))
    if config.plan:
        return print(_plan(search, config, device, dtype, out))
    with locked(out), threads(threads_of(str(device), None, config.threads)):
        texts = Texts(search.prompts, e.max_sequence_length, e.truncate, e.unknown_words)
        pipe = load_row(e.model, dtype, device, texts, cache=config.cache)
        settings = pipe.resolve(asked)
        places = (*search.train, *search.held_out)
        objective = make_objective(search.objective, pipe, search.prompts, places, settings)
        keep = keeps_all(pipe, settings, batch, objective.name, config.memory_gb)
        problem = Problem(pipe, template, objective, search.train, settings, config.batch, keep)
        check_smooth(template, problem.prepared(search.train[:1]).context)
        print(f"{e.name}: {objective.title}; learns {', '.join(a.name for a in template.learned)}")
        print(f"{len(search.train)} cells to learn from, {len(search.held_out)} held out → {out}", flush=True)
        options = {"starts": config.starts, "updates": config.updates, "rate": config.rate}
        noted = {**options, "objective": search.objective, "title": objective.title}
        with Report(config.tracking, out, e, template, noted, command) as report:
            found = fit(problem, **options, state=out / "state.safetensors", digest=search.digest, report=report)
            result = finish(problem, e, template, found, search.held_out, out, command)
            report.finish(found, result)
    for name, value in result["values"].items():
        print(f"{name}  {value:.6g}{', at its bound' if name in result['at_a_bound'] else ''}")
    print(f"{objective.title} on {len(search.held_out)} held-out cells, with 95 % bootstrap intervals:")
    for name, interval in result["held_out"].items():
        print(f"  {name:<20} {interval_text(interval)}")
    print(f"{out / 'curve.png'}  {out / 'result.json'}")
    print(f"python -m fluxlab.run --config-dir {out} +exp={e.name}_learned model={e.model.name}")


def _plan(search: Search, config: LearnConfig, device: Any, dtype: Any, out: Path) -> str:
    """Return what a search would do."""
    from fluxlab.learning.plan import forwards, memory_lines

    e, batch = search.experiment, min(config.batch, len(search.train))
    asked = replace(e.sampling, dtype=None, device=None)
    name = search.objective["name"]
    _, settings, lines = memory_lines(e.model, dtype, device, asked, batch, name, config.memory_gb)
    learned = ", ".join(f"{a.name} from {a.start:g}{_bounds(a)}" for a in search.template.learned)
    return "\n".join(
        [
            f"{e.name}: {e.caption}".removesuffix(": "),
            f"folder     {out}",
            *lines,
            f"learns     {learned}",
            f"objective  {name}; {len(search.train)} cells to learn from, {len(search.held_out)} held out",
            f"work       {forwards(len(search.train), settings.steps, config.starts, config.updates)}",
        ]
    )


def _bounds(argument: Any) -> str:
    if argument.low is None and argument.high is None:
        return ""
    low, high = ("" if bound is None else f"{bound:g}" for bound in (argument.low, argument.high))
    return f" in [{low}, {high}]"


_OBJECTIVES = ", ".join(sorted(file.stem for file in (config_folder() / "objective").glob("*.yaml")))
_USAGE = f"""python -m fluxlab.learn +exp=<name> objective=<name> [key=value …]

Finds every argument that is written {{learn: <start>, min: …, max: …}} in one variant of the experiment:
  python -m fluxlab.learn +exp=hello objective=sharpness seeds=4 steps=4 \\
      '+variants.mine={{a: {{op: scale, factor: {{learn: 1.0, min: 0.5, max: 2}}}}}}'
Objectives (configs/objective): {_OBJECTIVES}
Keys (configs/learn.yaml lists all): held_out, starts, updates, rate, batch, steps, seeds, out; plan=true prints memory.
The same command again continues an interrupted search."""


if __name__ == "__main__":
    sys.exit(main())
