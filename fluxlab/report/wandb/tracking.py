"""What W&B is told of a run: progress while it goes, everything else from the finished store."""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxlab.errors import UserError
from fluxlab.experiment.reading import Run
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import MANIFEST
from fluxlab.measure.registry import METRICS
from fluxlab.report.attention import pictures as attention
from fluxlab.report.position_plot import position_plot
from fluxlab.report.products import GRID_FILE
from fluxlab.report.wandb.link import Link, tracked

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
EVERY = 5  # s between two words about progress
PARTING = 15  # s that a run which failed waits for W&B to hear of it


class Tracker:
    """A run's W&B run, or nothing. Used as a context: leaving it by an error reports the run as failed."""

    def __init__(self, link: Link | None, settings: Mapping[str, Any]):
        self.link, self.settings, self.said = link, settings, -math.inf

    def pictures(self, done: int, total: int) -> None:
        """So many of the pictures are there. Never waits."""
        if self.link and (time.monotonic() - self.said >= EVERY or done == total):
            self.said = time.monotonic()
            self.link.say({"log": {"progress/pictures": done, "progress/share": done / max(1, total)}})

    def finish(self, run: Run) -> None:
        """Log a finished store, and wait until it is done, no longer than `seconds` of the settings."""
        if self.link:
            self.link.close(messages(run, bool(self.settings.get("artifact"))))
            self.link = None

    def failed(self) -> None:
        """Report the run as failed."""
        if self.link:
            self.link.close(exit_code=1, seconds=min(PARTING, self.link.seconds))
            self.link = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        self.failed()  # unless it was finished


def start(settings: Mapping[str, Any], store: Path, experiment: Experiment, command: str = "") -> Tracker:
    """Open a W&B run for an experiment whose pictures go into the folder `store`. Returns at once.

    settings: a file of `configs/tracking`; see `checked`. None is opened for a store that W&B has already, but under a
    sweep's agent, which waits for one. There id, project and entity are the sweep's.
    """
    settings = checked(settings)
    told = config(experiment)
    mark = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    if settings.get("name") != "wandb" or (tracked(store, mark) and "WANDB_SWEEP_ID" not in os.environ):
        return Tracker(None, settings)
    link = Link(
        store,
        names(settings, experiment, os.environ),
        {**told, "command": command},
        command,
        settings.get("mode"),
        settings.get("seconds") or 120,
        mark,
    )
    return Tracker(link, settings)


def checked(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings. Raises `UserError` naming the key, its value, and what to do."""
    for key, value in settings.items():
        if key not in SETTINGS:
            raise UserError(f"tracking.{key}: there is no such key; known: {', '.join(SETTINGS)}")
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


def names(settings: Mapping[str, Any], experiment: Experiment, environment: Mapping[str, str]) -> dict[str, Any]:
    """Project, group and the like, for `wandb.init`: the settings', else those of W&B's own variables, else ours."""
    ours = {
        "project": ("WANDB_PROJECT", PROJECT),
        "group": ("WANDB_RUN_GROUP", experiment.name),
        "job_type": ("WANDB_JOB_TYPE", JOB_TYPE),
        "name": ("WANDB_NAME", f"{experiment.name}-{experiment.digest[:6]}"),
        "tags": ("WANDB_TAGS", [experiment.model.name]),
    }
    found = {key: value for key, (variable, value) in ours.items() if variable not in environment}
    found |= {key: settings[key] for key in ("project", "entity", "job_type") if settings.get(key)}
    if settings.get("tags"):
        found["tags"] = [experiment.model.name, *settings["tags"]]
    if "WANDB_SWEEP_ID" in environment:
        found = {key: value for key, value in found.items() if key not in ("project", "entity")}
    return found


def config(experiment: Experiment) -> dict[str, Any]:
    """What was asked for, as W&B's config."""
    return {"digest": experiment.digest, **experiment.request()}


def messages(run: Run, artifact: bool = False) -> list[dict[str, Any]]:
    """Everything there is to log of a finished store; what a sweep looks for comes first."""
    told = [
        {"config": {key: run.record[key] for key in ("settings", "versions")}},
        {"summary": {**summary(run), **attention.summary(run)}},
        {"tables": {"variants": variant_table(run), "cells": cell_table(run)}},
        {"images": images(run)},
    ]
    films = attention.pictures(run).gifs
    if films:
        told.append({"videos": {"attention/steps": [(_path(file), caption) for file, caption in films]}})
    if artifact:
        told.append({"artifact": store_artifact(run)})
    return told


def summary(run: Run) -> dict[str, float]:
    """`metric.<name>`: the mean over all variants but the baseline; `metric.<variant>.<name>`: a variant's.

    The references are variants, too. A store with nothing but the baseline has its means under both. Values that are no
    finite numbers are left out.
    """
    means = {(row["variant"], row["metric"]): row["mean"] for row in run.summary}
    found = {f"metric.{variant}.{metric}": mean for (variant, metric), mean in means.items()}
    compared = [variant for variant in run.variants if variant != run.baseline] or [run.baseline]
    for metric in dict.fromkeys(metric for _, metric in means):
        values = [
            means[variant, metric] for variant in compared if not math.isnan(means.get((variant, metric), math.nan))
        ]
        if values:
            found[f"metric.{metric}"] = pooled(metric, values)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def pooled(metric: str, values: Sequence[float]) -> float:
    """The mean of a metric's means; of psnr as of squared errors, as within a variant."""
    if metric != "psnr":
        return math.fsum(values) / len(values)
    error = math.fsum(10 ** (-value / 10) for value in values) / len(values)
    return -10 * math.log10(error) if error else math.inf


def variant_table(run: Run) -> dict[str, Any]:
    """`summary.csv`, with what a metric is."""
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
    """A row a cell: its picture, the baseline's, and its metrics."""
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
    """Files, or data URLs, and captions by key: the grid, where tokens stand, a variant's pictures, attention."""
    found = {"grid": [(_path(run.path / GRID_FILE), run.record["caption"] or run.record["name"])]}
    layouts = {variant: position_plot(run, variant, run.places[0][0]).url for variant in run.variants}
    if any(layouts.values()):
        found["layouts"] = [(url, f"{variant}: {run.describe(variant)}") for variant, url in layouts.items() if url]
    for variant in run.variants:
        found[f"pictures/{variant}"] = [
            (_path(run.image(variant, prompt, seed)), f"{prompt} · seed {seed}") for prompt, seed in run.places
        ]
    seen = attention.pictures(run)
    for key, some in (("sheets", seen.sheets), ("figures", seen.figures)):
        if some:
            found[f"attention/{key}"] = [(_path(file), caption) for file, caption in some]
    return found


def store_artifact(run: Run) -> dict[str, Any]:
    """The store as its manifest lists it."""
    listed = [json.loads(line)["file"] for line in (run.path / MANIFEST).read_text(encoding="utf-8").splitlines()]
    name = f"{run.record['name']}-{run.record['digest']}"
    return {"name": name, "type": "store", "files": [(_path(run.path / file), file) for file in [*listed, MANIFEST]]}


def _path(file: Path) -> str:
    return str(file.resolve())


def _plain(value: Any) -> Any:
    """A table's cell; W&B shows no infinite numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
