"""The experiment on inpainting: its scenes, its measures on images that are known, and its figure."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import exchange, inpaint
from fluxlab.scenes import parse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", range(6))
def test_a_case_differs_in_the_hole_only_and_its_thing_is_the_one_asked_for(number):
    one = exchange.case(number)
    changed = (one.given != one.drawn).any(-1)
    assert changed.any()
    assert not changed[~one.hole].any()
    tokens = one.hole.reshape(16, 4, 16, 4)
    assert (tokens.all((1, 3)) == tokens.any((1, 3))).all()
    before, after = parse(one.source_prompt), parse(one.prompt)
    assert (before.relation is None) == (number % 2 == 0)
    assert (one.asked.name, one.asked.colour) in ((after.thing, after.colour), (after.second, after.second_colour))
    assert one.asked.name not in (before.thing, before.second)
    assert one.asked.colour not in (before.colour, before.second_colour)


@pytest.mark.parametrize("number", range(2))
def test_scores_of_drawn_images(number):
    one = exchange.case(number)
    right, given = exchange.scores(one.drawn, one), exchange.scores(one.given, one)
    assert (right["object"], right["colour"], right["asked"]) == (1, 1, 1)
    assert (given["object"], given["colour"], given["asked"]) == (1, 0, 0)
    empty = one.drawn.copy()
    empty[one.hole] = one.given[0, 0]
    assert exchange.scores(empty, one)["object"] == 0
    assert exchange.scores(one.drawn.repeat(2, 0).repeat(2, 1), one)["asked"] == 1
    large = exchange.case(number, 2)
    assert exchange.scores(large.drawn, large) == right
    assert set(exchange.scores(large.drawn, large, oracle=False)) == {"psnr_outside", "seam"}


def test_the_right_thing_at_the_wrong_place_does_not_count():
    one = exchange.case(0)
    moved = np.roll(one.drawn, 32, 0 if one.asked.place in ("top", "bottom", "centre") else 1)
    assert exchange.scores(moved, one)["asked"] == 0


def test_psnr_outside_counts_no_pixel_of_the_hole():
    one = exchange.case(0)
    image = one.drawn.copy()
    image[~one.hole] = np.where(image[~one.hole] < 128, image[~one.hole] + 51, image[~one.hole] - 51)
    assert exchange.scores(image, one)["psnr_outside"] == pytest.approx(-20 * np.log10(0.2))


def test_the_seam_of_a_flat_hole():
    hole = np.zeros((8, 8), bool)
    hole[2:4, 4:] = True  # touches the edge of the image, where there is no border
    image = np.zeros((8, 8, 3), np.uint8)
    assert exchange.seam(image, hole) == 0
    image[hole] = 51
    assert exchange.seam(image, hole) == pytest.approx(0.2)
    image[3, 4:] = 0  # 4 + 1 of the 10 pairs of neighbours are equal now
    assert exchange.seam(image, hole) == pytest.approx(0.1)


def test_the_numbers_and_the_figure_are_those_of_the_images(tmp_path, monkeypatch, capsys):
    """With made-up images: the first method is right in every scene, the others are the given image."""

    def made(pipe, one, steps):
        for i, name in enumerate((inpaint.DRAWN, inpaint.FLOOR, inpaint.ALONE, *inpaint.METHODS)):
            yield name, one.drawn if i in (0, 3) else one.given, i if i > 2 else math.nan

    monkeypatch.setattr(inpaint, "images_of", made)
    assert inpaint.main(["-o", str(tmp_path), "--scenes", "2", "--rows", "1", "device=cpu"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"inpaint.{end}" for end in ("csv", "json", "pdf", "png", "txt")
    ]
    found = json.loads((tmp_path / "inpaint.json").read_text())["measures"]
    first, second, *_ = inpaint.METHODS
    assert found[first]["asked"] == {"n": 2, "mean": 1, "low": 1, "high": 1, "first": 1}
    assert found[second]["asked"]["paired_mean"] == -1
    assert found[second]["spread"]["mean"] == 4
    assert inpaint.ALONE in found
    assert "spread" not in found[inpaint.ALONE]
    rows = list(csv.DictReader((tmp_path / "inpaint.csv").open()))
    assert len(rows) == 2 * len(found)
    for name, row in found.items():
        mean = np.mean([float(r["seam"]) for r in rows if r["variant"] == name])
        assert row["seam"]["mean"] == pytest.approx(mean, abs=1e-5)
    assert f"{second}: 0 [0, 0], Δ -1 [-1, -1], n = 2" in (tmp_path / "inpaint.txt").read_text()
    assert inpaint.main(["--scenes", "0"]) == 2
    assert "--scenes 0: expected at least 1" in capsys.readouterr().err


def test_another_model_gets_larger_scenes_and_no_oracle(tmp_path, monkeypatch):
    """The embedded model as one that was not trained on scenes, at twice the size."""
    monkeypatch.setattr(inpaint, "METHODS", {FIRST: inpaint.METHODS[FIRST]})
    words = ["device=cpu", "model.scenes=false", "model.size=[128,128]", "steps=2", "dtype=bfloat16"]
    assert inpaint.main(["-o", str(tmp_path), "--scenes", "1", *words]) == 0
    record = json.loads((tmp_path / "inpaint.json").read_text())
    assert list(record["measures"]) == [inpaint.DRAWN, inpaint.FLOOR, inpaint.ALONE, FIRST]
    assert set(record["measures"][FIRST]) == {"psnr_outside", "seam", "spread"}
    assert record["measures"][FIRST]["psnr_outside"]["mean"] > record["measures"][inpaint.ALONE]["psnr_outside"]["mean"]
    assert (record["steps"], record["dtype"]) == (2, "bfloat16")
    assert "oracle" not in (tmp_path / "inpaint.txt").read_text()
    assert exchange.case(0, 2).given.shape == (128, 128, 3)


FIRST, *OTHERS = inpaint.METHODS


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.soak) for name in OTHERS)])
def test_what_docs_quote_is_what_the_experiment_gives(name):
    """The first scene again. Other processors round differently."""
    import torch

    import fluxlab

    quoted = json.loads((ROOT / "docs" / "inpaint.json").read_text())
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    one = exchange.case(0)
    made = {
        found: exchange.scores(image, one) | {"spread": spread}
        for found, image, spread in inpaint.images_of(pipe, one, quoted["steps"], [name])
    }
    assert set(made) == {inpaint.DRAWN, inpaint.FLOOR, inpaint.ALONE, name}
    for found, row in made.items():
        for measured, numbers in quoted["measures"][found].items():
            assert numbers["n"] == (32 if measured in ("asked_one", "asked_two") else 64)
            if "first" not in numbers:  # scene 0 has one thing
                continue
            near = {"psnr_outside": 0.5, "seam": 0.01, "spread": 0.02}.get(measured, 0)
            assert row[measured] == pytest.approx(numbers["first"], abs=near), (found, measured)
