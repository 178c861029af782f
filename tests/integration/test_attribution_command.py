"""`python -m fluxlab.attribution`: its table is that of the functions, it continues, and its plan counts the sites."""

import csv

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.attribution import of_gains, with_gains
from fluxlab.gradients import sharpness
from fluxlab.learning import read_attribution
from fluxlab.learning.attribute import main
from fluxlab.learning.bands import BANDS
from fluxlab.sampling import Sampling

COMMON = ["+exp=hello", "steps=1", "seeds=2", "dtype=float32", "threads=1", "objective=sharpness"]
PROMPT = "A cat holding a sign that says hello world"


def test_the_table_is_the_mean_over_cells_and_a_stopped_command_continues(tmp_path, capsys):
    assert main([*COMMON, f"out={tmp_path}"]) == 0
    capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "attribution.csv").open()))
    assert len(rows) == 6 * 3 * 3  # blocks, heads, axes
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32)
    found = of_gains(pipe, [PROMPT] * 2, [0, 1], sharpness(), settings=Sampling(steps=1)).values[0]
    row = next(r for r in rows if (r["block"], r["head"], r["axis"]) == ("2", "0", "row"))
    assert float(row["effect"]) == pytest.approx(-found[2, 0, 4:18].sum(), rel=1e-3)
    files = sorted(tmp_path.glob("cell-*.safetensors"))
    assert len(files) == 2
    first, table, figure = (
        files[0].stat().st_mtime_ns,
        *((tmp_path / f"attribution.{x}").read_bytes() for x in ("csv", "png")),
    )
    files[1].unlink()
    assert main([*COMMON, f"out={tmp_path}"]) == 0
    assert files[0].stat().st_mtime_ns == first
    assert (tmp_path / "attribution.csv").read_bytes() == table
    assert (tmp_path / "attribution.png").read_bytes() == figure
    assert main([*COMMON, "steps=2", f"out={tmp_path}"]) == 2
    assert "holds another attribution" in capsys.readouterr().err


def test_bands_are_left_out_one_by_one(tmp_path):
    """The change of the score is that of an edit with a gain of 0, and what one backward predicts is in the table."""
    words = ["+exp=hello", "steps=1", "prompts=[a red fox on the left]", "dtype=float32", "threads=1", "ablate=3"]
    assert main([*words, "objective=sharpness", f"out={tmp_path}"]) == 0
    found = read_attribution(tmp_path)
    predicted, measured = found.values("predicted")[0], found.values("measured")[0]
    labels = {key: found.array("measured").coords[key][1] for key in ("block", "head", "axis", "wavelength")}
    gains, n = found.array("gains"), 0
    axis, waves = (np.array(gains.coords[key][1]) for key in ("axis", "wavelength"))
    low, high = BANDS[labels["wavelength"][n]]
    pairs = np.flatnonzero((axis == labels["axis"][n]) & (waves >= low) & (waves < high))
    block, head = labels["block"][n], labels["head"][n]
    assert predicted[n] == pytest.approx(-gains.values[0, block, head, pairs].sum(), rel=1e-5)
    first = int(np.flatnonzero(axis == labels["axis"][n])[0])
    edit = {"op": "gain", "factor": 0, "axes": labels["axis"][n], "blocks": [block], "heads": [head]}
    pipe, how = fluxlab.load_pipeline("tiny", dtype=torch.float32), {"settings": Sampling(steps=1)}
    one = torch.ones(1, 6, 3, 32)
    scores = [
        with_gains(pipe, ["a red fox on the left"], [0], sharpness(), [one], program=program, **how).item()
        for program in (None, {"a": {**edit, "pairs": (pairs - first).tolist()}})
    ]
    assert measured[n] == pytest.approx(scores[1] - scores[0], rel=1e-2, abs=1e-7)
    rows = list(csv.DictReader((tmp_path / "attribution.csv").open()))
    assert {row["array"] for row in rows} == {"gains"}
    assert found.record["settings"]["device"] == "cpu"
    assert found.record["command"].startswith("python -m fluxlab.attribution +exp=hello steps=1")


def test_the_plan_of_flux(capsys):
    assert main(["+exp=hello", "model=schnell", "plan=true"]) == 0
    printed = capsys.readouterr().out
    assert "350,208 a cell: 4 steps × 57 blocks × 1,536" in printed
    assert "activations computed again" in printed
    assert main(["+exp=attribution", "model=schnell", "plan=true", "seeds=1"]) == 0
    # 4 prompts × 4 steps × (200 bands, the image itself, the unchanged model, one backward)
    assert "3,248 forwards of one cell, 16 of them with gradients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["patches=[keyz]", "source=baseline"], "patches: 'keyz', expected some of input"),
        (["patches=[keys]"], "patches: add source=<variant>"),
        (["source=baseline"], "source: add patches=[keys, values]"),
        (["variant=foo"], "variant=foo: no such variant, there are baseline"),
        (["objective=foo"], "objective=foo: there is none"),
        (["objective=place"], "objective=place: 'A cat holding a sign that says hello world' names no side"),
        (["ablate=-1"], "ablate=-1: expected at least 0"),
        (["ablate=2", "patches=[keys]", "source=baseline"], "ablate=2: leave out patches, which are no bands"),
    ],
)
def test_errors(words, message, capsys):
    assert main([*COMMON, *words]) == 2
    assert message in capsys.readouterr().err
