"""A store of release 0.1 is still readable.

`tests/data/store-0.1` was written by that release: `+exp=hello steps=2 seeds=2 capture=words` with one more variant.
It is a copy without pages and large pictures, with the arrays of the first seed only. `manifest.jsonl` lists what is
left.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxlab import probes
from fluxlab.experiment.reading import read_store
from fluxlab.files import sha256_of
from fluxlab.positions import Program
from fluxlab.report.page import render

STORE = Path(__file__).parents[1] / "data" / "store-0.1"
PROMPT = "A cat holding a sign that says hello world"


@pytest.fixture(scope="module")
def run():
    return read_store(STORE)


def test_tables_and_images(run):
    assert run.variants == ["baseline", "half"]
    assert run.places == [(PROMPT, 0), (PROMPT, 1)]
    assert run.cell("half", PROMPT, 0)["ssim"] == 0.318075
    assert np.isnan(run.cell("half", PROMPT, 0)["thing_moved"])
    assert [row["variant"] for row in run.references] == ["noise floor", "another seed", "another seed"]
    assert all(run.image(row["variant"], row["prompt"], row["seed"]).is_file() for row in run.metrics)


def test_program_digests(run):
    for name, variant in run.record["variants"].items():
        assert Program.from_config(variant["program"]).digest == variant["digest"], name


def test_attention(run):
    maps = probes.read(STORE)["words"]
    assert maps.dims[:3] == ("variant", "prompt", "seed")
    assert maps.sizes["variant"] == 2
    assert "cat" in maps["word"].values
    assert np.isfinite(maps.values).all()
    assert run.captured("half", PROMPT, 0)["words"].axes == maps.dims[3:]


def test_report_page(run):
    page = render([STORE])
    assert page.count("data:image") >= 4
    assert 'class="missing"' not in page


def test_cell_keys_stay_equal(run):
    """Images of an old store are found again under the keys that this version computes."""
    from fluxlab.experiment.cells import cell_key
    from fluxlab.experiment.store import Store

    settings = Store(STORE).settings()
    for row in run.metrics:
        program = Program.from_config(run.record["variants"][row["variant"]]["program"])
        assert cell_key(settings, row["prompt"], row["seed"], program) == row["cell"]


def test_reading_writes_nothing(tmp_path):
    copy = shutil.copytree(STORE, tmp_path / "copy")
    before = {p.relative_to(copy): sha256_of(p) for p in copy.rglob("*") if p.is_file()}
    render([copy])
    assert {p.relative_to(copy): sha256_of(p) for p in copy.rglob("*") if p.is_file()} == before
