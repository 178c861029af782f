"""The batches of an experiment, a portion of its prompts at a time, and what looking for them in a store keeps."""

import tracemalloc

import pytest

from benchmarks.scale import experiment_of
from fluxlab.engines import Inline
from fluxlab.experiment import cells as listing
from fluxlab.experiment.cells import batches, cells, references
from fluxlab.experiment.store import CELLS, REFERENCES, Store
from fluxlab.experiment.work import every_batch, lacking, survey
from fluxlab.loading import load_row


@pytest.fixture(scope="module")
def settings():
    return Inline(load_row).settle(experiment_of(100, 16), None, None, 1)


def test_a_small_experiment_has_the_batches_of_one_list(settings):
    experiment = experiment_of(300, 16)
    found = list(every_batch(experiment, settings))
    assert [batch.number for batch in found] == list(range(len(found)))
    for folder, every in ((CELLS, cells(experiment, settings)), (REFERENCES, references(experiment, settings))):
        assert [list(batch.cells) for batch in found if batch.folder == folder] == batches(every, settings)


@pytest.mark.parametrize("portion", [1, 150, 250])
def test_portions_have_every_cell_once_and_batches_that_are_as_full(settings, portion, monkeypatch):
    experiment = experiment_of(600, 16)
    whole = {(cell.key, batch.folder) for batch in every_batch(experiment, settings) for cell in batch.cells}
    monkeypatch.setattr(listing, "PORTION", portion)
    parts = list(every_batch(experiment, settings))
    keys = [(cell.key, batch.folder) for batch in parts for cell in batch.cells]
    assert (len(keys), set(keys)) == (len(whole), whole)
    assert [batch.number for batch in parts] == list(range(len(parts)))
    again = list(every_batch(experiment, settings))  # shards and resumed runs have the same numbers
    assert again == parts


def test_looking_for_images_keeps_no_cells(settings, monkeypatch, tmp_path):
    """What it holds at most grows by far less than what the cells take, about 500 bytes each."""
    monkeypatch.setattr(listing, "PORTION", 200)
    store, peaks = Store(tmp_path), []
    monkeypatch.setattr(Store, "has", lambda *_: True)
    for count in (500, 500, 2500):  # the first fills caches
        experiment = experiment_of(count, 16)
        tracemalloc.start()
        found = survey(experiment, settings, store)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.done == found.total == count + count // 100
        assert not any(found.incomplete)
    assert peaks[2] - peaks[1] < 2000 * 50


def test_images_that_no_file_has_are_counted(settings, tmp_path):
    assert lacking(experiment_of(100, 16), settings, Store(tmp_path)) == 101
