"""From the images in a store to its tables: metrics.csv, references.csv, summary.csv."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxlab.experiment.cells import Cell, Settings, cells, references
from fluxlab.experiment.reading import METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE
from fluxlab.experiment.rows import Row, read_table
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment
from fluxlab.experiment.store import CELLS, REFERENCES, Store
from fluxlab.images import read_pixels
from fluxlab.measure import registry, summary
from fluxlab.measure.registry import Sample
from fluxlab.measure.tables import table
from fluxlab.progress import Progress

if TYPE_CHECKING:
    from fluxlab.measure.similarity import Similarity

KEYS = ("variant", "prompt", "seed", "digest", "cell")
"""Columns of metrics.csv and references.csv before the metrics."""

FILES = (METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE)


def load_models(experiment: Experiment) -> dict[str, "Similarity"]:
    """Load the similarity models that the experiment names, by kind. Raises `UserError` if one cannot be loaded."""
    named = {kind: getattr(experiment, kind) for kind in ("clip", "dino") if getattr(experiment, kind)}
    if not named:
        return {}
    from fluxlab.measure.similarity import Similarity

    return {kind: Similarity(checkpoint, kind) for kind, checkpoint in named.items()}


def metric_names(experiment: Experiment) -> list[str]:
    """Return the metrics that a run of the experiment measures, in the order of the columns."""
    available = {"scenes"} if experiment.model.scenes else set()
    return registry.columns(available | {kind for kind in ("clip", "dino") if getattr(experiment, kind)})


def measured(experiment: Experiment, store: Store) -> bool:
    """Return whether the store's tables have the columns that this version writes.

    A metric that was added to a finished run, and a table of an older release, give False.
    """
    expected = {
        METRICS_FILE: [*KEYS, *metric_names(experiment)],
        REFERENCES_FILE: [*KEYS, *metric_names(experiment)],
        SUMMARY_FILE: list(summary.CSV_COLUMNS),
    }
    return all(_header(store.path / name) == columns for name, columns in expected.items())


def _header(file: Path) -> list[str]:
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            return next(csv.reader(handle), [])
    except (OSError, ValueError, csv.Error):
        return []


def measure(
    experiment: Experiment, settings: Settings, store: Store, models: Mapping[str, "Similarity"] | None = None
) -> None:
    """Compute every metric of every cell and control and write the three tables.

    Images are read from the store, one (prompt, seed) at a time: of a cell only its numbers stay in memory. A cell
    without an image has a row without values; so has every cell whose baseline has no image.
    """
    names = metric_names(experiment)
    every_cell = cells(experiment, settings)
    by_column: dict[tuple[str, int], list[int]] = {}
    for i, cell in enumerate(every_cell):
        by_column.setdefault((cell.prompt, cell.seed), []).append(i)
    table_of_cells = _Table(every_cell, names)
    control_rows: list[Row] = []
    controls = {(cell.variant, cell.prompt): cell for cell in references(experiment, settings)}
    noise_floor, another_seed = REFERENCE_NAMES

    sample = partial(_sample, store, settings.pixels_per_token, models or {})
    with Progress("measured", len(every_cell), every=10, unit="image") as progress:
        done = 0
        for (prompt, seed), column in by_column.items():
            first = every_cell[column[0]]
            baseline = sample(first, CELLS)
            for i in column:
                image = baseline if every_cell[i].key == first.key else sample(every_cell[i], CELLS)
                table_of_cells.values[i] = _values(names, image, baseline)
            if seed == experiment.seeds[0]:
                shifted = controls[noise_floor, prompt]
                control_rows.append(_row(shifted, names, _values(names, sample(shifted, REFERENCES), baseline)))
            other, folder = controls.get((another_seed, prompt)), REFERENCES
            if other is None:  # the baseline of the same prompt at the next seed
                following = experiment.seeds[(experiment.seeds.index(seed) + 1) % len(experiment.seeds)]
                other, folder = every_cell[by_column[prompt, following][0]], CELLS
            control_row = _row(other, names, _values(names, sample(other, folder), baseline))
            control_rows.append(control_row | {"variant": another_seed, "seed": seed})
            done += len(column)
            progress(done)
    control_rows.sort(key=lambda row: REFERENCE_NAMES.index(row["variant"]))
    store.write(METRICS_FILE, to_csv(table_of_cells))
    store.write(REFERENCES_FILE, to_csv(control_rows))
    table_of_cells.more = control_rows
    summarised = summary.summarise(table_of_cells, experiment.baseline, names)
    store.write(SUMMARY_FILE, summary.to_csv(summarised))


def show(store: Store, baseline: str) -> None:
    """Print the summary as a table."""
    from rich.console import Console

    console = Console()
    width = console.width if console.is_terminal else 120
    rows = read_table(store.path / SUMMARY_FILE)
    Console(width=width).print(table(rows, width=width, baseline=baseline))


def _sample(
    store: Store, pixels_per_token: int, models: Mapping[str, "Similarity"], cell: Cell, folder: str
) -> Sample | None:
    """Return a cell's image for the metrics; None if the store does not have it."""
    if not store.has(cell, folder):
        return None
    return Sample(read_pixels(store.png(cell.key, folder)), cell.prompt, pixels_per_token, models)


class _Table(Sequence[Row]):
    """The rows of metrics.csv, made when they are asked for: numbers are kept in an array, a large run has millions.

    values: one row per cell, nan where there is no value. more: rows that follow those of the cells.
    """

    def __init__(self, every_cell: Sequence[Cell], names: Sequence[str]):
        self.cells, self.names, self.more = every_cell, names, []
        self.values = np.full((len(every_cell), len(names)), math.nan)

    def __len__(self) -> int:
        return len(self.cells) + len(self.more)

    def __getitem__(self, i: int) -> Row:
        if i < len(self.cells):
            return _row(self.cells[i], self.names, self.values[i].tolist())
        return self.more[i - len(self.cells)]


def _values(names: Sequence[str], image: Sample | None, baseline: Sample | None) -> list[float]:
    if image is None or baseline is None:
        return [math.nan] * len(names)
    registry.check_pair(image.pixels, baseline.pixels)
    return [registry.evaluate(name, image, baseline) for name in names]


def _row(cell: Cell, names: Sequence[str], values: Sequence[float]) -> Row:
    keys = (cell.variant, cell.prompt, cell.seed, cell.program.digest, cell.key)
    return dict(zip((*KEYS, *names), (*keys, *values), strict=True))


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV: numbers with 6 digits, empty for nan."""
    parts = []
    for start in range(0, len(rows), 1000):  # a StringIO takes 4 bytes per character
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if start == 0:
            writer.writeheader()
        for i in range(start, min(start + 1000, len(rows))):
            writer.writerow({key: _csv_value(value) for key, value in rows[i].items()})
        parts.append(text.getvalue())
    return "".join(parts)


def _csv_value(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
