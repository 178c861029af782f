"""`make gpu`, tried out at small sizes on the CPU: its table, its file, and parts that fail or take too long."""

import argparse
import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_models import TINY, arguments, diffusers_twin, random_flux, their_call
from benchmarks.gpu_parts import difference


def options(folder, budget=60.0):
    return argparse.Namespace(budget=budget, out=folder, tiny=True, device="cpu", parts=None)


def written(folder) -> dict:
    (file,) = folder.glob("gpu-*.json")
    return json.loads(file.read_text())


def python(code: str, share: float = 1, rows: bool = True) -> gpu.Part:
    return gpu.Part([sys.executable, "-c", code], share, rows)


def test_a_dry_run(tmp_path, capfd):
    assert gpu.main(["--tiny", "--device", "cpu", "--budget", "500", "--out", str(tmp_path)]) == 0
    report, printed = written(tmp_path), capfd.readouterr().out
    assert list(report["parts"]) == list(gpu.parts(options(tmp_path)))
    assert {part["outcome"] for part in report["parts"].values()} == {"ok"}
    assert report["machine"]["torch"] == torch.__version__
    assert {row["part"] for row in report["rows"]} == {"card", "forward", "maps", "limit 24 GB", "compiled"}
    for row in report["rows"]:
        assert row["result"] in printed
        if "ratio" in row:
            assert row["ratio"] > 0
        assert row.get("equal", True)
        assert row.get("error", 0) < 1e-4  # the same weights, in fp32


def test_a_failure_and_a_timeout_do_not_stop_the_rest(tmp_path, capfd):
    row = "import json; print(json.dumps({'case': 'a', 'result': 'b', 'x': 1}), flush=True); "
    chosen = {
        "works": python(row),
        "fails": python(row + "raise ValueError('no such kernel')"),
        "hangs": python(row + "import time; time.sleep(60)", share=0.1),
        "lines": python("print('one'); print('3 passed')", rows=False),
    }
    assert gpu.measure(options(tmp_path, budget=40), chosen) == 1
    report, printed = written(tmp_path), capfd.readouterr().out
    outcomes = {name: part["outcome"] for name, part in report["parts"].items()}
    assert outcomes == {"works": "ok", "fails": "failed", "hangs": "out of time", "lines": "ok"}
    assert [row["part"] for row in report["rows"]] == ["works", "fails", "hangs"]
    assert report["parts"]["lines"]["text"] == "3 passed"
    assert "ValueError: no such kernel" in report["parts"]["fails"]["text"]
    assert "no such kernel" in printed


def test_what_no_time_is_left_for_is_reported(tmp_path, capfd):
    assert gpu.measure(options(tmp_path, budget=0), {"late": python("print(1)")}) == 1
    assert written(tmp_path)["parts"]["late"]["text"] == "not started"
    assert "out of time" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cpu"], "--tiny"),
        (["--tiny", "--device", "cpu", "--parts", "forwrad"], "forwrad"),
        pytest.param(
            [], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_wrong_use_exits_with_2(arguments, expected, capsys):
    with pytest.raises(SystemExit) as exit_:
        gpu.main(arguments)
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err


@torch.inference_mode()
def test_the_twin_shares_the_weights():
    flux = random_flux(TINY, "cpu")
    twin, given = diffusers_twin(flux), arguments(TINY, 2, "cpu")
    assert difference(flux(*given), their_call(twin, given)()) < 1e-5
    ours = {p.untyped_storage().data_ptr() for p in flux.parameters()}
    copied = [name for name, p in twin.named_parameters() if p.untyped_storage().data_ptr() not in ours]
    assert all(name.startswith("norm_out") for name in copied)  # its halves are in the other order
