"""What experiments that load a model themselves share: their words, means and captions."""

import importlib
import math

import pytest

from experiments import standalone
from fluxlab.errors import UserError

ROWS = [
    {"variant": name, "prompt": "a", "seed": seed, "right": float(right), "only": only, "never": math.nan}
    for name, right, only in (("first", 1, math.nan), ("second", 0, 2.0))
    for seed in range(3)
]


def test_means():
    found = standalone.means(ROWS, "first", ("right", "only", "never", "of another model"))
    assert found["first"] == {"right": {"n": 3, "mean": 1, "low": 1, "high": 1, "first": 1}}
    paired = {"paired_mean": -1, "paired_low": -1, "paired_high": -1}
    assert found["second"]["right"] == {"n": 3, "mean": 0, "low": 0, "high": 0, "first": 0} | paired
    assert set(found["second"]) == {"right", "only"}
    assert standalone.measure_lines(found, {"right": "right ones", "only": "those of one", "never": "of none"}) == [
        "right ones:",
        "  first: 1 [1, 1], n = 3",
        "  second: 0 [0, 0], Δ -1 [-1, -1], n = 3",
        "those of one:",
        "  second: 2 [2, 2], n = 3",
    ]


def test_steps_of_embedded_models_and_of_others():
    steps = {}
    for words in ([], ["steps=3"], ["model.scenes=false"], ["dtype=bfloat16"]):
        loaded = standalone.load(["device=cpu", *words], 8, "the command")
        steps[" ".join(words)] = loaded.steps
    assert steps == {"": 8, "steps=3": 3, "model.scenes=false": 20, "dtype=bfloat16": 8}
    assert loaded.record["dtype"] == "bfloat16"
    assert loaded.conditions.startswith("Model tiny (digest ")
    assert ", 8 steps, model's size 64 × 64 px, bfloat16 on cpu. fluxlab " in loaded.conditions
    assert loaded.conditions.endswith(": the command")


@pytest.mark.parametrize("name", ["inpaint", "upscale"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=2"], "seeds=2: expected key=value with one of the keys model, lora, "),
        (["stpes=2"], "did you mean steps?"),
        (["tiny"], "tiny: expected key=value"),
        (["steps=few"], "steps: 'few', expected a whole number"),
        (["model=tinny"], "model=tinny: there is none; did you mean tiny?"),
        (["--model", "tiny"], "unrecognized arguments: --model"),
    ],
)
def test_wrong_words(name, words, message, tmp_path, capsys):
    module = importlib.import_module(f"experiments.{name}")
    assert module.main([*words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_scenes_fit_square_models_only():
    loaded = standalone.load(["device=cpu", "model.size=[128,128]"], 8, "")
    assert loaded.scale(64) == 2
    wide = standalone.load(["device=cpu", "model.size=[64,128]"], 8, "")
    with pytest.raises(UserError, match=r"model.size=\[64, 128\]: the scenes need a square"):
        wide.scale(64)
