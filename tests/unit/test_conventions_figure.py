"""The figure of the conventions: its numbers are the committed ones, which belong to the recipes."""

import csv
import json

import pytest
from omegaconf import OmegaConf
from PIL import Image

from benchmarks.conventions import CONVENTIONS, EDITS
from experiments import conventions
from experiments.style import command
from fluxlab.config import config_folder
from fluxlab.positions import Program

RESULTS = json.loads(conventions.RESULTS.read_text())


def test_files_and_numbers(tmp_path):
    for folder in "ab":
        assert command(conventions.make, "conventions", ["-o", str(tmp_path / folder)]) == 0
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    both = [f"conventions-{width}.{end}" for width in ("column", "page") for end in ("pdf", "png")]
    assert names == sorted([*both, "conventions.csv", "conventions.txt"])
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    rows = list(csv.DictReader((tmp_path / "a" / "conventions.csv").open()))
    (row,) = (r for r in rows if [r["convention"], r["edit"], r["metric"]] == ["text_line", "× 1.2", "right"])
    quoted = RESULTS["models"]["text_line"]["edits"]["× 1.2"]["right"]
    assert [float(row[end]) for end in ("mean", "low", "high")] == pytest.approx(quoted)
    text = (tmp_path / "a" / "conventions.txt").read_text()
    assert f"  × 1.2: FLUX.1 {100 * RESULTS['models']['flux1']['edits']['× 1.2']['right'][0]:.0f} % [" in text


def test_points_of_the_figure():
    with Image.open(conventions.RESULTS.with_suffix(".png")) as file:
        side, each = conventions.SIDE, len(RESULTS["shown"])
        assert file.size == (side * each * len(EDITS), side * len(CONVENTIONS))
        strip = conventions.np.asarray(file.convert("RGB"))
    plot = conventions.draw(RESULTS, strip, conventions.PAGE).axes[1]
    lines = {
        line.get_label(): line.get_ydata() for line in plot.lines if line.get_label() in conventions.NAMES.values()
    }
    for name, model in RESULTS["models"].items():
        assert list(lines[conventions.NAMES[name]]) == [model["edits"][edit]["right"][0] for edit in EDITS]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_results_belong_to_the_recipes(name):
    """The same steps and programs as in `configs/train`; otherwise run the benchmark again."""
    file = config_folder() / "train" / f"{CONVENTIONS[name].removeprefix('train-').replace('-', '_')}.yaml"
    base, own = (OmegaConf.load(path) for path in (file.with_name("convention.yaml"), file))
    trained = RESULTS["models"][name]
    assert trained["training"]["steps"] == base.steps
    assert trained["training"]["samples"] == base.steps * base.batch
    assert Program.from_config(trained["program"]) == Program.from_config(OmegaConf.to_container(own).get("program"))
    assert RESULTS["edits"] == EDITS
