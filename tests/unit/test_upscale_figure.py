"""The experiment on super-resolution: its scenes, its measures on images that are known, and its figures."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import enlarge, upscale
from experiments.enlarge import SETTINGS
from fluxlab.scenes import held_out, sample_scene

ROOT = Path(__file__).parents[2]
FIXED = [enlarge.BICUBIC, enlarge.DECODED, enlarge.DRAWN]


@pytest.mark.parametrize(("name", "given", "side"), [("own", 32, 64), ("beyond", 48, 48)])
def test_a_case_is_one_scene_at_two_sizes(name, given, side):
    for number in range(6):
        one = enlarge.case(SETTINGS[name], number)
        assert one.small.shape == (given, given, 3)
        assert one.large.shape == (2 * given, 2 * given, 3)
        assert one.side == side
        assert held_out(sample_scene(np.random.default_rng([side, number]), (side, side), "heldout"))
        reduced = one.large.reshape(given, 2, given, 2, 3).astype(float).mean((1, 3))
        same = (np.abs(reduced - one.small) <= 0.5).all(-1).mean()
        assert same == 1 if name == "own" else 0.9 < same < 1  # beyond: drawn anew, with finer outlines


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_of_images_that_are_known(name):
    cases = (enlarge.case(SETTINGS[name], number) for number in range(9))
    with_sign = next(one for one in cases if "says" in one.prompt)
    right = enlarge.scores(with_sign.large, with_sign)
    assert right["psnr_scene"] == np.inf
    assert [right[key] for key in ("ssim_scene", "shape", "letters", "object", "colour")] == [1, 1, 1, 1, 1]
    assert enlarge.scores(with_sign.large.repeat(4, 0).repeat(4, 1), with_sign) == right
    other = np.where(with_sign.large < 128, with_sign.large + 51, with_sign.large - 51).astype(np.uint8)
    assert enlarge.scores(other, with_sign)["psnr_scene"] == pytest.approx(-20 * np.log10(0.2))
    empty = np.broadcast_to(with_sign.large[0, 0], with_sign.large.shape).copy()
    found = enlarge.scores(empty, with_sign)
    assert [found[key] for key in ("shape", "letters", "object", "colour", "sharpness")] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_row_of_the_figure_is_something_else(name):
    """With a corner of one scene, in two steps: in one step DyPE is YaRN, and "resized" starts from noise alone."""
    import torch

    import fluxlab

    pipe, setting = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu"), SETTINGS[name]
    one = enlarge.case(setting, 0)
    corner = replace(one, small=one.small[8:24, 8:24], large=one.large[16:48, 16:48])
    made = dict(enlarge.images_of(pipe, setting, [corner], 2))
    assert list(made) == [*FIXED, *setting.prompted, *setting.upscaled]
    assert {images[0].shape for images in made.values()} == {(32, 32, 3)}
    assert len({images[0].tobytes() for images in made.values()}) == len(made)


def test_the_numbers_and_the_figures_are_those_of_the_images(tmp_path, monkeypatch, capsys):
    """With made-up images: the first method gives black, the others the scene with its top left pixel changed."""

    def made(pipe, setting, cases, steps):
        first = next(iter(setting.upscaled))
        for name in (*FIXED, *setting.prompted, *setting.upscaled):
            images = [one.large.copy() for one in cases]
            for image in images:
                image[:1, :1] = 0
            yield name, [0 * image for image in images] if name == first else images

    monkeypatch.setattr(upscale, "images_of", made)
    assert upscale.main(["-o", str(tmp_path), "--scenes", "5", "--rows", "1", "device=cpu"]) == 0
    files = [f"upscale-{name}.{end}" for name in SETTINGS for end in ("csv", "pdf", "png", "txt")]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*files, "upscale.json"])
    for setting, found in json.loads((tmp_path / "upscale.json").read_text())["measures"].items():
        first, second, *_ = SETTINGS[setting].upscaled
        black = {key: found[first]["object"][key] for key in ("n", "mean", "paired_mean", "paired_high", "first")}
        assert black == {"n": 5, "mean": 0, "paired_mean": -1, "paired_high": -1, "first": 0}
        assert found[second]["object"]["paired_mean"] == 0
        rows = list(csv.DictReader((tmp_path / f"upscale-{setting}.csv").open()))
        assert len(rows) == 5 * len(found)
        for name, row in found.items():
            mean = np.mean([float(r["psnr_scene"]) for r in rows if r["variant"] == name])
            assert row["psnr_scene"]["mean"] == pytest.approx(mean, abs=1e-4)
        assert f"{first}: 0 [0, 0], Δ -1 [-1, -1], n = 5" in (tmp_path / f"upscale-{setting}.txt").read_text()
    assert upscale.main(["--scenes", "0"]) == 2
    assert "--scenes 0: expected at least 1" in capsys.readouterr().err


QUOTED = [
    pytest.param(setting, name, marks=() if (setting, name) == ("own", "resized") else pytest.mark.soak)
    for setting, rows in SETTINGS.items()
    for name in rows.upscaled
]


@pytest.mark.parametrize(("setting", "name"), QUOTED)
def test_what_docs_quote_is_what_the_experiment_gives(setting, name):
    """The first scene again. Other processors round differently."""
    import torch

    import fluxlab

    quoted = json.loads((ROOT / "docs" / "upscale.json").read_text())
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    alone = replace(SETTINGS[setting], prompted={}, upscaled={name: SETTINGS[setting].upscaled[name]})
    one = enlarge.case(alone, 0)
    for found, (image,) in enlarge.images_of(pipe, alone, [one], quoted["steps"]):
        numbers = quoted["measures"][setting][found]
        for measured, value in enlarge.scores(image, one).items():
            assert numbers[measured]["n"] == quoted["scenes"] or measured == "letters"
            near = {"psnr_scene": 0.5, "ssim_scene": 0.01, "sharpness": 0.002, "letters": 0.15}.get(measured, 0)
            assert value == pytest.approx(numbers[measured]["first"], abs=near), (found, measured)


def test_another_model_gets_larger_scenes_and_no_oracle(tmp_path, monkeypatch):
    """The embedded model as one that was not trained on scenes, at twice the size."""
    setting = replace(SETTINGS["own"], prompted={}, upscaled={"resized": {"method": "resized", "until": 0.8}})
    monkeypatch.setattr(upscale, "SETTINGS", {"own": setting})
    words = ["device=cpu", "model.scenes=false", "model.size=[128,128]", "steps=2"]
    assert upscale.main(["-o", str(tmp_path), "--scenes", "1", *words]) == 0
    (found,) = json.loads((tmp_path / "upscale.json").read_text())["measures"].values()
    assert list(found) == [*FIXED, "resized"]
    assert set(found["resized"]) == {"psnr_scene", "ssim_scene", "sharpness"}
    text = (tmp_path / "upscale-own.txt").read_text()
    assert text.startswith("Images of 64 × 64 px, which are scenes of 128 × 128 px")
    assert "oracle" not in text
    one = enlarge.case(setting, 0, 2)
    assert (one.small.shape, one.large.shape) == ((64, 64, 3), (128, 128, 3))
