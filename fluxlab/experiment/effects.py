"""From the images in a store to its tables: metrics.csv, references.csv, summary.csv."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.experiment.cells import Cell, Settings, cells, references
from fluxlab.experiment.reading import METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE
from fluxlab.experiment.rows import Records, Row, Rows, read_table
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
    available |= {kind for kind in ("clip", "dino") if getattr(experiment, kind)}
    return registry.columns(available | {part for one in experiment.inputs for part in one.hashes} - {"image"})


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

    Images are read from the store, one (prompt, seed) at a time. The numbers wait in a temporary file, because the
    tables are in another order. A cell without an image has a row without values; so has every cell whose baseline has
    no image.
    """
    names = metric_names(experiment)
    prompts, seeds = len(experiment.prompts), len(experiment.seeds)
    of_cells, of_floor = len(experiment.variants) * prompts * seeds, prompts
    records = Records([*KEYS, *names])  # the rows of metrics.csv, then those of references.csv
    noise_floor, another_seed = REFERENCE_NAMES
    sample = partial(_sample, store, settings.pixels_per_token, models or {})
    with Progress("measured", of_cells, every=10, unit="image") as progress:
        for p, prompt in enumerate(experiment.prompts):
            listed = cells(experiment, settings, [prompt])  # all seeds of the first variant, then of the next
            controls = {cell.variant: cell for cell in references(experiment, settings, [prompt])}
            for s, seed in enumerate(experiment.seeds):
                column = listed[s::seeds]
                baseline = sample(column[0], CELLS)
                for v, cell in enumerate(column):
                    image = baseline if cell.key == column[0].key else sample(cell, CELLS)
                    records.put((v * prompts + p) * seeds + s, _row(cell, names, image, baseline))
                if s == 0:
                    shifted = controls[noise_floor]
                    row = _row(shifted, names, sample(shifted, REFERENCES), baseline)
                    records.put(of_cells + p, row)
                other, folder = controls.get(another_seed), REFERENCES
                if other is None:  # the baseline of the same prompt at the next seed
                    other, folder = listed[(s + 1) % seeds], CELLS
                row = _row(replace(other, variant=another_seed, seed=seed), names, sample(other, folder), baseline)
                records.put(of_cells + of_floor + p * seeds + s, row)
                progress((p * seeds + s + 1) * len(column))
    rows = Rows(records, range(len(records)))
    store.write(METRICS_FILE, to_csv(rows[:of_cells]))
    store.write(REFERENCES_FILE, to_csv(rows[of_cells:]))
    store.write(SUMMARY_FILE, summary.to_csv(summary.summarise(rows, experiment.baseline, names)))


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
    pixels = read_pixels(store.png(cell.key, folder))
    return Sample(pixels, cell.prompt, pixels_per_token, models, cell.inputs.open if cell.inputs else None)


def _row(cell: Cell, names: Sequence[str], image: Sample | None, baseline: Sample | None) -> list[Any]:
    """Return the values of a row: those of `KEYS`, then the metrics, nan where there is no value."""
    keys = [cell.variant, cell.prompt, cell.seed, cell.program.digest, cell.key]
    if image is None or baseline is None:
        return [*keys, *[math.nan] * len(names)]
    registry.check_pair(image.pixels, baseline.pixels)
    return [*keys, *(registry.evaluate(name, image, baseline) for name in names)]


def to_csv(rows: Sequence[Row]) -> Iterator[str]:
    """Yield rows as CSV, some at a time: numbers with 6 digits, empty for nan."""
    for start in range(0, len(rows), 100):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if start == 0:
            writer.writeheader()
        for i in range(start, min(start + 100, len(rows))):
            writer.writerow({key: _csv_value(value) for key, value in rows[i].items()})
        yield text.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
