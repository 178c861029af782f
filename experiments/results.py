"""What the figures of a store share: options, which cells and measures are shown, variants and numbers in words."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.experiment.cells import FLOOR_SHIFT
from fluxlab.experiment.reading import Run, read_store
from fluxlab.experiment.spec import REFERENCE_NAMES
from fluxlab.measure.registry import METRICS
from fluxlab.positions import Program
from fluxlab.positions.program import Edit
from fluxlab.select.arguments import AXES

DEFAULT_METRICS = ("ssim", "letters", "object", "sawtooth", "displacement", "sharpness")
"""Which measures a figure takes unless told, the first that have values."""

TITLES = {
    "ssim": "SSIM to the baseline",
    "psnr": "PSNR to the baseline",
    "rmse": "RMSE to the baseline",
    "letters": "letters right",
    "object": "things as asked for",
    "word": "sign as asked for",
    "sawtooth": "saw-tooth",
    "colour_shift": "colour shift",
    "thing_moved": "thing moved by",
    "clip_text": "CLIP, to the prompt",
    "clip_image": "CLIP, to the baseline",
    "dino_image": "DINO, to the baseline",
}
INTERVALS = "95 % intervals (bootstrap over pictures, which count as independent)"
SHARES = ("ssim", "object", "colour", "shape", "place", "relation", "sign", "word", "letters")
"""Measures between 0 and 1, which are drawn over all of that."""

FORMULAS = {
    "zero": (None, "{} = 0"),
    "set": ("value", "{} = {}"),
    "scale": ("factor", "{} × {}"),
    "offset": ("by", "{} + {}"),
}
NAMES = {"image": "img_ids", "text": "txt_ids", "all": "all ids"}


def run_command(make: Callable[..., list[Path]], name: str, arguments: list[str] | None = None) -> int:
    """Run `make(run, folder, prompts=, seeds=, variants=, metrics=, widths=)` as the command line asks, and say which
    files it wrote. Returns 0; 2 for what the user can mend; 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=make.__doc__, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("store", type=Path, help="the folder of a finished run")
    parser.add_argument("-o", "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="of the pictures: a part of it; repeatable")
    parser.add_argument("--seeds", metavar="N,N", help="of the pictures; numbers always come from all of them")
    parser.add_argument("--variants", metavar="NAME,NAME", help="default: all; the baseline is always there")
    parser.add_argument("--metrics", metavar="NAME,NAME", help="columns of metrics.csv; column width has the first")
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")

    def work() -> None:
        options = parser.parse_args(arguments)
        widths = ("column", "page") if options.width == "both" else (options.width,)
        lists = {key: _split(getattr(options, key)) for key in ("seeds", "variants", "metrics")}
        for file in make(read_store(options.store), options.out, prompts=options.prompt, widths=widths, **lists):
            print(file)

    return guarded(work, "interrupted")


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def pick_places(
    run: Run, prompts: Sequence[str] | None, seeds: Sequence[str] | None, most: int
) -> list[tuple[str, int]]:
    """The (prompt, seed) whose pictures are shown, those of a prompt together: all that are asked for, or else at most
    `most`, from as many prompts. A prompt is named by a part of it that no other has. Raises `UserError`.
    """
    known_prompts, known_seeds = (list(dict.fromkeys(place[i] for place in run.places)) for i in (0, 1))
    shown = [_prompt(known_prompts, part) for part in prompts or ()] or known_prompts
    wrong = [seed for seed in seeds or () if seed not in map(str, known_seeds)]
    if wrong or seeds == []:
        raise UserError(f"--seeds {','.join(seeds)}: the store has {', '.join(map(str, known_seeds))}")
    numbers = list(dict.fromkeys(map(int, seeds))) if seeds else known_seeds
    if not prompts:
        shown = shown[: max(1, most // len(numbers) if seeds else most)]
    if not seeds:
        numbers = numbers[: max(1, most // len(shown))]
    return [(prompt, seed) for prompt in dict.fromkeys(shown) for seed in numbers]


def _prompt(known: Sequence[str], part: str) -> str:
    found = [prompt for prompt in known if part == prompt] or [p for p in known if part.lower() in p.lower()]
    if len(found) != 1:
        said = "more than one prompt has that" if found else "no prompt has that"
        raise UserError(f"--prompt {part!r}: {said}; the store has\n" + "; ".join(map(repr, found or known))[:400])
    return found[0]


def pick_metrics(run: Run, names: Sequence[str] | None, most: int) -> list[str]:
    """The measures that are asked for, or else the first of `DEFAULT_METRICS` that have values. Raises `UserError`."""
    known = dict.fromkeys(row["metric"] for row in run.summary if not math.isnan(row["mean"]))
    wrong = [name for name in names or () if name not in known]
    if wrong or names == []:
        raise UserError(f"--metrics {','.join(names)}: the store has {', '.join(known)}")
    if len(names or ()) > most:
        raise UserError(f"--metrics {','.join(names)}: {len(names)}, expected at most {most}")
    return list(dict.fromkeys(names)) if names else [name for name in DEFAULT_METRICS if name in known][: min(2, most)]


def pick_variants(run: Run, names: Sequence[str] | None) -> list[str]:
    """The baseline, and the variants that are asked for or all. Raises `UserError`."""
    wrong = [name for name in names or () if name not in run.variants]
    if wrong or names == []:
        raise UserError(f"--variants {','.join(names)}: the store has {', '.join(run.variants)}")
    return list(dict.fromkeys([run.baseline, *(names or run.variants)]))


def changes(run: Run, metric: str) -> bool:
    """Whether a measure is one of a picture by itself, so that its effect is the change from the baseline's."""
    return any(row["metric"] == metric and math.isfinite(row["paired_mean"]) for row in run.summary)


def effects(run: Run, metric: str) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of every variant and reference: of the change from the baseline at equal prompt and seed, or
    for a measure that compares with it anyway, as it is.

    The noise floor is known at the first seed only, so that its own mean is no match for those of all seeds.
    """
    paired = "paired_" if changes(run, metric) else ""
    rows = {row["variant"]: row for row in run.summary if row["metric"] == metric}
    found = {name: tuple(row[f"{paired}{end}"] for end in ("mean", "low", "high")) for name, row in rows.items()}
    return {**found, run.baseline: (0.0, math.nan, math.nan)} if paired else found


def single(run: Run, variant: str, metric: str) -> list[float]:
    """The effect in each picture of a variant, where there is one."""
    values = []
    for row in run.metrics:
        if row["variant"] == variant:
            before = run.cell(run.baseline, row["prompt"], row["seed"])[metric] if changes(run, metric) else 0
            values.append(row[metric] - before)
    return [value for value in values if math.isfinite(value)]


def title(metric: str) -> str:
    """A measure's name for an axis, with its unit."""
    unit = METRICS[metric].unit if metric in METRICS else ""
    return TITLES.get(metric, metric.replace("_", " ")) + (f" ({unit})" if unit else "")


def axis(run: Run, metric: str) -> str:
    """What an axis of `effects` says."""
    return f"{title(metric)},\nless the baseline's" if changes(run, metric) else title(metric)


def label(run: Run, variant: str) -> str:
    """What a variant does, as a formula where there is one: `img_ids × 0.5`, `img_ids (index) = 1`."""
    try:
        program = Program.from_config(run.record["variants"][variant]["program"])
    except UserError:  # an op of the user's own, whose module is not loaded here
        return run.describe(variant)
    return "; then ".join(map(formula, program.edits)) or "untouched ids"


def formula(edit: Edit, amount: str | None = None) -> str:
    """An edit in a few characters; `amount` stands in for its number."""
    argument, form = FORMULAS.get(edit.op, (None, ""))
    values = edit.arguments[argument] if argument else None
    tokens = edit.where["tokens"]
    known = isinstance(tokens, str) and tokens in NAMES and form
    plain = len(edit.arguments) == (argument is not None) or edit.arguments.get("origin") == "corner"
    if not (known and plain) or (argument and one_number(values) is None):
        return Program((edit,)).describe()
    axes = [axis for i, axis in enumerate(AXES) if values is None or values[i] is not None]
    axes = [axis for axis in axes if edit.where["axes"] == "all" or axis in edit.where["axes"]]
    what = NAMES[tokens] if len(axes) == len(AXES) else f"{NAMES[tokens]} ({', '.join(axes)})"
    text = form.format(what, amount or (f"{one_number(values):g}" if argument else ""))
    # the rest, steps, blocks, …, as everywhere else
    bare = replace(edit, arguments={}, where={**edit.where, "tokens": "image", "axes": "all"})
    return text.replace("+ -", "- ") + Program((bare,)).describe().removeprefix(f"{edit.op} on image")


def one_number(values: Any) -> float | None:
    """The number that an argument is on every axis it names; None where there is no such number."""
    named = {value for value in values if value is not None} if isinstance(values, list) else {values}
    only = named.pop() if len(named) == 1 else None
    return None if only is None or isinstance(only, bool | str | dict | list) else only


def number(value: float) -> str:
    """Three digits, or ∞, or - for none."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value + 0.0:.3g}"  # -0.0 becomes 0.0


def told(row: dict[str, Any], prefix: str = "") -> str:
    """`0.41 [0.38, 0.44]`: a mean and its interval, of a row of the summary."""
    mean, low, high = (row[f"{prefix}{end}"] for end in ("mean", "low", "high"))
    return number(mean) if math.isnan(low) else f"{number(mean)} [{number(low)}, {number(high)}]"


def conditions(run: Run) -> str:
    """Model, sizes and versions, and how to make the store again."""
    how, asked, made = (run.record[key] for key in ("settings", "request", "versions"))
    parts = [f"Model {asked['model']['name']} (digest {run.record['settings']['model_digest'][:12]})"]
    parts += [f"{how['steps']} steps", f"{how['width']} × {how['height']} px"]
    parts += [f"{key} {how[key]:g}" for key in ("guidance", "true_cfg") if how[key] is not None]
    parts += [f"{how['dtype']} on {how['device']}"]
    versions = ", ".join(f"{key} {str(made[key])[:12]}" for key in ("fluxlab", "commit", "torch") if made.get(key))
    return f"{', '.join(parts)}. Experiment {run.record['digest']}, {versions}: {run.record['command']}"


def numbers(run: Run, variants: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """A caption's lines: for each measure what it is, the two references, and every variant with its interval."""
    found, lines = {(row["variant"], row["metric"]): row for row in run.summary}, []
    for metric in metrics:
        paired = changes(run, metric)
        less = ", less the baseline's at equal prompt and seed"
        meaning = f": {METRICS[metric].meaning}" if metric in METRICS else ""
        lines.append(f"{title(metric)}{meaning}{less if paired else ''}.")
        for name in (*REFERENCE_NAMES, *variants):
            row = found.get((name, metric))
            if row is None:
                continue
            of = name if name in REFERENCE_NAMES else f"{name} ({label(run, name)})"
            said = told(row)
            if paired:
                said = f"itself {said}" if name == run.baseline else f"{told(row, 'paired_')}, itself {said}"
            lines.append(f"  {of}: {said}, n = {row['n']}")
    return lines


def caption(run: Run, said: str, variants: Sequence[str], metrics: Sequence[str]) -> str:
    """A figure's text: what the run is, what is `said` of the figure, the references, its numbers, conditions."""
    return "\n".join([f"{opening(run)} {said} {references(run)}", *numbers(run, variants, metrics), conditions(run)])


def every_cell(run: Run) -> str:
    """`2 prompts × 4 seeds`: what numbers are over."""
    prompts, seeds = (len({place[i] for place in run.places}) for i in (0, 1))
    return f"{counted(prompts, 'prompt')} × {counted(seeds, 'seed')}"


def opening(run: Run) -> str:
    """`article: five edits of img_ids.`"""
    told = ": ".join(filter(None, (run.record["name"], run.record["caption"])))
    return told if told[-1] in ".!?" else f"{told}."


def references(run: Run) -> str:
    """What the two lines are that every effect stands beside."""
    shift = ", ".join(f"{value:g}" for value in FLOOR_SHIFT)
    seeds = len({seed for _, seed in run.places})
    return (
        f"Noise floor: all ids of text and image shifted by ({shift}), which attention cannot see. "
        f"Another seed: the baseline's picture at {'the next' if seeds > 1 else 'a neighbouring'} seed."
    )


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def plain_name(run: Run) -> str:
    """The experiment's name, as a part of a file's."""
    return re.sub(r"[^\w.-]", "_", run.record["name"])
