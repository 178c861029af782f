"""The experiment on super-resolution: its scenes, its measures on images that are known, and its figure."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import upscale
from fluxlab.scenes import held_out, sample_scene


def test_a_case_is_one_scene_at_two_sizes():
    for number in range(6):
        one = upscale.case(number)
        assert one.small.shape == (48, 48, 3)
        assert one.large.shape == (96, 96, 3)
        assert held_out(sample_scene(np.random.default_rng([48, number]), (48, 48), "heldout"))
        reduced = one.large.reshape(48, 2, 48, 2, 3).astype(float).mean((1, 3))
        same = (np.abs(reduced - one.small) < 1).all(-1)
        assert 0.9 < same.mean() < 1  # outlines are finer


def test_scores_of_images_that_are_known():
    with_sign = next(one for one in map(upscale.case, range(9)) if "says" in one.prompt)
    right = upscale.scores(with_sign.large, with_sign)
    assert right["psnr_scene"] == np.inf
    assert [right[key] for key in ("ssim_scene", "shape", "letters", "object", "colour")] == [1, 1, 1, 1, 1]
    assert upscale.scores(with_sign.large.repeat(4, 0).repeat(4, 1), with_sign) == right
    other = np.where(with_sign.large < 128, with_sign.large + 51, with_sign.large - 51).astype(np.uint8)
    assert upscale.scores(other, with_sign)["psnr_scene"] == pytest.approx(-20 * np.log10(0.2))
    empty = np.broadcast_to(with_sign.large[0, 0], with_sign.large.shape).copy()
    found = upscale.scores(empty, with_sign)
    assert [found[key] for key in ("shape", "letters", "object", "colour", "sharpness")] == [0, 0, 0, 0, 0]


def test_every_row_of_the_figure_is_something_else():
    """With a corner of one scene, in two steps: in one step DyPE is YaRN, and "resized" starts from noise alone."""
    import torch

    import fluxlab

    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    one = upscale.case(0)
    corner = replace(one, small=one.small[16:32, 16:32], large=one.large[32:64, 32:64])
    made = dict(upscale.images_of(pipe, [corner], 2))
    fixed = [upscale.BICUBIC, upscale.DECODED, upscale.DRAWN]
    assert list(made) == [*fixed, *upscale.PROMPTED, *upscale.UPSCALED]
    assert {images[0].shape for images in made.values()} == {(32, 32, 3)}
    assert len({images[0].tobytes() for images in made.values()}) == len(made)


def test_the_numbers_and_the_figure_are_those_of_the_images(tmp_path, monkeypatch, capsys):
    """With made-up images: the first method gives black, the others the scene with its top left pixel changed."""

    def made(pipe, cases, steps):
        first = next(iter(upscale.UPSCALED))
        for name in (upscale.BICUBIC, upscale.DECODED, upscale.DRAWN, *upscale.PROMPTED, *upscale.UPSCALED):
            images = [one.large.copy() for one in cases]
            for image in images:
                image[:1, :1] = 0
            yield name, [0 * image for image in images] if name == first else images

    monkeypatch.setattr(upscale, "images_of", made)
    assert upscale.main(["-o", str(tmp_path), "--scenes", "5", "--rows", "1"]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"upscale.{end}" for end in ("csv", "json", "pdf", "png", "txt")
    ]
    found = json.loads((tmp_path / "upscale.json").read_text())["measures"]
    first, second, *_ = upscale.UPSCALED
    assert found[first]["object"] == {"n": 5, "mean": 0, "low": 0, "high": 0} | {
        "paired_mean": -1,
        "paired_low": -1,
        "paired_high": -1,
        "first": 0,
    }
    assert found[second]["object"]["paired_mean"] == 0
    rows = list(csv.DictReader((tmp_path / "upscale.csv").open()))
    assert len(rows) == 5 * len(found)
    for name, row in found.items():
        mean = np.mean([float(r["psnr_scene"]) for r in rows if r["variant"] == name])
        assert row["psnr_scene"]["mean"] == pytest.approx(mean, abs=1e-4)
    assert f"{first}: 0 [0, 0], Δ -1 [-1, -1], n = 5" in (tmp_path / "upscale.txt").read_text()
    assert upscale.main(["--scenes", "0"]) == 2
    assert "--scenes 0: expected at least 1" in capsys.readouterr().err
