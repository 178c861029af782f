"""Read a finished store: where reports, figures and trackers begin. Nothing here writes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.errors import UserError
from fluxlab.experiment.manifest import Manifest
from fluxlab.experiment.rows import Row, choose, read_table
from fluxlab.experiment.store import CELLS, EXPERIMENT, read_experiment
from fluxlab.images import open_image
from fluxlab.measure import summary
from fluxlab.measure.summary import Effect
from fluxlab.probes import INDEX, Captured, index, load

if TYPE_CHECKING:
    from PIL import Image

METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE = "metrics.csv", "references.csv", "summary.csv"


@dataclass(frozen=True)
class Run:
    """A finished store. Made by `read_run`.

    record: the content of experiment.yaml. metrics: one row per cell, the baseline first, then variants as listed,
    prompts, seeds; `table` is another name for it. references: the rows of the two controls. summary: one row per
    variant and metric, with the columns of `fluxlab.measure.summary.CSV_COLUMNS`. A row maps a column to text, a
    whole number or a float, nan for no value; `pandas.DataFrame(run.table)` makes a data frame of them.
    """

    path: Path
    record: Row
    metrics: Sequence[Row]
    references: Sequence[Row]
    summary: Sequence[Row]

    @property
    def table(self) -> Sequence[Row]:
        """The rows of metrics.csv, one per cell."""
        return self.metrics

    @cached_property
    def variants(self) -> list[str]:
        """Names of the variants in order, the baseline first."""
        return list(dict.fromkeys(row["variant"] for row in self.metrics))

    @property
    def baseline(self) -> str:
        """Name of the baseline."""
        return self.variants[0]

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """Every (prompt, seed) in order: the columns of the grid."""
        return list(dict.fromkeys((row["prompt"], row["seed"]) for row in self.metrics))

    @cached_property
    def _rows(self) -> "_Numbers":
        return _Numbers(self)

    def cell(self, variant: str, prompt: str, seed: int) -> Row:
        """Return a cell's row of metrics. Raises `KeyError` for a cell that the experiment does not have."""
        return self.metrics[self._rows[variant, prompt, seed]]

    @cached_property
    def images(self) -> dict[tuple[str, str, int], Path]:
        """The image file of every cell, by (variant, prompt, seed). A file may be missing if its cell failed."""
        return {key: self.image(*key) for key in self._rows}

    def image(self, variant: str, prompt: str, seed: int) -> Path:
        """Return the path of a cell's image. Raises `KeyError` for a cell that the experiment does not have."""
        return self.path / CELLS / f"{self.cell(variant, prompt, seed)['cell']}.png"

    def open(self, variant: str, prompt: str, seed: int) -> "Image.Image":
        """Return a cell's image, a PIL image in RGB.

        Raises `KeyError` for a cell that the experiment does not have and `UserError` for a file that is missing or
        damaged.
        """
        return open_image(self.image(variant, prompt, seed), remedy="run the command of this store again")

    @cached_property
    def effects(self) -> list[Effect]:
        """Every metric of every variant and control, comparable with the baseline at equal prompt and seed.

        In the order of `summary`. See `fluxlab.measure.summary.Effect`: value, low, high, difference, n, missing.
        """
        return summary.effects(self.summary, self.baseline)

    @cached_property
    def attention(self) -> list[Row]:
        """One row per cell with captured attention: variant, prompt, seed, cell, file. Empty without a capture.

        `captured` returns the arrays of one cell, `fluxlab.probes.read(run.path)` those of all cells.
        """
        return (index(self.path) or {"cells": []})["cells"]

    def captured(self, variant: str, prompt: str, seed: int) -> dict[str, Captured]:
        """Return the attention arrays of a cell by the names of the requests.

        Raises `KeyError` for a cell that was not captured, and `UserError` for a run without a capture and for a file
        that is missing or damaged.
        """
        if not self.attention:
            raise UserError(f"{self.path}: no attention was captured; run its command again with capture=words")
        return load(self.path / self._array_files[variant, prompt, seed])

    @cached_property
    def _array_files(self) -> dict[tuple[str, str, int], str]:
        return {(row["variant"], row["prompt"], row["seed"]): row["file"] for row in self.attention}

    def part(self, places: range) -> "Run":
        """Return a run with the cells of some of `places`. Controls and summary stay those of all.

        places: their numbers.
        """
        rows = (self._rows[variant, *self.places[p]] for variant in self.variants for p in places)
        part = replace(self, metrics=choose(self.metrics, rows))
        attention = (self._captured_at.get(self.places[p], ()) for p in places) if self.attention else ()
        part.__dict__["attention"] = [self.attention[i] for i in sorted(chain.from_iterable(attention))]
        return part

    @cached_property
    def _captured_at(self) -> dict[tuple[str, int], list[int]]:
        """The numbers of the rows of `attention` of every (prompt, seed)."""
        found: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(self.attention):
            found.setdefault((row["prompt"], row["seed"]), []).append(i)
        return found

    def describe(self, variant: str) -> str:
        """Return a variant's program in one line."""
        return self.record["variants"][variant]["describe"]


class _Numbers(Mapping[tuple[str, str, int], int]):
    """The number of the row of every (variant, prompt, seed).

    Rows are in the experiment's order: every place of the first variant, then of the next. Their numbers are computed
    from that, since a large run has millions of cells.
    """

    def __init__(self, run: Run):
        self._variants = {variant: n for n, variant in enumerate(run.variants)}
        self._places = {place: n for n, place in enumerate(run.places)}
        if len(run.metrics) != len(self):
            raise UserError(f"{run.path / METRICS_FILE}: {len(run.metrics)} rows, expected {len(self)}; run it again")

    def __getitem__(self, key: tuple[str, str, int]) -> int:
        variant, *place = key
        return self._variants[variant] * len(self._places) + self._places[tuple(place)]

    def __len__(self) -> int:
        return len(self._variants) * len(self._places)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        return ((variant, *place) for variant in self._variants for place in self._places)


def read_run(folder: "str | PathLike[str]") -> Run:
    """Read a finished store: images, tables, summary, attention.

        run = fluxlab.read_run("runs/article/3f2a…")
        run.variants, run.places                        # names; every (prompt, seed)
        run.open("half", *run.places[0])                # a PIL image
        pandas.DataFrame(run.table)                     # one row per cell
        [e for e in run.effects if e.metric == "word"]  # baseline + paired difference, with n
        run.captured("half", *run.places[0])["words"]   # attention, if the run has capture=words

    Raises `UserError` if the folder is not a store, is not finished, or a table is not the file that the manifest
    lists, because it was cut or changed.
    """
    return read_store(Path(folder))


def read_store(path: "str | PathLike[str]", check: bool = True) -> Run:
    """Read a store as `read_run` does. check: compare the tables with the manifest, which a run writes last."""
    path = Path(path)
    record = read_experiment(path)
    names = (METRICS_FILE, REFERENCES_FILE, SUMMARY_FILE)
    if check and all((path / name).exists() for name in names):  # without its tables a run is not finished
        captured = (INDEX,) if (path / INDEX).exists() else ()
        manifest = Manifest(path)
        for name in (EXPERIMENT, *names, *captured):
            problem = manifest.changed(name)
            if problem:
                raise UserError(f"{path / name}: {problem}; run the command of this store again")
    tables = [read_table(path / name) for name in names]
    metrics, references, rows = tables
    if metrics:
        rows = summary.complete(rows, lambda: [*metrics, *references], metrics[0]["variant"])
    return Run(path, record, metrics, references, rows)
