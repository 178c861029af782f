"""`report.html`: one or several run folders as a page that loads nothing from anywhere.

The images and cells of a large run are divided into several pages, see `fluxlab.report.parts`.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from fluxlab.drawing.pictures import BUDGET, Picture, embed, note, put
from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run, read_store
from fluxlab.measure.registry import about, shown_metrics
from fluxlab.report.attention import page as attention_page
from fluxlab.report.findings import cell_values, findings, metrics_with_values
from fluxlab.report.parts import Part, divide, folder, links
from fluxlab.report.position_plot import position_plot
from fluxlab.select.masks import compact

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
CRISP = 160  # px: images up to this side are enlarged with visible pixels

Row = dict[str, Any]


def write_report(stores: "Sequence[Run | str | PathLike[str]]", file: "str | PathLike[str]") -> Path:
    """Write the page of one or several run folders, atomically. Returns the file.

    If they have more than `parts.CELLS` cells, the page shows the first prompts and links to pages of the others, in
    the folder `<name>-pages` next to it. Pages that a larger run left there are removed. The same folders give the same
    bytes. A file that already has them is not written, and no other file is. Raises UserError if no folder is given,
    one is given twice, damaged or unfinished, or an image cannot be read.
    """
    file, runs = Path(file), _read(stores)
    parts = divide(runs, file.name)
    others = file.parent / folder(file.name)
    if len(parts) > 1:
        others.mkdir(exist_ok=True)
    for n in reversed(range(len(parts))):  # the page with the links comes last
        put(file.parent / parts[n].file, _render(runs, parts, n, BUDGET).encode())
    current = {part.file for part in parts}
    for old in others.glob("[0-9]*.html"):
        if f"{others.name}/{old.name}" not in current:
            old.unlink()
    if len(parts) == 1 and others.is_dir() and not any(others.iterdir()):
        others.rmdir()
    return file


def render(stores: "Sequence[Run | str | PathLike[str]]", budget: int = BUDGET) -> str:
    """Return the page as HTML. Its images together take `budget` bytes at most and are reduced if they need more.

    Errors are those of `write_report`.
    """
    runs = _read(stores)
    return _render(runs, divide(runs, REPORT_FILE), 0, budget)


def _render(whole: Sequence[Run], parts: Sequence[Part], n: int, budget: int) -> str:
    """Return page n as HTML. Findings, programs and settings are on page 0 only."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shown = parts[n].runs(whole)
    runs = [run for _, run in shown]
    names = run_names(whole)
    titles = [names[i] for i, _ in shown]
    files = [run.image(row["variant"], row["prompt"], row["seed"]) for run in runs for row in run.metrics]
    attention = attention_page.shown(runs, titles, **({} if n == 0 else {"sheets": 0}))
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
    metrics = metrics_with_values(whole)
    title = whole[0].record["name"] if len(whole) == 1 else f"{len(whole)} runs"
    return environment.get_template("report.html.j2").render(
        title=f"{title}, {parts[n].label}" if n else title,
        pages=links(parts, n),
        main=n == 0,
        runs=[_run(i, names[i], run, embedded, n == 0) for i, run in shown],
        several=len(whole) > 1,
        metrics=[{"name": name, **about(name)._asdict()} for name in metrics],
        shown=[name for name in metrics if name in shown_metrics()] or metrics,
        findings=findings(whole, names, metrics) if n == 0 else [],
        cells=[
            {"run": name, **row, "values": cell_values(row, metrics)}
            for name, run in zip(titles, runs, strict=True)
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


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a different name for every run.

    The experiment's name; if several runs share it, with the model; if they share that too, with the experiment's
    digest; and with a number for copies of one run.
    """
    records = [run.record for run in runs]
    names = [record["name"] for record in records]
    models = [f"{record['name']}, {record['request']['model']['name']}" for record in records]
    digests = [f"{record['name']} {record['digest']}" for record in records]
    counts = [Counter(candidates) for candidates in (names, models, digests)]
    chosen = []
    for i, candidates in enumerate(zip(names, models, digests, strict=True)):
        distinct = [name for name, count in zip(candidates, counts, strict=True) if count[name] == 1]
        number = digests[: i + 1].count(digests[i])
        chosen.append(distinct[0] if distinct else f"{digests[i]} ({number})")
    return chosen


def _read(stores: "Sequence[Run | str | PathLike[str]]") -> list[Run]:
    paths = [store.path if isinstance(store, Run) else Path(store) for store in stores]
    if not paths:
        raise UserError("no run folder is named; expected at least one")
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise UserError(f"{path}: named twice; name it once")
    runs = [store if isinstance(store, Run) else read_store(store) for store in stores]
    for run in runs:
        if not run.metrics:
            raise UserError(f"{run.path}: its tables have no cells; run its command again")
    return runs


def _run(index: int, name: str, run: Run, embedded: dict[Path, Picture], programs: bool) -> Row:
    """Return what the template shows of one run; without `programs`, no position plots."""
    record, settings = run.record, run.record["settings"]
    prompts = list(dict.fromkeys(prompt for prompt, _ in run.places))
    request = record["request"]  # of all cells, also those on other pages
    counts = (
        (len(run.variants), "variant"),
        (len(request["prompts"]), "prompt"),
        (len(request["seeds"]), "seed"),
    )
    return {
        "id": f"run-{index}",
        "name": name,
        "caption": record["caption"],
        "command": record["command"],
        "about": [
            " × ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts),
            f"{settings['width']} × {settings['height']} px",
            f"{settings['steps']} step{'' if settings['steps'] == 1 else 's'}",
            f"model {request['model']['name']}",
        ],
        "baseline": run.baseline,
        "prompts": [(prompt, sum(p == prompt for p, _ in run.places)) for prompt in prompts],
        "seeds": [seed for _, seed in run.places],
        "rows": [
            {
                "variant": variant,
                "about": run.describe(variant),
                "digest": record["variants"][variant]["digest"],
                "yaml": program_yaml(variant, compact(record["variants"][variant]["program"], digests=True)),
                "plot": position_plot(run, variant, prompts[0]) if programs else None,
                "cells": [
                    {"prompt": prompt, "seed": seed, "picture": embedded.get(run.image(variant, prompt, seed))}
                    for prompt, seed in run.places
                ],
            }
            for variant in run.variants
        ],
        "settings": [(key.replace("_", " "), _text(value)) for key, value in settings.items() if value is not None],
        "versions": [(key, _text(value)) for key, value in record["versions"].items()],
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if not key.startswith("_"))
    return str(value)


def program_yaml(variant: str, program: Row) -> str:
    """Return a program as it is written in an experiment, one line per edit."""
    name = yaml.safe_dump({variant: {}}, allow_unicode=True, default_flow_style=False).removesuffix(" {}\n")
    if not program:
        return f"{name} {{}}"
    edits = [
        yaml.safe_dump({key: edit}, sort_keys=False, allow_unicode=True, default_flow_style=True, width=88)
        for key, edit in program.items()
    ]
    return "\n".join([name, *("  " + edit.strip()[1:-1].replace("\n", "\n    ") for edit in edits)])


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash by which a content security policy allows a script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
