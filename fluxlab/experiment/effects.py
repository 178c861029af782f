"""From the images in a store to its tables: metrics.csv, references.csv, summary.csv."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
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
    rows = _Table(experiment, names)
    control_rows: list[Row] = []
    noise_floor, another_seed = REFERENCE_NAMES
    sample = partial(_sample, store, settings.pixels_per_token, models or {})
    with Progress("measured", len(rows), every=10, unit="image") as progress:
        done = 0
        for prompt in experiment.prompts:
            of_seed: dict[int, list[Cell]] = {}
            for cell in cells(experiment, settings, [prompt]):
                of_seed.setdefault(cell.seed, []).append(cell)
            controls = {cell.variant: cell for cell in references(experiment, settings, [prompt])}
            for n, (seed, column) in enumerate(of_seed.items()):
                baseline = sample(column[0], CELLS)
                for cell in column:
                    image = baseline if cell.key == column[0].key else sample(cell, CELLS)
                    rows.put(cell, _values(names, image, baseline))
                if n == 0:
                    shifted = controls[noise_floor]
                    control_rows.append(_row(shifted, names, _values(names, sample(shifted, REFERENCES), baseline)))
                other, folder = controls.get(another_seed), REFERENCES
                if other is None:  # the baseline of the same prompt at the next seed
                    other, folder = of_seed[experiment.seeds[(n + 1) % len(experiment.seeds)]][0], CELLS
                control_row = _row(other, names, _values(names, sample(other, folder), baseline))
                control_rows.append(control_row | {"variant": another_seed, "seed": seed})
                done += len(column)
                progress(done)
    control_rows.sort(key=lambda row: REFERENCE_NAMES.index(row["variant"]))
    store.write(METRICS_FILE, to_csv(rows))
    store.write(REFERENCES_FILE, to_csv(control_rows))
    rows.more = control_rows
    summarised = summary.summarise(rows, experiment.baseline, names)
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
    """The rows of metrics.csv in the experiment's order, made when they are asked for: a large run has millions.

    Of a cell only its numbers and 16 bytes of its key are kept. more: rows that follow those of the cells.
    """

    def __init__(self, experiment: Experiment, names: Sequence[str]):
        self.variants = experiment.names
        self.digests = [experiment.variants[name].digest for name in self.variants]
        self.prompts, self.seeds, self.names, self.more = experiment.prompts, experiment.seeds, names, []
        shape = len(self.variants), len(self.prompts), len(self.seeds)
        self.places = [{value: i for i, value in enumerate(part)} for part in (self.variants, self.prompts, self.seeds)]
        self.values = np.full((*shape, len(names)), math.nan)
        self.keys = np.zeros((*shape, 16), np.uint8)

    def put(self, cell: Cell, values: Sequence[float]) -> None:
        """Keep a cell's numbers, nan where there is no value."""
        parts = zip(self.places, (cell.variant, cell.prompt, cell.seed), strict=True)
        place = tuple(places[value] for places, value in parts)
        self.values[place] = values
        self.keys[place] = list(bytes.fromhex(cell.key))

    def __len__(self) -> int:
        return self.values[..., 0].size + len(self.more)

    def __getitem__(self, i: int) -> Row:
        shape = self.keys.shape[:-1]
        if i >= math.prod(shape):
            return self.more[i - math.prod(shape)]
        v, p, s = place = tuple(map(int, np.unravel_index(i, shape)))
        keys = self.variants[v], self.prompts[p], self.seeds[s], self.digests[v], self.keys[place].tobytes().hex()
        return dict(zip((*KEYS, *self.names), (*keys, *self.values[place].tolist()), strict=True))


def _values(names: Sequence[str], image: Sample | None, baseline: Sample | None) -> list[float]:
    if image is None or baseline is None:
        return [math.nan] * len(names)
    registry.check_pair(image.pixels, baseline.pixels)
    return [registry.evaluate(name, image, baseline) for name in names]


def _row(cell: Cell, names: Sequence[str], values: Sequence[float]) -> Row:
    keys = (cell.variant, cell.prompt, cell.seed, cell.program.digest, cell.key)
    return dict(zip((*KEYS, *names), (*keys, *values), strict=True))


def to_csv(rows: Sequence[Row]) -> Iterator[str]:
    """Yield rows as CSV, some at a time: numbers with 6 digits, empty for nan."""
    for start in range(0, len(rows), 1000):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if start == 0:
            writer.writeheader()
        for i in range(start, min(start + 1000, len(rows))):
            writer.writerow({key: _csv_value(value) for key, value in rows[i].items()})
        yield text.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
