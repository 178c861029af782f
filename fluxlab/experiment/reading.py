"""A finished store, read: where reports, figures and trackers begin. Nothing in here writes."""

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxlab.errors import UserError
from fluxlab.experiment.store import CELLS, read_experiment
from fluxlab.measure import summary
from fluxlab.measure.summary import Effect
from fluxlab.probes import Captured, index, load

METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE = "metrics.csv", "references.csv", "summary.csv"
_TEXT = ("variant", "prompt", "digest", "cell", "metric")
_WHOLE = ("seed", "n", "paired_n")


@dataclass(frozen=True)
class Run:
    """A store's tables. metrics, references and summary are rows: column → text, whole number or float (nan: none).

    record is `experiment.yaml`; metrics has a row a cell, the baseline first, then variants as listed, prompts, seeds.
    """

    path: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    references: list[dict[str, Any]]
    summary: list[dict[str, Any]]

    @cached_property
    def variants(self) -> list[str]:
        """Names in order, the baseline first."""
        return list(dict.fromkeys(row["variant"] for row in self.metrics))

    @property
    def baseline(self) -> str:
        return self.variants[0]

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """(prompt, seed) in order."""
        return list(dict.fromkeys((row["prompt"], row["seed"]) for row in self.metrics))

    @cached_property
    def _cells(self) -> dict[tuple[str, str, int], dict[str, Any]]:
        return {(row["variant"], row["prompt"], row["seed"]): row for row in self.metrics}

    def cell(self, variant: str, prompt: str, seed: int) -> dict[str, Any]:
        """A cell's row of metrics. `KeyError` for one that the experiment does not have."""
        return self._cells[variant, prompt, seed]

    def image(self, variant: str, prompt: str, seed: int) -> Path:
        """Where a cell's picture lies."""
        return self.path / CELLS / f"{self.cell(variant, prompt, seed)['cell']}.png"

    @cached_property
    def attention(self) -> list[dict[str, Any]]:
        """A row a cell, in the order of metrics: variant, prompt, seed, cell, file. Empty without a capture."""
        return (index(self.path) or {"cells": []})["cells"]

    def captured(self, variant: str, prompt: str, seed: int) -> dict[str, Captured]:
        """What was captured of a cell, by the names of the requests. `KeyError` for one that was not.

        Raises `UserError` for a run without a capture, and for a file that is missing or damaged.
        """
        if not self.attention:
            raise UserError(f"{self.path}: nothing of attention was captured; run its command again with capture=words")
        return load(self.path / self._captured[variant, prompt, seed])

    @cached_property
    def _captured(self) -> dict[tuple[str, str, int], str]:
        return {(row["variant"], row["prompt"], row["seed"]): row["file"] for row in self.attention}

    @cached_property
    def effects(self) -> list[Effect]:
        """Every metric of every variant and control, comparable with the baseline at equal prompt and seed.

        In the order of `summary`. See `fluxlab.measure.summary.Effect`: value, low, high, difference, n, missing.
        """
        return summary.effects(self.summary, self.baseline)

    def describe(self, variant: str) -> str:
        """A variant's program in one line."""
        return self.record["variants"][variant]["describe"]


def read_store(path: "str | Path") -> Run:
    """Raises `UserError` for a folder that is no store, is damaged, or has not come to its numbers yet."""
    path = Path(path)
    record = read_experiment(path)
    metrics, references, rows = (read_table(path / name) for name in (METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE))
    if metrics:
        rows = summary.complete(rows, [*metrics, *references], metrics[0]["variant"])
    return Run(path, record, metrics, references, rows)


def read_table(file: Path) -> list[dict[str, Any]]:
    """The rows of one of a store's CSV files."""
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            return [{key: _value(key, value) for key, value in row.items()} for row in csv.DictReader(handle)]
    except FileNotFoundError:
        raise UserError(f"{file}: not there; the run is not finished: run its command again") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it and run the command again") from error


def _value(key: str, text: str) -> Any:
    if key in _TEXT:
        return text
    return int(text) if key in _WHOLE else float(text) if text else math.nan
