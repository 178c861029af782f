"""What the variants do, in numbers: from the pictures in a store to its tables."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fluxlab.experiment.cells import Cell, Settings, cells, references
from fluxlab.experiment.reading import METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE, read_table
from fluxlab.experiment.spec import REFERENCE_NAMES, Experiment
from fluxlab.experiment.store import CELLS, REFERENCES, Store
from fluxlab.measure import images as metrics
from fluxlab.measure import summary as statistics
from fluxlab.progress import Progress

if TYPE_CHECKING:
    from fluxlab.measure.similarity import Similarity

Row = dict[str, Any]

_KEYS = ("variant", "prompt", "seed", "digest", "cell")
FILES = (METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE)


def judges(experiment: Experiment) -> list["Similarity"]:
    """The similarity models that the experiment names, loaded. Raises `ValueError` for one that cannot be."""
    named = [(kind, getattr(experiment, kind)) for kind in ("clip", "dino")]
    if not any(checkpoint for _, checkpoint in named):
        return []
    from fluxlab.measure.similarity import Similarity

    return [Similarity(checkpoint, kind) for kind, checkpoint in named if checkpoint]


def measure(experiment: Experiment, settings: Settings, store: Store, similarities: Sequence["Similarity"]) -> None:
    """Write metrics.csv, references.csv and summary.csv.

    The pictures are read from the store, one (prompt, seed) at a time, so memory does not grow with their number.
    """
    every = cells(experiment, settings)
    compare = _comparer(experiment, settings, similarities)
    by_place: dict[tuple[str, int], list[Cell]] = {}
    for cell in every:
        by_place.setdefault((cell.prompt, cell.seed), []).append(cell)
    rows: dict[tuple[str, str, int], Row] = {}
    compared: list[Row] = []
    extra = {(cell.variant, cell.prompt): cell for cell in references(experiment, settings)}
    floor, ceiling = REFERENCE_NAMES
    with Progress("measured", len(every), every=10, unit="picture") as progress:
        for (prompt, seed), here in by_place.items():
            baseline = read_image(store.png(here[0].key))
            for cell in here:
                rows[cell.variant, prompt, seed] = _row(
                    cell, compare(read_image(store.png(cell.key)), baseline, prompt)
                )
            if seed == experiment.seeds[0]:
                cell = extra[floor, prompt]
                shifted = read_image(store.png(cell.key, REFERENCES))
                compared.append(_row(cell, compare(shifted, baseline, prompt)))
            other, folder = _neighbour(by_place, extra.get((ceiling, prompt)), prompt, seed, experiment.seeds)
            there = read_image(store.png(other.key, folder))
            compared.append(_row(other, compare(there, baseline, prompt)) | {"variant": ceiling, "seed": seed})
            progress(len(rows))
    ordered = [rows[cell.variant, cell.prompt, cell.seed] for cell in every]
    compared.sort(key=lambda row: REFERENCE_NAMES.index(row["variant"]))
    store.write(METRICS_FILE, to_csv(ordered))
    store.write(REFERENCES_FILE, to_csv(compared))
    names = list(dict.fromkeys(key for row in ordered for key in row if key not in _KEYS))
    summary = statistics.summarise([*ordered, *compared], experiment.baseline, names)
    store.write(SUMMARY_FILE, statistics.to_csv(summary))


def show(store: Store) -> None:
    """Print the summary as a table."""
    from rich.console import Console

    console = Console()
    width = console.width if console.is_terminal else 120
    Console(width=width).print(statistics.table(read_table(store.path / SUMMARY_FILE), width=width))


def _neighbour(
    by_place: dict[tuple[str, int], list[Cell]], extra: Cell | None, prompt: str, seed: int, seeds: Sequence[int]
) -> tuple[Cell, str]:
    """The baseline of the same prompt at the next seed, and the folder that it lies in."""
    if extra is not None:
        return extra, REFERENCES
    return by_place[prompt, seeds[(seeds.index(seed) + 1) % len(seeds)]][0], CELLS


def _comparer(
    experiment: Experiment, settings: Settings, similarities: Sequence["Similarity"]
) -> Callable[[np.ndarray, np.ndarray, str], dict[str, float]]:
    """All numbers of a picture, given the baseline's and the prompt."""

    def compare(image: np.ndarray, baseline: np.ndarray, prompt: str) -> dict[str, float]:
        values = metrics.compare(image, baseline) | metrics.describe(image, settings.pixels_per_token)
        if experiment.model.scenes:
            values |= metrics.oracle_columns(image, prompt) | metrics.oracle_compare(image, baseline, prompt)
        for similarity in similarities:
            values |= similarity.columns([image], [baseline], [prompt])[0]
        return values

    return compare


def _row(cell: Cell, values: dict[str, float]) -> Row:
    return {
        "variant": cell.variant,
        "prompt": cell.prompt,
        "seed": cell.seed,
        "digest": cell.program.digest,
        "cell": cell.key,
        **values,
    }


def read_image(file: Path) -> np.ndarray:
    """uint8 `(H, W, 3)`."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV: numbers with 6 digits, nothing where there is no number."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _shown(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
