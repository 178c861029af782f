"""`report.html`: one or several stores as one page in one file, which asks for nothing from anywhere."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from fluxlab.drawing.pictures import BUDGET, Picture, data_url, embed, note, put
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_store
from fluxlab.experiment.spec import REFERENCE_NAMES
from fluxlab.measure.registry import METRICS, about, shown_metrics
from fluxlab.report.attention import page as attention_page
from fluxlab.select.masks import compact

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
CRISP = 160  # px: pictures up to this side are enlarged with their pixels kept
SCALE = (4, 96)  # where the least and the greatest value lie on an interval's drawing of 100 px

Row = dict[str, Any]


def write_report(stores: "Sequence[str | PathLike[str]]", file: "str | PathLike[str]") -> Path:
    """Write the page of one or several stores, atomically; the same stores give the same bytes. Returns the file.

    A file that already holds just that is left alone, and nothing else is written. Raises `UserError` for no store,
    one that is damaged or not finished, one that is given twice, and a picture that cannot be read.
    """
    file, content = Path(file), render(stores).encode()
    return put(file, content)


def render(stores: "Sequence[str | PathLike[str]]", budget: int = BUDGET) -> str:
    """The page. Its pictures have `budget` bytes together, and are reduced where they need more; errors as above."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs = _read(stores)
    names = _names(runs)
    files = [run.image(row["variant"], row["prompt"], row["seed"]) for run in runs for row in run.metrics]
    attention = attention_page.shown(runs, names)
    embedded = embed(files, max(budget // 4, budget - attention.bytes))
    scripts = [_template("report.js"), *([_template("attention.js")] if attention.data else [])]
    style = _template("report.css") + (_template("attention.css") if attention else "")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    metrics = _metrics(runs)
    return environment.get_template("report.html.j2").render(
        title=runs[0].record["name"] if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_run(i, name, run, embedded) for i, (name, run) in enumerate(zip(names, runs, strict=True))],
        metrics=[{"name": name, **about(name)._asdict()} for name in metrics],
        shown=[name for name in metrics if name in shown_metrics()] or metrics,
        findings=_findings(runs, names, metrics),
        cells=[
            {"run": name, **row, "values": [_number(row.get(metric, math.nan)) for metric in metrics]}
            for name, run in zip(names, runs, strict=True)
            for row in run.metrics
        ],
        note=note(list(embedded.values())),
        crisp=all(max(picture.stored) <= CRISP for picture in embedded.values()),
        attention=attention,
        scripts=scripts,
        style=style,
        script_hashes=[_hash(script) for script in scripts],
        style_hash=_hash(style),
    )


def _read(stores: "Sequence[str | PathLike[str]]") -> list[Run]:
    paths = [Path(path) for path in stores]
    if not paths:
        raise UserError("no run folder named, of which there has to be one at least")
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise UserError(f"{path}: named twice; leave one of them out")
    runs = [read_store(path) for path in paths]
    for run in runs:
        if not run.metrics:
            raise UserError(f"{run.path}: no cell in its tables; run its command again")
    return runs


def _names(runs: Sequence[Run]) -> list[str]:
    """What runs are called on the page: the experiment's name, and as much as tells those of one name apart."""
    names = [run.record["name"] for run in runs]
    digests = [f"{run.record['name']} {run.record['digest']}" for run in runs]
    told = [name if names.count(name) == 1 else digest for name, digest in zip(names, digests, strict=True)]
    return [name if told.count(name) == 1 else f"{name} ({told[:i].count(name) + 1})" for i, name in enumerate(told)]


def _metrics(runs: Sequence[Run]) -> list[str]:
    """Names of all metrics that have a value anywhere, in the order of `METRICS`, others last."""
    named = dict.fromkeys(row["metric"] for run in runs for row in run.summary if not math.isnan(row["mean"]))
    return [*(name for name in METRICS if name in named), *(name for name in named if name not in METRICS)]


def _run(index: int, name: str, run: Run, embedded: dict[Path, Picture]) -> Row:
    """What the template says of one run."""
    record, settings = run.record, run.record["settings"]
    prompts = list(dict.fromkeys(prompt for prompt, _ in run.places))
    seeds = list(dict.fromkeys(seed for _, seed in run.places))
    counts = ((len(run.variants), "variant"), (len(prompts), "prompt"), (len(seeds), "seed"))
    return {
        "id": f"run-{index}",
        "name": name,
        "caption": record["caption"],
        "command": record["command"],
        "about": [
            " × ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts),
            f"{settings['width']} × {settings['height']} px",
            f"{settings['steps']} step{'' if settings['steps'] == 1 else 's'}",
            f"model {record['request']['model']['name']}",
        ],
        "baseline": run.baseline,
        "prompts": [(prompt, sum(p == prompt for p, _ in run.places)) for prompt in prompts],
        "seeds": [seed for _, seed in run.places],
        "rows": [
            {
                "variant": variant,
                "about": run.describe(variant),
                "digest": record["variants"][variant]["digest"],
                "yaml": _yaml(variant, compact(record["variants"][variant]["program"], digests=True)),
                "layout": layout(run, variant, prompts[0]),
                "cells": [
                    {"prompt": prompt, "seed": seed, "picture": embedded.get(run.image(variant, prompt, seed))}
                    for prompt, seed in run.places
                ],
            }
            for variant in run.variants
        ],
        "settings": [(key.replace("_", " "), _plain(value)) for key, value in settings.items() if value is not None],
        "versions": [(key, _plain(value)) for key, value in record["versions"].items()],
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if not key.startswith("_"))
    return str(value)


def _findings(runs: Sequence[Run], names: Sequence[str], metrics: Sequence[str]) -> list[Row]:
    """A row a variant, then the references, run by run: `values` hold what a metric says of it, None where nothing."""
    tables = [{(row["variant"], row["metric"]): row for row in run.summary} for run in runs]
    columns = {metric: _column(metric, tables) for metric in metrics}
    found = []
    for i, (run, name, table) in enumerate(zip(runs, names, tables, strict=True)):
        for variant in (*run.variants, *REFERENCE_NAMES):
            values = [columns[metric](table, table.get((variant, metric))) for metric in metrics]
            found.append(
                {
                    "run": name,
                    "variant": variant,
                    "id": f"run-{i}",
                    "index": run.variants.index(variant) if variant in run.variants else None,
                    "values": values,
                }
            )
    return found


def _column(metric: str, tables: Sequence[dict]) -> Callable[[dict, "Row | None"], "Row | None"]:
    """How a metric's values are told: to three digits of the largest mean, drawn between the least and the greatest."""
    rows = [row for table in tables for row in table.values() if row["metric"] == metric]
    ends = [row[key] for row in rows for key in ("mean", "low", "high") if math.isfinite(row[key])]
    largest = max((abs(row["mean"]) for row in rows if math.isfinite(row["mean"])), default=0)
    digits = min(5, max(0, 2 - math.floor(math.log10(largest)))) if largest else 1

    def text(value: float, sign: str = "") -> str:
        return f"{round(value, digits) + 0.0:{sign}.{digits}f}" if math.isfinite(value) else "∞"  # and no -0.0

    def interval(low: float, high: float, sign: str = "") -> str:
        return "" if math.isnan(low) or low == high else f"[{text(low, sign)}, {text(high, sign)}]"

    def place(value: float) -> float | None:
        if not math.isfinite(value) or max(ends) == min(ends):
            return None
        return round(SCALE[0] + (SCALE[1] - SCALE[0]) * (value - min(ends)) / (max(ends) - min(ends)), 1)

    def tell(table: dict, row: "Row | None") -> "Row | None":
        if row is None or math.isnan(row["mean"]):
            return None
        counts = [other["n"] for other in table.values() if other["variant"] == row["variant"]]
        floor, ceiling = (table.get((reference, metric), {"mean": math.nan})["mean"] for reference in REFERENCE_NAMES)
        return {
            "raw": _number(row["mean"]),
            "mean": text(row["mean"]),
            "interval": interval(row["low"], row["high"]),
            "paired": "" if math.isnan(row["paired_mean"]) else text(row["paired_mean"], "+"),
            "paired_interval": interval(row["paired_low"], row["paired_high"], "+"),
            "few": row["n"] if row["n"] < max(counts) else 0,
            "at": place(row["mean"]),
            "from": place(row["low"]),
            "to": place(row["high"]),
            "floor": place(floor),
            "ceiling": place(ceiling),
        }

    return tell


def _number(value: float) -> str:
    """As metrics.csv has it; nothing for no number."""
    return "" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.6g}"


def _yaml(variant: str, program: Row) -> str:
    """A program as it stands in an experiment: an edit a line."""
    name = yaml.safe_dump({variant: {}}, allow_unicode=True, default_flow_style=False).removesuffix(" {}\n")
    if not program:
        return f"{name} {{}}"
    edits = [
        yaml.safe_dump({key: edit}, sort_keys=False, allow_unicode=True, default_flow_style=True, width=88)
        for key, edit in program.items()
    ]
    return "\n".join([name, *("  " + edit.strip()[1:-1].replace("\n", "\n    ") for edit in edits)])


@dataclass(frozen=True)
class Layout:
    """A drawing of a program's ids as a data URL with its width and height in pixels, or in words why there is none."""

    url: str = ""
    size: tuple[int, int] = (0, 0)
    missing: str = ""


def layout(run: Run, variant: str, prompt: str) -> Layout:
    """A variant's id layout as a picture, at the run's own size and schedule."""
    settings = run.record["settings"]
    program = json.dumps(run.record["variants"][variant]["program"])
    grid = tuple(settings[side] // settings["pixels_per_token"] for side in ("height", "width"))
    schedule = json.dumps(settings["schedule"])
    return _drawn(program, grid, settings["max_sequence_length"], prompt, settings["steps"], schedule)


@lru_cache(maxsize=256)
def _drawn(program: str, grid: tuple[int, int], text: int, prompt: str, steps: int, schedule: str) -> Layout:
    """Where a program's tokens stand, at the first step and block that it acts at. Words are counted in the prompt, one
    token each. A program that cannot be read here, for want of a plugin, has no picture."""
    from PIL import Image

    from fluxlab.drawing import token_layout as plot
    from fluxlab.sampling.schedule import Schedule

    known = {field.name for field in fields(Schedule)}
    times = Schedule(**{key: value for key, value in json.loads(schedule).items() if key in known})
    context = plot.sequence(grid=grid, text=text, prompt=prompt, steps=steps)
    context = replace(context, sigmas=tuple(times.times(steps, grid[0] * grid[1])))
    try:
        view = plot.view(json.loads(program), context)
        # how many of the blocks are double is the model's affair, which no store knows
        view = replace(view, told={key: told for key, told in view.told.items() if key != "block"})
    except UserError as error:
        return Layout(missing=str(error))
    content = io.BytesIO()
    with plot.style(plot.STYLE):
        plot.draw_layout(view).savefig(content, format="png", dpi=100)
    image = Image.open(content).convert("RGB").quantize(48, dither=Image.Dither.NONE)  # a fifth of the bytes
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return Layout(data_url(content.getvalue(), "png"), image.size)


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names what may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
