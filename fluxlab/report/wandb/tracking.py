"""What a run logs to W&B: its progress, and at its end the contents of the finished store."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxlab.errors import UserError, unknown_key
from fluxlab.experiment.reading import Run
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import MANIFEST
from fluxlab.measure.registry import METRICS
from fluxlab.measure.summary import decibels, error_of
from fluxlab.report.attention import pictures as attention
from fluxlab.report.position_plot import position_plot
from fluxlab.report.products import GRID_FILE
from fluxlab.report.wandb.link import Link, is_tracked

PROJECT, JOB_TYPE = "fluxlab", "run"
MODES = ("online", "offline", "disabled")
SETTINGS = {
    "name": "none or wandb",
    "project": "a name",
    "entity": "a name",
    "tags": "a list of words",
    "job_type": "a word",
    "mode": f"{', '.join(MODES)} or null",
    "artifact": "true or false",
    "seconds": "a number above 0",
}
EVERY = 5  # s between two messages about progress
PARTING = 15  # s that a failed run waits for W&B


class Tracker:
    """The W&B run of a run, or nothing. As a context manager it reports the run as failed if an error leaves it."""

    def __init__(self, link: Link | None, settings: Mapping[str, Any]):
        self.link, self.settings, self.sent = link, settings, -math.inf

    def progress(self, done: int, total: int) -> None:
        """Log how many images are finished, every `EVERY` seconds and at the end. Never waits."""
        if self.link and (time.monotonic() - self.sent >= EVERY or done == total):
            self.sent = time.monotonic()
            self.link.send({"log": {"progress/pictures": done, "progress/share": done / max(1, total)}})

    def finish(self, read: Callable[[], Run]) -> None:
        """Log a finished store and wait for W&B, at most `seconds` of the settings. It is read only if it is logged."""
        if self.link:
            self.link.close(messages(read(), bool(self.settings.get("artifact"))))
            self.link = None

    def failed(self) -> None:
        """Report the run as failed."""
        if self.link:
            self.link.close(exit_code=1, seconds=min(PARTING, self.link.seconds))
            self.link = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        self.failed()  # has no effect after finish()


def start(settings: Mapping[str, Any], store: Path, experiment: Experiment, command: str = "") -> Tracker:
    """Open a W&B run for an experiment in the run folder `store`. Returns at once.

    settings: a file of `configs/tracking`; see `checked`. A store that W&B already has gets no second run, except under
    the agent of a sweep, which waits for one. A sweep sets id, project and entity itself.
    """
    settings = checked(settings)
    request = config(experiment)
    mark = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
    if settings.get("name") != "wandb" or (is_tracked(store, mark) and "WANDB_SWEEP_ID" not in os.environ):
        return Tracker(None, settings)
    link = Link(
        store,
        init_arguments(settings, experiment, os.environ),
        {**request, "command": command},
        command,
        settings.get("mode"),
        settings.get("seconds") or 120,
        mark,
    )
    return Tracker(link, settings)


def checked(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings. Raises UserError for an unknown key or a value of the wrong type."""
    for key, value in settings.items():
        if key not in SETTINGS:
            raise unknown_key("tracking", key, value, SETTINGS, "key of tracking")
        fits = {
            "name": value in ("none", "wandb"),
            "tags": isinstance(value, Sequence) and all(isinstance(tag, str) for tag in value),
            "mode": value is None or value in MODES,
            "artifact": isinstance(value, bool),
            "seconds": isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf,
        }.get(key, value is None or isinstance(value, str))
        if not fits or (isinstance(value, str) and key == "tags"):
            raise UserError(f"tracking.{key}={value}: expected {SETTINGS[key]}")
    return settings


def init_arguments(
    settings: Mapping[str, Any], experiment: Experiment, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return project, group, name and so on for `wandb.init`.

    The settings come first, then W&B's own environment variables, then fluxlab's defaults.
    """
    defaults = {
        "project": ("WANDB_PROJECT", PROJECT),
        "group": ("WANDB_RUN_GROUP", experiment.name),
        "job_type": ("WANDB_JOB_TYPE", JOB_TYPE),
        "name": ("WANDB_NAME", f"{experiment.name}-{experiment.digest[:6]}"),
        "tags": ("WANDB_TAGS", [experiment.model.name]),
    }
    chosen = {key: value for key, (variable, value) in defaults.items() if variable not in environment}
    chosen |= {key: settings[key] for key in ("project", "entity", "job_type") if settings.get(key)}
    if settings.get("tags"):
        chosen["tags"] = [experiment.model.name, *settings["tags"]]
    if "WANDB_SWEEP_ID" in environment:
        chosen = {key: value for key, value in chosen.items() if key not in ("project", "entity")}
    return chosen


def config(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as W&B's config."""
    return {"digest": experiment.digest, **experiment.request()}


def messages(run: Run, artifact: bool = False) -> list[dict[str, Any]]:
    """Return the messages that log a finished store. The metrics that a sweep reads come first."""
    logged = [
        {"config": {key: run.record[key] for key in ("settings", "versions")}},
        {"summary": {**summary(run), **attention.summary(run)}},
        {"tables": {"variants": variant_table(run), "cells": cell_table(run)}},
        {"images": images(run)},
    ]
    animations = attention.pictures(run).gifs
    if animations:
        logged.append({"videos": {"attention/steps": [(_path(file), caption) for file, caption in animations]}})
    if artifact:
        logged.append({"artifact": store_artifact(run)})
    return logged


def summary(run: Run) -> dict[str, float]:
    """Return `metric.<variant>.<metric>` of every variant and control, and `metric.<metric>`, the mean over variants.

    Values are those of `Run.effects`: the baseline plus the paired difference, or the mean of a comparison. The mean
    over variants leaves out the baseline, unless it is the only variant. Values that are not finite are left out.
    """
    means = {(effect.variant, effect.metric): effect.value for effect in run.effects}
    values_by_key = {f"metric.{variant}.{metric}": mean for (variant, metric), mean in means.items()}
    compared = [variant for variant in run.variants if variant != run.baseline] or [run.baseline]
    for metric in dict.fromkeys(metric for _, metric in means):
        values = [
            means[variant, metric] for variant in compared if not math.isnan(means.get((variant, metric), math.nan))
        ]
        if values:
            values_by_key[f"metric.{metric}"] = pooled(metric, values)
    return {key: value for key, value in values_by_key.items() if math.isfinite(value)}


def pooled(metric: str, values: Sequence[float]) -> float:
    """Return the mean of a metric over variants; for psnr that of squared errors, as within a variant."""
    if metric != "psnr":
        return math.fsum(values) / len(values)
    return decibels(math.fsum(map(error_of, values)) / len(values))


def variant_table(run: Run) -> dict[str, Any]:
    """Return `summary.csv` with the meaning of each metric."""
    columns = list(run.summary[0])
    rows = [
        [
            *(_plain(row[column]) for column in columns),
            METRICS[row["metric"]].meaning if row["metric"] in METRICS else "",
        ]
        for row in run.summary
    ]
    return {"columns": [*columns, "meaning"], "rows": rows}


def cell_table(run: Run) -> dict[str, Any]:
    """Return one row per cell: its image, the baseline's image, its metrics."""
    columns = [column for column in run.metrics[0] if column != "cell"]
    rows = [
        [
            {"image": _path(run.image(row["variant"], row["prompt"], row["seed"]))},
            {"image": _path(run.image(run.baseline, row["prompt"], row["seed"]))},
            *(_plain(row[column]) for column in columns),
        ]
        for row in run.metrics
    ]
    return {"columns": ["picture", "baseline", *columns], "rows": rows}


def images(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Return (file or data URL, caption) by key: the grid, position plots, images of each variant, attention."""
    logged = {"grid": [(_path(run.path / GRID_FILE), run.record["caption"] or run.record["name"])]}
    plots = {variant: position_plot(run, variant, run.places[0][0], "png").url for variant in run.variants}
    if any(plots.values()):
        logged["layouts"] = [(url, f"{variant}: {run.describe(variant)}") for variant, url in plots.items() if url]
    for variant in run.variants:
        logged[f"pictures/{variant}"] = [
            (_path(run.image(variant, prompt, seed)), f"{prompt} · seed {seed}") for prompt, seed in run.places
        ]
    drawn = attention.pictures(run)
    for key, files in (("sheets", drawn.sheets), ("figures", drawn.figures)):
        if files:
            logged[f"attention/{key}"] = [(_path(file), caption) for file, caption in files]
    return logged


def store_artifact(run: Run) -> dict[str, Any]:
    """Return the store as an artifact with the files of its manifest."""
    listed = [json.loads(line)["file"] for line in (run.path / MANIFEST).read_text(encoding="utf-8").splitlines()]
    name = f"{run.record['name']}-{run.record['digest']}"
    return {"name": name, "type": "store", "files": [(_path(run.path / file), file) for file in [*listed, MANIFEST]]}


def _path(file: Path) -> str:
    return str(file.resolve())


def _plain(value: Any) -> Any:
    """Return a value for a table of W&B, which cannot show infinite numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
