"""From the images in a store to its tables: metrics.csv, references.csv, summary.csv."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.experiment.cells import Cell, Settings, cells, references
from fluxlab.experiment.reading import METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE, read_table
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment
from fluxlab.experiment.store import CELLS, REFERENCES, Store
from fluxlab.images import read_pixels
from fluxlab.measure import registry, summary
from fluxlab.measure.registry import Sample
from fluxlab.measure.tables import table
from fluxlab.progress import Progress

if TYPE_CHECKING:
    from fluxlab.measure.similarity import Similarity

Row = dict[str, Any]

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

    Images are read from the store, one (prompt, seed) at a time, so that memory does not grow with their number. A
    cell without an image has a row without values; so has every cell whose baseline has no image.
    """
    names = metric_names(experiment)
    every_cell = cells(experiment, settings)
    by_column: dict[tuple[str, int], list[Cell]] = {}
    for cell in every_cell:
        by_column.setdefault((cell.prompt, cell.seed), []).append(cell)
    rows: dict[tuple[str, str, int], Row] = {}
    control_rows: list[Row] = []
    controls = {(cell.variant, cell.prompt): cell for cell in references(experiment, settings)}
    noise_floor, another_seed = REFERENCE_NAMES

    sample = partial(_sample, store, settings.pixels_per_token, models or {})
    with Progress("measured", len(every_cell), every=10, unit="image") as progress:
        for (prompt, seed), column in by_column.items():
            baseline = sample(column[0], CELLS)
            for cell in column:
                image = baseline if cell.key == column[0].key else sample(cell, CELLS)
                rows[cell.variant, prompt, seed] = _row(cell, names, image, baseline)
            if seed == experiment.seeds[0]:
                shifted = controls[noise_floor, prompt]
                control_rows.append(_row(shifted, names, sample(shifted, REFERENCES), baseline))
            other, folder = _other_seed(by_column, controls.get((another_seed, prompt)), prompt, seed, experiment.seeds)
            control_row = _row(other, names, sample(other, folder), baseline)
            control_rows.append(control_row | {"variant": another_seed, "seed": seed})
            progress(len(rows))
    ordered = [rows[cell.variant, cell.prompt, cell.seed] for cell in every_cell]
    control_rows.sort(key=lambda row: REFERENCE_NAMES.index(row["variant"]))
    store.write(METRICS_FILE, to_csv(ordered))
    store.write(REFERENCES_FILE, to_csv(control_rows))
    summarised = summary.summarise([*ordered, *control_rows], experiment.baseline, names)
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


def _other_seed(
    by_column: Mapping[tuple[str, int], list[Cell]],
    control: Cell | None,
    prompt: str,
    seed: int,
    seeds: Sequence[int],
) -> tuple[Cell, str]:
    """Return the baseline of the same prompt at the next seed, and its folder."""
    if control is not None:
        return control, REFERENCES
    return by_column[prompt, seeds[(seeds.index(seed) + 1) % len(seeds)]][0], CELLS


def _row(cell: Cell, names: Sequence[str], image: Sample | None, baseline: Sample | None) -> Row:
    keys = (cell.variant, cell.prompt, cell.seed, cell.program.digest, cell.key)
    if image is None or baseline is None:
        values = dict.fromkeys(names, math.nan)
    else:
        registry.check_pair(image.pixels, baseline.pixels)
        values = {name: registry.evaluate(name, image, baseline) for name in names}
    return dict(zip(KEYS, keys, strict=True)) | values


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV: numbers with 6 digits, empty for nan."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _csv_value(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
