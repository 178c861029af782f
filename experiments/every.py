"""`make figures`, or `python -m experiments.every`: every figure, from its runs to its files.

Runs that a figure needs are made in `--runs` or continued there, then its script draws it into `-o`. It takes about an
hour on 2 CPU cores with the embedded model, and a minute once the runs exist. key=value words are passed on to the
runs, such as model=schnell device=cuda. `--list` shows the commands.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from experiments.style import out_argument, refusing_parser
from fluxlab.compose import guarded
from fluxlab.config import config_folder
from fluxlab.errors import UserError

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
    "attribution": ("experiments.attribution",),
    "atlas": ("experiments.atlas",),
    "inpaint": ("experiments.inpaint",),
    "upscale": ("experiments.upscale",),
}
"""Figure: modules to call after each other. {name} is the folder of the run of `configs/exp/<name>.yaml`.

{runs} is the folder of all runs. Scripts of `experiments` get `-o` too.
"""

WITHOUT_RUNS = ("ids", "schedule", "attribution", "inpaint", "upscale")
"""Figures that know no key=value words. They are left out when such words are given."""


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
        found.append([module, *arguments, *(["-o", str(out)] if module.startswith("experiments.") else [])])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 2 for an error that the user can fix, or the exit code of the first command that failed."""
    parser = refusing_parser("every", __doc__)
    parser.add_argument(
        "words", nargs="*", metavar="name|key=value", help=f"some of {', '.join(FIGURES)} (default: all)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/figures"), help="default: runs/figures")
    parser.add_argument("--list", action="store_true", help="show the commands only")
    out_argument(parser)
    code = 0

    def work() -> None:
        nonlocal code
        options = parser.parse_intermixed_args(arguments)
        words = [word for word in options.words if "=" in word]
        names = [word for word in options.words if "=" not in word]
        if unknown := [name for name in names if name not in FIGURES]:
            raise UserError(f"{unknown[0]}: no figure has this name; expected {', '.join(FIGURES)}")
        if words and (mixed := [name for name in names if name in WITHOUT_RUNS]):
            raise UserError(f"{mixed[0]}: makes no run, so {words[0]} has no effect on it; leave one of them out")
        chosen = names or [name for name in FIGURES if not words or name not in WITHOUT_RUNS]
        code = _make(chosen, options.runs, options.out, words, options.list)

    return guarded(work, "interrupted; the same command goes on") or code


def _make(names: Sequence[str], runs: Path, out: Path, words: Sequence[str], only_list: bool) -> int:
    done, started = [], time.monotonic()
    for name in names:
        for command in commands(name, runs, out, words):
            if command in done:
                continue
            print("python -m " + shlex.join(command), flush=True)
            if not only_list and (code := subprocess.run([sys.executable, "-m", *command]).returncode):
                print(f"figure {name}: the command above ended with exit code {code}", file=sys.stderr)
                return code
            done.append(command)
    if not only_list:
        print(f"{', '.join(names)}: in {out}, {(time.monotonic() - started) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
