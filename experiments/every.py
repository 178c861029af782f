"""`make figures`, or `python -m experiments.every`: every figure, from its runs to its files.

Runs and attributions that a figure needs are made in `--runs` or continued there, then its script draws it into `-o`.
It takes about 50 minutes on 2 CPU cores with the embedded model, and a few once the runs exist. key=value words such as
model=schnell device=cuda are passed on to the runs and attributions. Without names, figures for which a word has no
meaning are left out, and those of the scene oracle if the model was not trained on scenes. `--list` shows the commands.
With several `--jobs`, what they print is in files of `--runs`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from experiments.style import out_argument, refusing_parser
from fluxlab.compose import compose, guarded
from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.run import RunConfig

MANY = ("step_roles", "step_window", "dose_edits", "dose_response", "freeflux_probe", "text_order")
"""Experiments that get the 8 prompts and 8 seeds of `trace`, so that an interval is over 64 images."""

FIGURES: dict[str, tuple[str, ...]] = {
    "article": ("experiments.article {article}",),
    "ids": ("experiments.ids",),
    "schedule": ("experiments.schedule",),
    "dose": ("experiments.dose {dose_response}",),
    "response": ("experiments.response {dose_response} {dose_edits}",),
    "blocks": (
        "fluxlab.roles {freeflux_probe} -o {runs}/freeflux_probe.json",
        "experiments.roles {freeflux_probe} --one-step {runs}/freeflux_probe.json",
    ),
    "steps": ("experiments.roles {step_roles}",),
    "windows": ("experiments.article {step_window}",),
    "order": ("experiments.article {text_order}",),
    "words": ("experiments.words {attention}",),
    "trace": ("experiments.trace {trace}",),
    "relocation": ("experiments.relocation {relocation}",),
    "methods": ("experiments.methods {methods} {methods_2x}",),
    "attribution": (
        "fluxlab.attribution +exp=attribution out={runs}/attribution",
        "experiments.attribution {runs}/attribution",
    ),
    "atlas": (
        "fluxlab.attribution +exp=atlas objective=place out={runs}/atlas_place",
        "fluxlab.attribution +exp=atlas objective=denoising objective.images=sampled seeds=2 out={runs}/atlas_loss",
        "fluxlab.ablation {runs}/atlas_place {runs}/atlas_loss",
        "fluxlab.run --config-dir {runs}/atlas_place +exp=atlas_ablation tracking=none out={runs}/atlas",
        "experiments.atlas {runs}/atlas_place {runs}/atlas_loss {runs}/atlas",
    ),
    "inpaint": ("experiments.inpaint {inpaint}",),
    "upscale": ("experiments.upscale {upscale} {upscale_beyond}",),
    "conventions": ("experiments.conventions",),
}
"""Figure: modules to call after each other. {name} is the folder of the run of `configs/exp/<name>.yaml`.

{runs} is the folder of all runs. Scripts of `experiments` get `-o` too.
"""

WITHOUT_WORDS = ("ids", "schedule", "conventions")
"""Figures without any images of their own, for which key=value words have no meaning."""

GRADIENTS = ("attribution", "atlas")
"""Figures of derivatives, which take the words in `OF_GRADIENTS` only: all weights are needed at a time."""

OF_GRADIENTS = ("model", "lora", "device", "dtype", "cache", "steps")

WITH_WORDS = ("fluxlab.run", "fluxlab.attribution")
"""Modules that get key=value words."""

SCENES = ("words", "trace", "relocation", "methods", "atlas")
"""Figures of what the scene oracle reads: of models that were trained on scenes."""

OF_FLUX2 = ("order",)
"""Figures of an axis that FLUX.1 does not have. Another model than their own must be asked for by their name."""


def overrides(name: str) -> list[str]:
    """Return what differs from the file of an experiment: those in `MANY` get the prompts and seeds of `trace`.

    The curves over an amount and over blocks have its 8 steps too. Windows of steps keep the model's own number.
    FreeFlux's probe is without the keys that move, which its figure does not need.
    """
    import yaml

    if name not in MANY:
        return []
    trace = yaml.safe_load((config_folder() / "exp" / "trace.yaml").read_text(encoding="utf-8"))
    keys = ("prompts", "seeds") if name.startswith("step_") else ("prompts", "seeds", "steps")
    moved = [f"~variants.{kind}" for kind in ("by_10_10", "by_0_20", "by_64_0")] if name == "freeflux_probe" else []
    return [*(f"{key}={json.dumps(trace[key])}" for key in keys), *moved]


def run_of(name: str, folder: Path, words: Sequence[str] = ()) -> list[str]:
    """Return the arguments of `python -m fluxlab.run` for a run that figures read."""
    return [f"+exp={name}", "tracking=none", f"out={folder / name}", *overrides(name), *words]


def commands(name: str, runs: Path, out: Path, words: Sequence[str] = ()) -> list[list[str]]:
    """Return the commands that make a figure, as arguments of `python -m`: its runs, then its scripts."""
    needed = dict.fromkeys(key for line in FIGURES[name] for _, key, _, _ in Formatter().parse(line) if key)
    needed.pop("runs", None)
    places = {"runs": runs, **{run: runs / run for run in needed}}
    found = [["fluxlab.run", *run_of(run, runs, words)] for run in needed]
    for line in FIGURES[name]:
        module, *arguments = (part.format_map(places) for part in line.split())
        own = words if module in WITH_WORDS else ()
        found.append([module, *arguments, *own, *(["-o", str(out)] if module.startswith("experiments.") else [])])
    return found


def refusal(name: str, words: Sequence[str]) -> str | None:
    """Return why a figure cannot be made with key=value words, or None."""
    for word in words:
        if name in WITHOUT_WORDS:
            return f"makes no run, so {word} has no effect on it"
        if name in GRADIENTS and key_of(word) not in OF_GRADIENTS:
            return f"has gradients with {', '.join(OF_GRADIENTS)}, so {word} has no effect on it"
    model = [word for word in words if key_of(word) == "model"]
    if name in SCENES and model:
        config = compose("config", RunConfig, "schema", ["name=x", "tracking=none", *model])
        if not config.model.get("scenes"):
            return f"needs the scene oracle, which does not read the images of {model[0]}"
    return None


def key_of(word: str) -> str:
    """Return the first part of the key that a word of a command line sets: `model` of `model.path=…`."""
    return re.split(r"[.=]", word, maxsplit=1)[0].lstrip("+~")


def default_jobs(words: Sequence[str]) -> int:
    """Return how many commands run at the same time: with the embedded model one for each CPU core, at most 4.

    Its images are small, so that two commands with a core each end sooner than one after the other with both cores.
    Another model or device gets all that there is.
    """
    return 1 if words else min(4, os.cpu_count() or 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 2 for an error that the user can fix, or the exit code of the first command that failed."""
    parser = refusing_parser("every", __doc__)
    parser.add_argument(
        "words", nargs="*", metavar="name|key=value", help=f"some of {', '.join(FIGURES)} (default: all)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/figures"), help="default: runs/figures")
    parser.add_argument("--list", action="store_true", help="show the commands only")
    text = "commands at the same time; default: one for each CPU core, at most 4, and 1 with key=value words"
    parser.add_argument("--jobs", type=int, metavar="N", help=text)
    out_argument(parser)
    code = 0

    def work() -> None:
        nonlocal code
        options = parser.parse_intermixed_args(arguments)
        words = [word for word in options.words if "=" in word]
        names = [word for word in options.words if "=" not in word]
        jobs = default_jobs(words) if options.jobs is None else options.jobs
        if jobs < 1:
            raise UserError(f"--jobs {jobs}: expected at least 1")
        if unknown := [name for name in names if name not in FIGURES]:
            raise UserError(f"{unknown[0]}: no figure has this name; expected {', '.join(FIGURES)}")
        for name in names:
            if reason := refusal(name, words):
                raise UserError(f"{name}: {reason}; leave one of them out")
        others = OF_FLUX2 if any(key_of(word) == "model" for word in words) else ()
        chosen = names or [name for name in FIGURES if name not in others and not refusal(name, words)]
        every = tasks({name: commands(name, options.runs, options.out, words) for name in chosen})
        if options.list:
            print(*("python -m " + shlex.join(command) for task in every for command in task.commands), sep="\n")
            return
        started = time.monotonic()
        code = make(every, options.runs, jobs)
        if not code:
            print(f"{', '.join(chosen)}: in {options.out}, {(time.monotonic() - started) / 60:.1f} min")

    return guarded(work, "interrupted; the same command goes on") or code


class Task(NamedTuple):
    """Commands that run one after the other, once the tasks in `needs` are done."""

    name: str
    commands: list[list[str]]
    needs: frozenset[str] = frozenset()


def tasks(figures: Mapping[str, list[list[str]]]) -> list[Task]:
    """Return a task for each run, which several figures may need, and one for the scripts of each figure.

    figures: the commands of each. Every task comes after those that it needs.
    """
    found: dict[str, Task] = {}
    for name, every in figures.items():
        runs = {f"run {c[1].removeprefix('+exp=')}": c for c in every if _is_shared(c)}
        for run, command in runs.items():
            found.setdefault(run, Task(run, [command]))
        found[name] = Task(name, [c for c in every if not _is_shared(c)], frozenset(runs))
    return list(found.values())


def _is_shared(command: Sequence[str]) -> bool:
    """Return whether a command is a run that several figures may need: one of a file of `configs/exp`."""
    return command[0] == "fluxlab.run" and command[1].startswith("+exp=")


def make(every: Sequence[Task], runs: Path, jobs: int) -> int:
    """Run tasks, `jobs` at the same time. Return 0, or the exit code of the first command that failed.

    After a failure no task is started, and those that have been started are finished.
    """
    waiting, running, done, failed = list(every), {}, set(), 0
    with ThreadPoolExecutor(jobs) as pool:
        while running or (waiting and not failed):
            ready = [task for task in waiting if task.needs <= done] if not failed else []
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(_work, task, runs, jobs)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done.add(running.pop(future).name)
                failed = failed or future.result()
    return failed


def _work(task: Task, runs: Path, jobs: int) -> int:
    """Run the commands of a task. Return 0, or the exit code of the one that failed. Several jobs share the cores."""
    started, log = time.monotonic(), runs / f"{task.name.replace(' ', '-')}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    runs.mkdir(parents=True, exist_ok=True)
    for command in task.commands:
        print("python -m " + shlex.join(command), flush=True)
        call = [sys.executable, "-m", *command]
        if jobs == 1:
            code = subprocess.run(call).returncode
        else:
            with open(log, "ab") as file:
                code = subprocess.run(call, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            shown = "" if jobs == 1 else "\n".join([f"; {log} ends with", *_last_lines(log, 3)])
            print(f"{task.name}: python -m {command[0]} ended with exit code {code}{shown}", file=sys.stderr)
            return code
    if jobs > 1:
        print(f"{task.name}: {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return 0


def _last_lines(file: Path, count: int) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


if __name__ == "__main__":
    sys.exit(main())
