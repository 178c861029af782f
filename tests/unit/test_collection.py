"""Garbage collection waits for the imports of a run, and no longer."""

import gc
import sys

import pytest

from fluxlab import run


@pytest.fixture
def of_this_process(monkeypatch):
    """Return a function that runs `python -m fluxlab.run` in this process."""

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fluxlab.run", *words])
        return run.main()

    yield call
    gc.unfreeze()


def test_collection_is_off_during_the_imports_of_a_run_only(of_this_process, monkeypatch):
    seen = {}
    composed, read = run.compose, run.read
    monkeypatch.setattr(run, "compose", lambda *a, **k: (seen.update(compose=gc.isenabled()), composed(*a, **k))[1])
    monkeypatch.setattr(run, "read", lambda *a, **k: (seen.update(read=gc.isenabled()), read(*a, **k))[1])
    assert of_this_process("+exp=hello", "plan=true") == 0
    assert seen == {"compose": False, "read": True}
    assert gc.isenabled()


@pytest.mark.parametrize("words", [["--help"], ["+exp=nothing"]])
def test_collection_is_on_after_a_command_without_a_run(of_this_process, words, capsys):
    of_this_process(*words)
    assert gc.isenabled()


def test_a_callers_process_is_left_alone(capsys):
    before = gc.get_freeze_count()
    assert run.main(["+exp=hello", "plan=true"]) == 0
    assert gc.get_freeze_count() == before
