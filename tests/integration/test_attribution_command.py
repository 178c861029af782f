"""`python -m fluxlab.attribution`: its table is that of the functions, it continues, and its plan counts the sites."""

import csv

import pytest
import torch

import fluxlab
from fluxlab.attribution import of_gains
from fluxlab.gradients import sharpness
from fluxlab.learning.attribute import main
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


def test_the_plan_of_flux(capsys):
    assert main(["+exp=hello", "model=schnell", "plan=true"]) == 0
    printed = capsys.readouterr().out
    assert "350,208 a cell: 4 steps × 57 blocks × 1,536" in printed
    assert "activations computed again" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["patches=[keyz]", "source=baseline"], "patches: 'keyz', expected some of input"),
        (["patches=[keys]"], "patches: add source=<variant>"),
        (["source=baseline"], "source: add patches=[keys, values]"),
        (["variant=foo"], "variant=foo: no such variant, there are baseline"),
        (["objective=foo"], "objective=foo: there is none"),
    ],
)
def test_errors(words, message, capsys):
    assert main([*COMMON, *words]) == 2
    assert message in capsys.readouterr().err
