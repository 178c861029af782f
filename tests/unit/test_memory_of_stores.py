"""What is kept in memory of a store does not grow with its cells."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fluxlab.config import ModelRow
from fluxlab.experiment import effects, runner
from fluxlab.experiment.cells import Settings
from fluxlab.experiment.outlook import outlook
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.spec import Experiment, checked, read_variants
from fluxlab.experiment.store import Store, open_store
from fluxlab.experiment.work import every_batch, unused_images
from fluxlab.measure import registry
from tests import stores

VARIANTS, SEEDS = 25, 4
FEW, MANY = 300, 2000
GROWTH = 230_000
"""Bytes: 135 per cell. A row, a cell or the names of its files take more. With such small portions, the lists of
waiting files take up to 90.
"""


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    """Few cells at a time, so that a store of `FEW` cells is a large one, and metrics that take no time."""
    monkeypatch.setattr("fluxlab.experiment.cells.PORTION", 10)
    monkeypatch.setattr("fluxlab.experiment.rows.IN_MEMORY", 1 << 12, raising=False)
    monkeypatch.setattr("fluxlab.files.AT_ONCE", 512, raising=False)
    monkeypatch.setattr(effects, "read_pixels", lambda file: np.zeros((16, 16, 3), np.uint8))
    monkeypatch.setattr(registry, "evaluate", lambda name, image, baseline: 0.5)


def experiment(cells: int) -> Experiment:
    dose = {f"x{i}": {"a": {"op": "scale", "factor": 1 + i / 16}} for i in range(1, VARIANTS)}
    return checked(
        Experiment(
            name="large",
            model=ModelRow("tiny", "fluxlab/assets/tiny"),
            model_digest="0" * 16,
            variants=read_variants({"baseline": {}, **dose}),
            prompts=tuple(f"prompt {i}" for i in range(cells // VARIANTS // SEEDS)),
            seeds=tuple(range(SEEDS)),
        )
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[int, Path]:
    """Sealed stores of `FEW` and of `MANY` cells, with empty images."""
    return {cells: make(tmp_path_factory.mktemp("large"), cells) for cells in (FEW, MANY)}


def make(folder: Path, cells: int) -> Path:
    asked, how = experiment(cells), stores.settings((16, 16))
    with open_store(folder) as store:
        store.write_experiment(asked, how, stores.VERSIONS, "")
        for batch in every_batch(asked, how):
            (folder / batch.folder).mkdir(exist_ok=True)
            for cell in batch.cells:
                store.png(cell.key, batch.folder).touch()
                store.png(cell.key, batch.folder).with_suffix(".json").write_text(json.dumps({"variant": cell.variant}))
        effects.measure(asked, how, store)  # tables without values: no image is complete
        store.seal()
    return folder


def peak(work: Callable[[], object]) -> int:
    """Return the most bytes that are allocated while `work` runs."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def experiment_of(store: Store) -> tuple[Experiment, Settings]:
    prompts = len(store.record["request"]["prompts"])
    return experiment(prompts * VARIANTS * SEEDS), stores.settings((16, 16))


def begin(store: Store) -> None:
    asked, how = experiment_of(store)
    pipe = mock.NonCallableMock(pixels_per_token=4)
    pipe.check = pipe.text.check = lambda *_, **__: None  # which keep no record of their calls
    with mock.patch("fluxlab.experiment.runner.check_kernel"):
        runner.check(asked, pipe, how)


def changed(store: Store) -> None:
    """Count the images of an experiment that is replaced by one with other seeds."""
    asked, how = experiment_of(store)
    other = replace(asked, seeds=(*asked.seeds[1:], 7))
    assert f"{len(asked.prompts) * VARIANTS} images" in unused_images(other, how, store)


def read(store: Store) -> None:
    run = read_store(store.path, check=False)
    assert sum(len(run.part(range(p, p + SEEDS)).metrics) for p in range(0, len(run.places), SEEDS)) == len(run.metrics)
    assert not any(row["ssim"] == 1 for row in run.metrics)


STAGES: dict[str, Callable[[Store], object]] = {
    "begin": begin,
    "plan": lambda store: outlook(*experiment_of(store), store),
    "changed": changed,
    "measure": lambda store: effects.measure(*experiment_of(store), store),
    "read": read,
    "seal": Store.seal,
}


@pytest.mark.parametrize("stage", STAGES)
def test_memory_does_not_grow_with_cells(large, stage):
    least: dict[int, int] = {}
    for cells in (MANY, FEW) * 3:  # the first time fills caches, and Python's table of strings is resized at any time
        with open_store(large[cells]) as store:
            assert store.manifest.problem == ""
            found = peak(lambda store=store: STAGES[stage](store))
        least[cells] = min(found, least.get(cells, found))
        if cells == FEW and least[MANY] - least[FEW] < GROWTH:
            return
    raise AssertionError(f"{stage}: {least}")
