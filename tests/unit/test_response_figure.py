"""The figure of several edits over their amounts: kinds, similarity by hand, numbers of the run folder."""

import math

import pytest

import fluxlab
from experiments import response, results
from fluxlab.positions import Program
from tests.stores import make_store

VARIANTS = {
    "half": {"a": {"op": "scale", "factor": 0.5}},
    "double": {"a": {"op": "scale", "factor": 2}},
    "row_4": {"a": {"op": "offset", "by": {"row": 4}}},
    "row_16": {"a": {"op": "offset", "by": {"row": 16}}},
    "zero": {"a": {"op": "zero"}},
    "turn": {"a": {"op": "rotate", "degrees": 30}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("response") / "run", VARIANTS, seeds=(0,), name="doses")
    return fluxlab.read_run(store)


def test_kinds_and_files(run, tmp_path):
    first, again = ({f.name: f.read_bytes() for f in response.make([run], tmp_path / at, "ssim")} for at in "ab")
    assert first == again
    assert len(first) == 5
    families = response.read_families([run])
    assert {name: [dose.amount for dose in doses] for name, doses in families.items()} == {
        "scale (factor)": [0.5, 2.0],
        "offset row (tokens)": [4.0, 16.0],
    }
    panel = response.draw([run], families, "ssim", response.PAGE).axes[0]
    shown = results.effects(run, "ssim")
    assert list(panel.lines[0].get_ydata()) == [shown["half"][0], shown["double"][0]]
    assert "scale (factor) 0.5: " in first["doses-response.txt"].decode()


@pytest.mark.parametrize(("factor", "distance"), [(1, 1), (0.5, 0.5), (2, 2), (0, 0)])
def test_similarity_by_hand(run, factor, distance):
    """Of the two rotated axes of 28 channels, a neighbour differs on one."""
    angles = [distance * 10000 ** (-2 * i / 28) for i in range(14)]
    expected = (sum(map(math.cos, angles)) + 14) / 28
    program = Program.from_config({"a": {"op": "scale", "factor": factor}})
    assert response.axes_of(run) == ((8, 28, 28), 10000)
    assert response.similarity(program, run, (8, 28, 28), 10000) == pytest.approx(expected, abs=1e-6)


def test_runs_that_it_refuses(run, tmp_path, capsys):
    store = make_store(tmp_path / "run", {"zero": VARIANTS["zero"]}, seeds=(0,))
    assert response.main([str(store), "-o", str(tmp_path)]) == 2
    assert "no two variants have one edit in different amounts" in capsys.readouterr().err
    other = make_store(tmp_path / "large", VARIANTS, seeds=(0,), size=(96, 96))
    assert response.main([str(run.path), str(other), "-o", str(tmp_path)]) == 2
    assert "different models, sizes or steps" in capsys.readouterr().err
