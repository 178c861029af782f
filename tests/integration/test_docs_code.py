"""The Python blocks of README.md and docs/from-python.md run as they are, in order."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def run_blocks(page: Path) -> dict:
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if not block.startswith("# needs the weights"):
            exec(compile(block, page.name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme():
    names = run_blocks(ROOT / "README.md")
    unchanged, half = names["images"]
    assert unchanged.size == (64, 64)
    assert unchanged.tobytes() != half.tobytes()


def test_from_python(folder):
    pytest.importorskip("xarray", reason="the page needs the extra probes: pip install fluxlab[probes]")
    names = run_blocks(ROOT / "docs" / "from-python.md")
    assert Image.open(folder / "cat.png").tobytes() == names["images"][0].tobytes()
    assert names["unchanged"].tobytes() != names["edited"].tobytes()
    assert names["labelled"].sizes["row"] == names["labelled"].sizes["col"] == 16
    first, again = (np.asarray(image, float) for image in (names["images"][0], names["restored"]))
    assert abs(first - again).mean() < 10 < abs(first - names["images"][1]).mean()
    assert names["image"].size == (64, 64)
    assert [row["seed"] for row in names["table"]] == [0, 1]
    assert names["effects"]
    assert (folder / "my-flux" / "model_index.json").is_file()
    assert (folder / "my-flux.safetensors").is_file()
