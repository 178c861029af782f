"""The figure of layer and step roles: its numbers are the run folder's and the file's."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

import fluxlab
from experiments import results, roles
from tests.stores import make_store

BLOCKS = {f"none_{b}": {"a": {"op": "drop", "side": "keys", "tokens": "all", "blocks": b}} for b in (0, 3, 5)}
WINDOWS = {
    "high": {"a": {"op": "zero", "steps": {"sigma": [0.5, 1]}}},
    "low": {"a": {"op": "zero", "steps": {"sigma": [0, 0.5]}}},
    "always": {"a": {"op": "zero"}},
}


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("roles") / "run", BLOCKS, seeds=(0, 1), name="layers")


def scores(store, file, **changes):
    run = fluxlab.read_run(store)
    change = {name: [-10.0 * i - n for n in range(len(run.places))] for i, name in enumerate(run.variants[1:])}
    found = {"experiment": run.record["digest"], "sigma": 0.5, "places": run.places, "change": change}
    file.write_text(json.dumps({**found, "evaluations": 12, "naive": 24, **changes}))
    return file


def test_blocks_with_one_step(layers, tmp_path):
    file, run = scores(layers, tmp_path / "one.json"), fluxlab.read_run(layers)
    first, again = ({f.name: f.read_bytes() for f in roles.make(run, tmp_path / at, file)} for at in "ab")
    assert first == again
    assert len(first) == 5
    found, change = roles.roles(run), roles.read_scores(run, file)
    assert [(role.where, role.block) for role in found] == [("0", 0), ("3", 3), ("5", 5)]
    psnr, velocity = roles.draw(run, found, change, roles.PAGE).axes
    shown = results.effects(run, "psnr")
    assert list(psnr.lines[0].get_ydata()) == [shown[name][0] for name in BLOCKS]
    assert list(velocity.lines[0].get_ydata()) == [-1.5, -11.5, -21.5]
    rank = roles.correlation(run, found, change)
    errors = [np.mean([run.cell(name, *place)["rmse"] ** 2 for place in run.places]) for name in BLOCKS]
    assert rank.value == spearmanr(errors, [-1.5, -11.5, -21.5]).statistic
    assert rank.low <= rank.value <= rank.high
    text = first["layers-roles.txt"].decode()
    assert "12 of 24 block evaluations (0.50)" in text
    assert "one step -11.5 [" in text


def test_windows_of_steps(tmp_path):
    run = fluxlab.read_run(make_store(tmp_path / "run", WINDOWS, seeds=(0,), name="windows"))
    found = roles.roles(run)
    assert [(role.where, role.block) for role in found] == [("σ 1–0.5", None), ("σ 0.5–0", None), ("all", None)]
    (axes,) = roles.draw(run, found, None, roles.COLUMN).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["σ 1–0.5", "σ 0.5–0", "all"]
    assert "high (zero on image, σ 1–0.5)" in roles.caption(run, found, None)


@pytest.mark.parametrize("change", [{"experiment": "other"}, {"places": []}, {"change": {}}])
def test_scores_of_another_run(layers, tmp_path, change, capsys):
    file = scores(layers, tmp_path / "one.json", **change)
    assert roles.main([str(layers), "--one-step", str(file), "-o", str(tmp_path)]) == 2
    assert "one.json: of experiment" in capsys.readouterr().err


def test_runs_that_it_refuses(tmp_path, capsys):
    store = make_store(tmp_path / "run", seeds=(0,))
    assert roles.main([str(store), "-o", str(tmp_path)]) == 2
    assert "in the same blocks and steps" in capsys.readouterr().err
    assert roles.main([str(store), "--one-step", str(tmp_path / "no.json")]) == 2
