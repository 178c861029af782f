"""The atlas of frequencies: its stand-in for the place, a planted frequency, and its statistics."""

import json

import numpy as np
import pytest
import torch

import fluxlab
from experiments import atlas, atlastable

GRID = (16, 16)
PLANTED = 7
"""Among the pairs of the embedded model: 4 of the index, then 14 of rows. This is the fourth of rows."""


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny", dtype=torch.float32)


def content(row, col):
    """Latents of a background with noise-free content in one token."""
    x = torch.full((1, *GRID, 4), 0.5)
    x[0, row, col] = torch.tensor([2.0, -1, 0, 3])
    return x.flatten(1, 2)


def test_the_stand_in_is_where_the_content_is():
    assert atlastable.centre(content(3, 11), GRID)[0].tolist() == [3, 11]
    both = torch.cat((content(3, 11), content(3, 11), content(3, 11), content(3, 11)))
    assert atlastable.towards(both, GRID, ["left", "right", "top", "bottom"]).tolist() == [-11, 11, -3, 3]


def test_the_derivative_of_the_stand_in():
    x = (content(3, 11) + 0.1 * torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0))).double()
    x.requires_grad_()
    atlastable.towards(x, GRID, ["right"]).sum().backward()
    step = torch.zeros_like(x)
    step[0, 3 * 16 + 11, 0] = 1e-4  # more content there moves the centre to the right
    with torch.no_grad():
        change = (atlastable.towards(x + step, GRID, ["right"]) - atlastable.towards(x - step, GRID, ["right"])) / 2e-4
    assert x.grad[0, 3 * 16 + 11, 0] == pytest.approx(change.item(), rel=1e-5)
    assert change > 0


def test_a_planted_frequency_is_found(pipe):
    """All pairs but one add nothing to the scores, so that the image depends on that one only."""
    others = [pair for pair in range(14) if pair != PLANTED - 4]
    program = {
        "a": {"op": "gain", "factor": 0, "axes": ["index", "col"]},
        "b": {"op": "gain", "factor": 0, "axes": "row", "pairs": others},
    }
    found = atlastable.attribute(pipe, atlastable.PROMPTS[:1], [0], 1, program)
    assert found["place"].shape == (1, 1, 6, 3, 32)
    assert found["axis"][PLANTED] == "row"
    for name in ("place", "loss"):
        sizes = np.abs(found[name][0, 0])
        assert not np.delete(sizes, PLANTED, -1).any()
        assert (sizes[..., PLANTED] > 0).sum() >= 15  # of 18 heads
    assert {site % 32 for site in atlastable.rankings(found)["place"][:15]} == {PLANTED}
    shares = atlastable.shares(found)
    assert shares["axis row"]["mean"] == pytest.approx(1)
    assert shares["wavelength above 32"]["mean"] == pytest.approx(1)


def test_without_any_site_the_order_does_not_matter(pipe):
    shape = (6, 3, 32)
    order = {"place": np.arange(576), "loss": np.arange(576)[::-1]}
    rows = atlastable.ablate(pipe, order, shape, [576], atlastable.HELD_OUT[:1], [3], 1)
    values = {row["variant"]: [row["centre"], row["found"], row["place"], row["moved"]] for row in rows}
    assert set(values) == {"none", "place 576", "loss 576", "random 576"}
    np.testing.assert_equal(values["place 576"], values["loss 576"])
    np.testing.assert_equal(values["place 576"], values["random 576"])
    assert values["none"][0] == 0 != values["place 576"][0]


def made():
    """Derivatives and images of 4 cells in which the first site moves the thing and no other does."""
    place = np.zeros((4, 2, 2, 1, 3))
    place[:, 0, 1, 0, 2] = [2, -2, 2, 2]
    place[:, 1, 0, 0, 0] = 0.5
    found = {"place": place, "loss": np.ones((4, 2, 2, 1, 3)), "axis": ["index", "row", "row"]}
    found |= {"wavelength": [6.3, 6.3, 40.0], "sigma": [1.0, 0.5]}
    rows = []
    for variant, right, moved in (("none", 1, 0), ("place 8", 0, 9), ("loss 8", 1, 1), ("random 8", 1, 2)):
        for seed in range(4):
            row = {"variant": variant, "prompt": "a", "seed": seed, "place": float(right), "found": 1.0}
            rows.append(
                row | {"moved": float(moved), "along": -float(moved + seed), "centre": -float(moved + seed) / 2}
            )
    return found, rows


def test_statistics():
    found, rows = made()
    order = atlastable.rankings(found)["place"]
    assert list(order[:2]) == [5, 0]  # sites in C order: block 1, pair 2, then block 0, pair 0
    shares = atlastable.shares(found)
    assert [shares[key]["mean"] for key in ("block 1", "axis row", "step 0", "wavelength above 32")] == [0.8] * 4
    table = {(row["block"], row["pair"]): row for row in atlastable.table_rows(found)}
    assert table[1, 2]["place"] == pytest.approx(4.8)  # 2 of the sum of 2.5, times 6 sites
    assert table[1, 2]["signed"] == 1
    outcomes = atlastable.outcomes(rows)
    assert outcomes["place 8"]["place - random"] == {"n": 4, "mean": -1, "low": -1, "high": -1}
    assert outcomes["loss 8"]["moved - random"]["mean"] == -1
    assert atlastable.agreement(rows) == (pytest.approx(1), 12)


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "measure", lambda *arguments: made())
    for name in "ab":
        assert atlas.main(["-o", str(tmp_path / name), "device=cpu"]) == 0
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["atlas.csv", "atlas.json", "atlas.pdf", "atlas.png", "atlas.txt"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    numbers = json.loads((tmp_path / "a" / "atlas.json").read_text())
    assert numbers["first"][0]["wavelength"] == 40
    text = (tmp_path / "a" / "atlas.txt").read_text()
    assert "block 1 head 0 row, wavelength 40: 4.8 [4.8, 4.8], for the loss 1, signed 1 tokens" in text


def test_a_model_that_draws_no_scenes(capsys):
    assert atlas.main(["model.scenes=false", "device=cpu"]) == 2
    assert "model=tiny: not one of scenes; the atlas needs the scene oracle" in capsys.readouterr().err


def test_wrong_numbers(capsys):
    assert atlas.main(["--seeds", "0"]) == 2
    assert "--seeds 0: expected at least 1" in capsys.readouterr().err
