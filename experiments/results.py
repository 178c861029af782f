"""What the figures of a run folder share: arguments, choice of cells and metrics, variants and numbers as text."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.sheet import text_lines
from experiments.style import out_argument, refusing_parser
from fluxlab.compose import guarded
from fluxlab.errors import UserError
from fluxlab.experiment.cells import FLOOR_SHIFT
from fluxlab.experiment.reading import Run, read_store
from fluxlab.experiment.rows import Row
from fluxlab.experiment.store import CELLS, REFERENCES
from fluxlab.measure.registry import METRICS, about
from fluxlab.measure.summary import CONTROLS, Effect
from fluxlab.positions import Program
from fluxlab.positions.program import Edit
from fluxlab.select.arguments import AXES, EVERY_AXIS

DEFAULT_METRICS = ("ssim", "letters", "object", "sawtooth", "displacement", "sharpness")
"""Metrics that a figure shows by default: the first of them that have values."""

INTERVALS = "95 % intervals (bootstrap over images, which count as independent)"

FORMULAS = {
    "zero": (None, "{} = 0"),
    "set": ("value", "{} = {}"),
    "scale": ("factor", "{} × {}"),
    "offset": ("by", "{} + {}"),
}
NAMES = {"image": "img_ids", "text": "txt_ids", "all": "all ids"}


def run_command(make: Callable[..., list[Path]], name: str, arguments: list[str] | None = None) -> int:
    """Run `make(run, folder, prompts=, seeds=, variants=, metrics=, widths=)` with a command line's arguments.

    Prints the files that it wrote. Returns 0; 2 for an error that the user can fix; 130 if interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = refusing_parser(name, make.__doc__)
    parser.add_argument("store", type=Path, help="the folder of a finished run")
    out_argument(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="show its images: a part of it; repeatable")
    parser.add_argument("--seeds", metavar="N,N", help="show their images; numbers are always over all seeds")
    parser.add_argument("--variants", metavar="NAME,NAME", help="default: all; the baseline is always shown")
    parser.add_argument("--metrics", metavar="NAME,NAME", help="columns of metrics.csv; column width shows the first")
    parser.add_argument("--width", choices=["column", "page", "both"], default="both", help="default: both")

    def work() -> None:
        options = parser.parse_args(arguments)
        widths = ("column", "page") if options.width == "both" else (options.width,)
        lists = {key: _split(getattr(options, key)) for key in ("seeds", "variants", "metrics")}
        if widths == ("column",) and len(lists["metrics"] or ()) > 1:
            raise UserError(f"--metrics {options.metrics}: column width shows one metric; name one, or --width page")
        for file in make(read_store(options.store), options.out, prompts=options.prompt, widths=widths, **lists):
            print(file)

    return guarded(work, "interrupted")


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def pick_places(
    run: Run, prompts: Sequence[str] | None, seeds: Sequence[str] | None, most: int
) -> list[tuple[str, int]]:
    """Return the (prompt, seed) whose images are shown, those of one prompt next to each other.

    All that are named; by default at most `most`, from as many prompts as possible. A prompt is named by a part
    that no other prompt has. Raises UserError for a prompt or seed that the store does not have.
    """
    all_prompts, all_seeds = (list(dict.fromkeys(place[i] for place in run.places)) for i in (0, 1))
    shown = [_find_prompt(all_prompts, part) for part in prompts or ()] or all_prompts
    unknown = [seed for seed in seeds or () if seed not in map(str, all_seeds)]
    if unknown or seeds == []:
        raise UserError(f"--seeds {','.join(seeds)}: the store has {', '.join(map(str, all_seeds))}")
    numbers = list(dict.fromkeys(map(int, seeds))) if seeds else all_seeds
    if not prompts:
        shown = shown[: max(1, most // len(numbers) if seeds else most)]
    if not seeds:
        numbers = numbers[: max(1, most // len(shown))]
    return [(prompt, seed) for prompt in dict.fromkeys(shown) for seed in numbers]


def _find_prompt(prompts: Sequence[str], part: str) -> str:
    found = [p for p in prompts if part == p] or [p for p in prompts if part.lower() in p.lower()]
    if len(found) != 1:
        reason = "more than one prompt contains it" if found else "no prompt contains it"
        raise UserError(f"--prompt {part!r}: {reason}; the store has\n" + "; ".join(map(repr, found or prompts))[:400])
    return found[0]


def pick_metrics(run: Run, names: Sequence[str] | None, most: int) -> list[str]:
    """Return the metrics that are named, by default the first of `DEFAULT_METRICS` that have values.

    Raises UserError for a metric without values and for more than `most`.
    """
    with_values = dict.fromkeys(effect.metric for effect in run.effects if effect.n)
    unknown = [name for name in names or () if name not in with_values]
    if unknown or names == []:
        raise UserError(f"--metrics {','.join(names)}: the store has {', '.join(with_values)}")
    if len(names or ()) > most:
        raise UserError(f"--metrics {','.join(names)}: {len(names)} metrics, expected at most {most}")
    if names:
        return list(dict.fromkeys(names))
    return [name for name in DEFAULT_METRICS if name in with_values][: min(2, most)]


def pick_variants(run: Run, names: Sequence[str] | None) -> list[str]:
    """Return the baseline and the variants that are named, by default all. Raises UserError for an unknown one."""
    unknown = [name for name in names or () if name not in run.variants]
    if unknown or names == []:
        raise UserError(f"--variants {','.join(names)}: the store has {', '.join(run.variants)}")
    return list(dict.fromkeys([run.baseline, *(names or run.variants)]))


def is_paired(run: Run, metric: str) -> bool:
    """Return whether a metric describes one image, so that figures show its paired difference to the baseline."""
    return any(effect.metric == metric and math.isfinite(effect.difference) for effect in run.effects)


def effects(run: Run, metric: str) -> dict[str, tuple[float, float, float]]:
    """Return (mean, low, high) of every variant and control, as a figure draws them.

    For a metric of one image the paired difference to the baseline, which is 0 for the baseline itself. Otherwise the
    metric, which compares with the baseline anyway. A control with fewer cells than the variants is thus compared with
    the baseline at its own cells.
    """
    paired = is_paired(run, metric)
    shown = {}
    for effect in run.effects:
        if effect.metric != metric:
            continue
        ends = (effect.difference, effect.difference_low, effect.difference_high)
        ends = ends if paired else (effect.value, effect.low, effect.high)
        shown[effect.variant] = (0.0, math.nan, math.nan) if paired and effect.variant == run.baseline else ends
    return shown


def counts(run: Run, metrics: Sequence[str]) -> dict[str, int]:
    """Return the number of cells of every variant and control: the largest n of some metrics."""
    largest: dict[str, int] = {}
    for effect in run.effects:
        if effect.metric in metrics:
            largest[effect.variant] = max(effect.n, largest.get(effect.variant, 0))
    return largest


def every_image(run: Run) -> list[tuple[Row, Path]]:
    """Return the rows of metrics.csv and references.csv, each with its image file: every cell, then the controls.

    The control "another seed" may be a cell of the baseline.
    """
    rows = [*((row, CELLS) for row in run.metrics), *((row, REFERENCES) for row in run.references)]
    found = []
    for row, folder in rows:
        files = [run.path / where / f"{row['cell']}.png" for where in (folder, CELLS)]
        found.append((row, next(filter(Path.is_file, files), files[0])))
    return found


def cell_effects(run: Run, variant: str, metric: str) -> list[float]:
    """Return the effect in each cell of a variant that has one."""
    values = []
    for row in run.metrics:
        if row["variant"] == variant:
            before = run.cell(run.baseline, row["prompt"], row["seed"])[metric] if is_paired(run, metric) else 0
            values.append(row[metric] - before)
    return [value for value in values if math.isfinite(value)]


def title(metric: str) -> str:
    """Return a metric's title with its unit, for an axis."""
    unit = about(metric).unit
    return about(metric).title + (f" ({unit})" if unit else "")


def axis_label(run: Run, metric: str, points: float, width: float) -> str:
    """Return the label of an axis that shows `effects`, on at most two lines of `width` dots."""
    text = f"Δ {title(metric)}" if is_paired(run, metric) else title(metric)
    return "\n".join(text_lines(text, points, width, 2))


def label(run: Run, variant: str) -> str:
    """Return what a variant does, as a formula if there is one: `img_ids × 0.5`, `img_ids (index) = 1`."""
    try:
        program = Program.from_config(run.record["variants"][variant]["program"])
    except UserError:  # an op of a plugin that is not loaded
        return run.describe(variant)
    return "; then ".join(map(formula, program.edits)) or "unchanged ids"


def formula(edit: Edit, amount: str | None = None) -> str:
    """Return an edit as a short formula. `amount` replaces its number."""
    argument, form = FORMULAS.get(edit.op, (None, ""))
    values = edit.arguments[argument] if argument else None
    tokens = edit.where["tokens"]
    known = isinstance(tokens, str) and tokens in NAMES and form
    plain = len(edit.arguments) == (argument is not None) or edit.arguments.get("origin") == "corner"
    if not (known and plain) or (argument and one_number(values) is None):
        return Program((edit,)).describe()
    given = [True] * len(EVERY_AXIS) if values is None else [value is not None for value in values]
    axes = [axis for axis, is_given in zip(EVERY_AXIS, given, strict=False) if is_given]  # FLUX.1 has the first three
    axes = [axis for axis in axes if edit.where["axes"] == "all" or axis in edit.where["axes"]]
    target = NAMES[tokens] if {*AXES} <= {*axes} else f"{NAMES[tokens]} ({', '.join(axes)})"
    text = form.format(target, amount or (f"{one_number(values):g}" if argument else ""))
    # steps, blocks and so on are described as everywhere else
    bare = replace(edit, arguments={}, where={**edit.where, "tokens": "image", "axes": "all"})
    return text.replace("+ -", "- ") + Program((bare,)).describe().removeprefix(f"{edit.op} on image")


def one_number(values: Any) -> float | None:
    """Return the number that an argument has on every axis it names; None if it is not one number."""
    named = {value for value in values if value is not None} if isinstance(values, list) else {values}
    only = named.pop() if len(named) == 1 else None
    return None if only is None or isinstance(only, bool | str | dict | list) else only


def number(value: float) -> str:
    """Return a number with three digits, `∞`, or `-` for nan."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value + 0.0:.3g}"  # -0.0 becomes 0.0


def mean_text(mean: float, low: float, high: float) -> str:
    """Return `0.41 [0.38, 0.44]`."""
    return number(mean) if math.isnan(low) else f"{number(mean)} [{number(low)}, {number(high)}]"


def value_text(row: Mapping[str, float]) -> str:
    """Return `0.91 [0.84, 0.97], Δ 0.02 [-0.03, 0.06], n = 64`, as far as there are values."""
    parts = []
    for sign, kind in (("", ""), ("Δ ", "paired_")):
        if f"{kind}mean" in row:
            ends = (row.get(f"{kind}{end}", math.nan) for end in ("low", "high"))
            parts.append(f"{sign}{mean_text(row[f'{kind}mean'], *ends)}")
    return ", ".join([*parts, f"n = {row['n']}"])


def effect_text(effect: Effect) -> str:
    """Return an effect with its interval and n; for a paired difference also the value it leads to."""
    if effect.missing:
        return effect.missing
    if math.isnan(effect.difference):
        text = mean_text(effect.value, effect.low, effect.high)
    else:
        change = mean_text(effect.difference, effect.difference_low, effect.difference_high)
        text = f"Δ {change}, baseline + Δ = {number(effect.value)}"
    if about(effect.metric).pooled and effect.n > 1 and math.isfinite(effect.value):
        text += f" (of the mean {about(effect.metric).pooled}; median of the images {number(effect.median)})"
    return f"{text}, n = {effect.n}"


def conditions(run: Run) -> str:
    """Return model, sizes, versions and the command of a run."""
    settings, request, versions = (run.record[key] for key in ("settings", "request", "versions"))
    parts = [f"Model {request['model']['name']} (digest {settings['model_digest'][:12]})"]
    parts += [f"{settings['steps']} steps", f"{settings['width']} × {settings['height']} px"]
    parts += [f"{key} {settings[key]:g}" for key in ("guidance", "true_cfg") if settings[key] is not None]
    parts += [f"{settings['dtype']} on {settings['device']}"]
    # the commit is printed whole: a shortened one would lose its mark of modified files
    made = ", ".join(f"{key} {versions[key]}" for key in ("fluxlab", "commit", "torch") if versions.get(key))
    return f"{', '.join(parts)}. Experiment {run.record['digest']}, {made}: {run.record['command']}"


def numbers(run: Run, variants: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Return a caption's lines: what each metric is, then every control and variant with its effect."""
    table, lines = {(effect.variant, effect.metric): effect for effect in run.effects}, []
    for metric in metrics:
        meaning = f": {METRICS[metric].meaning}" if metric in METRICS else ""
        change = "; Δ: mean difference to the baseline at equal prompt and seed" if is_paired(run, metric) else ""
        lines.append(f"{title(metric)}{meaning}{change}.")
        for name in (*CONTROLS, *variants):
            if (name, metric) in table:
                subject = name if name in CONTROLS else f"{name} ({label(run, name)})"
                lines.append(f"  {subject}: {effect_text(table[name, metric])}")
    return lines


def caption(run: Run, text: str, variants: Sequence[str], metrics: Sequence[str]) -> str:
    """Return a figure's caption: the run, `text` about the figure, the controls, the numbers, the conditions."""
    return "\n".join([f"{opening(run)} {text} {controls(run)}", *numbers(run, variants, metrics), conditions(run)])


def all_cells(run: Run) -> str:
    """Return what means are over: `2 prompts × 4 seeds`."""
    prompts, seeds = (len({place[i] for place in run.places}) for i in (0, 1))
    return f"{counted(prompts, 'prompt')} × {counted(seeds, 'seed')}"


def opening(run: Run) -> str:
    """Return name and caption of a run as a sentence: `article: five edits of img_ids.`"""
    text = ": ".join(filter(None, (run.record["name"], run.record["caption"])))
    return text if text[-1] in ".!?" else f"{text}."


def controls(run: Run) -> str:
    """Return a description of the two controls."""
    shift = ", ".join(f"{value:g}" for value in FLOOR_SHIFT)
    seeds = len({seed for _, seed in run.places})
    return (
        f"Controls: the noise floor is the baseline with all ids of text and image shifted by ({shift}), which changes "
        f"rounding only, at the first seed of each prompt; another seed is the baseline at "
        f"{'the next' if seeds > 1 else 'a neighbouring'} seed."
    )


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def plain_name(run: Run) -> str:
    """Return the experiment's name as part of a file name."""
    return re.sub(r"[^\w.-]", "_", run.record["name"])
