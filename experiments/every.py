"""`make figures`, or `python -m experiments.every`: every figure, from its runs to its files.

Runs that a figure needs are made in `--runs` or continued there, then its script draws it into `-o`. It takes more
than an hour on 2 CPU cores with the embedded model, and half of that once the runs exist, for experiments that make
their images themselves. key=value words such as model=schnell device=cuda are passed on to the runs and to these
experiments. Without names, figures for which a word has no meaning are left out, and those of the scene oracle if the
model was not trained on scenes. `--list` shows the commands.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from experiments.standalone import KEYS, key_of, read_words
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
    "conventions": ("experiments.conventions",),
}
"""Figure: modules to call after each other. {name} is the folder of the run of `configs/exp/<name>.yaml`.

{runs} is the folder of all runs. Scripts of `experiments` get `-o` too.
"""

WITHOUT_WORDS = ("ids", "schedule", "conventions")
"""Figures without any images of their own, for which key=value words have no meaning."""

ALONE = ("attribution", "atlas", "inpaint", "upscale")
"""Figures whose scripts load a model themselves. They know the words of `standalone.KEYS`."""

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
    own = words if name in ALONE else ()
    for line in FIGURES[name]:
        module, *arguments = (part.format_map(places) for part in line.split())
        found.append([module, *arguments, *own, *(["-o", str(out)] if module.startswith("experiments.") else [])])
    return found


def refusal(name: str, words: Sequence[str]) -> str | None:
    """Return why a figure cannot be made with key=value words, or None."""
    for word in words:
        if name in WITHOUT_WORDS:
            return f"makes no run, so {word} has no effect on it"
        if name in ALONE and key_of(word) not in KEYS:
            return f"makes its images itself with {', '.join(KEYS)}, so {word} has no effect on it"
    model = [word for word in words if key_of(word) == "model"]
    if name in SCENES and model and not read_words(model).model.get("scenes"):
        return f"needs the scene oracle, which does not read the images of {model[0]}"
    return None


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
        for name in names:
            if reason := refusal(name, words):
                raise UserError(f"{name}: {reason}; leave one of them out")
        others = OF_FLUX2 if any(key_of(word) == "model" for word in words) else ()
        chosen = names or [name for name in FIGURES if name not in others and not refusal(name, words)]
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
