"""The figures of runs with tasks: what is read in images that are known, their numbers and their files."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxlab
from experiments import inpaint, taskfigure, upscale
from experiments.results import every_image
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.experiment.inputs import read_inputs, read_scenes
from fluxlab.experiment.reading import Run
from fluxlab.experiment.tasks import split_tasks
from fluxlab.scenes import cases
from tests.stores import make_store

ROOT = Path(__file__).parents[2]
MODEL = ModelRow("tiny", "fluxlab/assets/tiny", scenes=True, size=(64, 64))
KINDS = {"inpaint": ("exchange", (64, 64)), "upscale": ("halved", (64, 64)), "upscale_beyond": ("doubled", (96, 96))}
VARIANTS = {
    "inpaint": {"given": {"task": {"path": "inverted"}}, "target": {"task": {"name": "decode", "of": "target"}}},
    "upscale": {"black": {"task": {"method": "aligned"}}, "target": {"task": {"name": "decode", "of": "target"}}},
}


def store(folder: Path, name: str, count: int = 4, model: ModelRow = MODEL) -> Run:
    """Return a run in which the images of the baseline and of "target" are the targets, and others what they say."""
    task = name.removesuffix("_beyond")
    kind, size = KINDS[name]
    prompts, files = read_scenes({"kind": kind, "count": count}, (64, 64))
    inputs = read_inputs(**{"mask": None, **files}, prompts=count)
    programs, tasks = split_tasks({"baseline": {}, **VARIANTS[task]}, task)
    more = {"name": name, "model": model, "tasks": tasks, "inputs": inputs}
    run = fluxlab.read_run(make_store(folder, programs, prompts, (0,), size, **more))
    for row, file in every_image(run):
        one = inputs[prompts.index(row["prompt"])]
        image = {"given": one.open("image"), "black": 0 * one.open("target")}.get(row["variant"], one.open("target"))
        Image.fromarray(image).save(file)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    return {name: store(tmp_path_factory.mktemp("runs") / name, name) for name in KINDS}


@pytest.mark.parametrize("number", range(2))
def test_what_is_read_in_the_hole(number):
    one = cases.case("exchange", number)
    right, given = inpaint.read(one.target, one), inpaint.read(one.image, one)
    assert (right["in_hole"], right["coloured"], right["asked"]) == (1, 1, 1)
    assert (given["in_hole"], given["coloured"], given["asked"]) == (1, 0, 0)
    assert ("asked_two" if number else "asked_one") in right
    empty = one.target.copy()
    empty[one.mask] = one.image[0, 0]
    assert inpaint.read(empty, one)["in_hole"] == 0
    large = cases.case("exchange", number, 2)
    assert inpaint.read(large.target, large) == right
    moved = np.roll(one.target, 32, 0 if one.asked.place in ("top", "bottom", "centre") else 1)
    assert inpaint.read(moved, one)["asked"] == 0


@pytest.mark.parametrize("kind", ["halved", "doubled"])
def test_what_is_read_in_an_enlarged_scene(kind):
    one = next(one for one in cases.cases(kind, 9) if "says" in one.prompt)
    right = upscale.read(one.target, one)
    assert [right[key] for key in ("shape", "letters", "object", "colour")] == [1, 1, 1, 1]
    large = cases.case(kind, one.number, 2)
    assert upscale.read(large.target, large) == right
    empty = np.broadcast_to(one.target[0, 0], one.target.shape).copy()
    assert [upscale.read(empty, one)[key] for key in ("shape", "letters", "object", "colour")] == [0, 0, 0, 0]


@pytest.mark.parametrize("name", KINDS)
def test_the_numbers_and_the_figure_are_those_of_the_images(runs, name, tmp_path, capsys):
    run, module = runs[name], {"inpaint": inpaint}.get(name, upscale)
    assert module.main([str(run.path), "-o", str(tmp_path), "--rows", "2"]) == 0
    widths = [f"{name}-{width}.{end}" for width in ("column", "page") for end in ("pdf", "png")]
    files = [tmp_path / Path(line).name for line in capsys.readouterr().out.split()]
    assert sorted(file.name for file in files) == sorted([*widths, f"{name}.txt", f"{name}.csv"])
    found = taskfigure.numbers(run, module.ABOUT)
    measured, wrong = ("asked", "given") if name == "inpaint" else ("object", "black")
    assert found["target"][measured] == {
        **{"n": 4, "mean": 1, "low": 1, "high": 1, "first": 1},
        **{"paired_mean": 0, "paired_low": 0, "paired_high": 0},
    }
    assert (found[wrong][measured]["mean"], found[wrong][measured]["paired_mean"]) == (0, -1)
    assert {"noise floor", "another seed"} < {*found}
    assert found["noise floor"][measured]["mean"] == 1
    rows = list(csv.DictReader((tmp_path / f"{name}.csv").open()))
    assert len(rows) == 4 * 5
    for variant, row in found.items():
        mean = np.mean([float(r[measured]) for r in rows if r["variant"] == variant])
        assert row[measured]["mean"] == pytest.approx(mean)
    text = (tmp_path / f"{name}.txt").read_text()
    assert f"  {wrong}: 0 [0, 0], Δ -1 [-1, -1], n = 4" in text
    assert "Images: the first 2 prompts." in text
    again = tmp_path / "again"
    assert module.main([str(run.path), "-o", str(again), "--rows", "2"]) == 0
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in files)


ROWS = [
    {"variant": name, "prompt": "a", "seed": seed, "right": float(right), "only": only, "never": math.nan}
    for name, right, only in (("first", 1, math.nan), ("second", 0, 2.0))
    for seed in range(3)
]


def test_means():
    found = taskfigure.means(ROWS, "first", ("right", "only", "never"))
    assert found["first"] == {"right": {"n": 3, "mean": 1, "low": 1, "high": 1, "first": 1}}
    paired = {"paired_mean": -1, "paired_low": -1, "paired_high": -1}
    assert found["second"]["right"] == {"n": 3, "mean": 0, "low": 0, "high": 0, "first": 0} | paired
    assert set(found["second"]) == {"right", "only"}
    assert taskfigure.measure_lines(found, {"right": "right ones", "only": "those of one", "never": "of none"}) == [
        "right ones:",
        "  first: 1 [1, 1], n = 3",
        "  second: 0 [0, 0], Δ -1 [-1, -1], n = 3",
        "those of one:",
        "  second: 2 [2, 2], n = 3",
    ]


def test_another_model_has_no_oracle(tmp_path):
    run = store(tmp_path / "run", "inpaint", 2, ModelRow("other", "fluxlab/assets/tiny", size=(64, 64)))
    found = taskfigure.numbers(run, inpaint.ABOUT)
    assert set(found["baseline"]) == {"psnr_outside", "seam"}
    taskfigure.make(run, inpaint.ABOUT, tmp_path, ["column"], 1)
    assert "oracle" not in (tmp_path / "inpaint.txt").read_text()


def test_images_of_the_user_have_no_case(tmp_path):
    """Columns of metrics.csv are not taken for what the oracle finds in the hole."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    inputs = read_inputs(str(tmp_path / "red.png"), str(tmp_path / "mask.png"), None, 1)
    _, tasks = split_tasks({"baseline": {}}, "inpaint")
    more = {"name": "inpaint", "model": MODEL, "tasks": tasks, "inputs": inputs}
    run = fluxlab.read_run(make_store(tmp_path / "run", {}, ["a red fox"], (0,), **more))
    assert {"object", "colour"} < {*run.metrics[0]}
    assert set(taskfigure.numbers(run, inpaint.ABOUT)["baseline"]) == {"psnr_outside", "seam"}
    taskfigure.make(run, inpaint.ABOUT, tmp_path, ["page"], 1)


def test_wrong_stores_and_options(runs, tmp_path, capsys):
    with pytest.raises(UserError, match="no variant has the task upscale; give a run of \\+exp=upscale"):
        taskfigure.numbers(runs["inpaint"], upscale.ABOUT)
    plain = make_store(tmp_path / "plain")
    assert inpaint.main([str(plain)]) == 2
    assert "no variant has the task inpaint" in capsys.readouterr().err
    assert inpaint.main([str(runs["inpaint"].path), "--rows", "0"]) == 2
    assert "--rows 0: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inpaint", pytest.param("upscale", marks=pytest.mark.soak)])
def test_what_docs_quote_is_what_the_runs_give(name, tmp_path):
    """The first scene again. Other processors round differently."""
    from fluxlab import run as command_line

    words = [f"+exp={name}", "model=tiny", "device=cpu", "tracking=none", f"out={tmp_path / 'run'}"]
    assert command_line.main([*words, "scenes.count=1"]) == 0
    quoted = json.loads((ROOT / "docs" / "results.json").read_text())[name]
    about = {"inpaint": inpaint, "upscale": upscale}[name].ABOUT
    found = taskfigure.numbers(fluxlab.read_run(tmp_path / "run"), about)
    for variant in {*quoted} - {"noise floor", "another seed"}:
        for measured, numbers in found[variant].items():
            assert quoted[variant][measured]["n"] <= 64
            if measured == "letters" or "first" not in quoted[variant][measured]:
                continue
            near = {"psnr_outside": 0.5, "psnr_target": 0.5, "seam": 0.01, "ssim_target": 0.01, "sharpness": 0.002}
            expected = quoted[variant][measured]["first"]
            assert numbers["first"] == pytest.approx(expected, abs=near.get(measured, 0)), (variant, measured)
