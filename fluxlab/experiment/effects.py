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
    """The similarity models that the experiment names, loaded. Raises `UserError` for one that cannot be."""
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
    by_place: dict[tuple[str, int], list[Cell]] = {}
    for cell in every:
        by_place.setdefault((cell.prompt, cell.seed), []).append(cell)
    rows: dict[tuple[str, str, int], Row] = {}
    compared: list[Row] = []
    extra = {(cell.variant, cell.prompt): cell for cell in references(experiment, settings)}
    floor, ceiling = REFERENCE_NAMES
    with Progress("measured", len(every), every=10, unit="picture") as progress:
        for (prompt, seed), here in by_place.items():
            judged = _judge(experiment, settings, similarities, read_image(store.png(here[0].key)), prompt)
            for cell in here:
                rows[cell.variant, prompt, seed] = _row(cell, judged(read_image(store.png(cell.key))))
            if seed == experiment.seeds[0]:
                cell = extra[floor, prompt]
                compared.append(_row(cell, judged(read_image(store.png(cell.key, REFERENCES)))))
            other, folder = _neighbour(by_place, extra.get((ceiling, prompt)), prompt, seed, experiment.seeds)
            judgement = judged(read_image(store.png(other.key, folder)))
            compared.append(_row(other, judgement) | {"variant": ceiling, "seed": seed})
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


def _judge(
    experiment: Experiment, settings: Settings, similarities: Sequence["Similarity"], baseline: np.ndarray, prompt: str
) -> Callable[[np.ndarray], dict[str, float]]:
    """All numbers of a picture beside this baseline, at which the oracle and the models look once."""
    found = [metrics.oracle_beside(baseline, prompt)] if experiment.model.scenes else []
    found += [similarity.beside(baseline, prompt) for similarity in similarities]

    def judged(image: np.ndarray) -> dict[str, float]:
        values = metrics.compare(image, baseline) | metrics.describe(image, settings.pixels_per_token)
        for columns in found:
            values |= columns(image)
        return values

    return judged


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
