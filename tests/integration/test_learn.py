"""`python -m fluxlab.learn` on the embedded model: a planted argument is found; stop, resume, what is written."""

import csv
import json

import pytest
import torch

import fluxlab
from fluxlab import learn, run
from fluxlab.learning.fit import Problem

PROMPTS = (
    "a red fox on the left holding a sign that says open",
    "a blue circle at the bottom holding a sign that says rain",
    "a yellow heart at the top holding a sign that says taxi",
)
COMMON = ["+exp=hello", "dtype=float32", "threads=1", "tracking=none", f"prompts={json.dumps(PROMPTS)}"]
PLANTED = {"a.factor": 1.25, "b.by.row": 6.0}


def program(factor, row):
    return f"{{a: {{op: scale, factor: {factor}, origin: centre}}, b: {{op: offset, by: {{row: {row}}}}}}}"


def test_a_planted_scale_is_found(tmp_path):
    """Images with factor 1.25 are given as files; the search starts at 0.7. For two arguments: the next test."""
    edits = {"a": {"op": "scale", "factor": 1.25, "origin": "centre"}}
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32)
    files = [tmp_path / f"{n}.png" for n in (0, 1)]
    for file, image in zip(files, pipe.generate(PROMPTS[:2], 0, edits, steps=1), strict=True):
        image.save(file)
    words = [*COMMON[:-1], f"prompts={json.dumps(PROMPTS[:2])}", "seeds=1", "steps=1", f"out={tmp_path / 'out'}"]
    words += ["objective=likeness", f"objective.images=[{files[0]},{files[1]}]", "starts=6", "updates=8", "rate=0.06"]
    words += ["+variants.mine={a: {op: scale, factor: {learn: 0.7, min: 0.5, max: 2.2}, origin: centre}}"]
    assert learn.main(words) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["values"]["a.factor"] == pytest.approx(1.25, rel=0.02)
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").open()))
    assert [row["phase"] for row in rows] == ["scan"] * 6 + ["coarse"] * 4 + ["update"] * 4
    assert float(rows[0]["a.factor"]) == 0.7
    assert min(abs(float(row["a.factor"]) / 1.25 - 1) for row in rows[:6]) > 0.03  # the scan did not hit it
    assert (tmp_path / "out" / "curve.png").stat().st_size > 10_000


@pytest.mark.soak
def test_a_planted_scale_and_offset_are_found(tmp_path, capsys):
    """The images of a run with factor 1.25 and row offset 6 are given as files; the search starts at 0.8 and 0."""
    store, out = tmp_path / "store", tmp_path / "out"
    sampled = ["seeds=1", "steps=3"]
    assert run.main([*COMMON, *sampled, f"out={store}", f"+variants.planted={program(1.25, 6)}"]) == 0
    learned = program("{learn: 0.8, min: 0.5, max: 2}", "{learn: 0, min: -10, max: 10}")
    search = [
        "objective=likeness",
        f"objective.images={store}",
        "objective.variant=planted",
        f"+variants.mine={learned}",
    ]
    search += ["starts=16", "updates=20", "rate=0.06", f"out={out}"]
    assert learn.main([*COMMON, *sampled, *search]) == 0
    result = json.loads((out / "result.json").read_text())
    for name, value in PLANTED.items():
        assert result["values"][name] == pytest.approx(value, rel=0.02)
    rows = list(csv.DictReader((out / "curve.csv").open()))
    assert [row["phase"] for row in rows] == ["scan"] * 16 + ["coarse"] * 10 + ["update"] * 10
    assert (float(rows[0]["a.factor"]), float(rows[0]["b.by.row"])) == (0.8, 0.0)
    assert result["held_out"]["learned"][0] > -0.1 > -0.8 > result["held_out"]["start"][0]
    printed = capsys.readouterr().out
    assert f"a.factor  {result['values']['a.factor']:.6g}" in printed
    assert (out / "curve.png").stat().st_size > 10_000


SHARPEST = [
    *COMMON, "seeds=2", "steps=1", "objective=sharpness", "updates=4", "starts=2",
    "+variants.mine={a: {op: scale, factor: {learn: 1, min: 0.5, max: 2}, origin: centre}}",
]  # fmt: skip


def test_a_stopped_search_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert learn.main([*SHARPEST, f"out={whole}"]) == 0
    gradient = Problem.gradient
    for after in (0, 2):  # in the first ascent, and in the middle of it
        calls = []

        def interrupted(self, values, calls=calls, after=after):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return gradient(self, values)

        monkeypatch.setattr(Problem, "gradient", interrupted)
        assert learn.main([*SHARPEST, f"out={stopped}"]) == 130
        assert "the same command continues from the last update" in capsys.readouterr().err
        assert len((stopped / "curve.csv").read_text().splitlines()) == 1 + 2 + after
        assert not (stopped / "result.json").exists()
    monkeypatch.setattr(Problem, "gradient", gradient)
    assert learn.main([*SHARPEST, f"out={stopped}"]) == 0
    for name in ("curve.csv", "curve.png", "cells.csv", "scores.csv", "result.json"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    assert learn.main([*SHARPEST, "rate=0.2", f"out={stopped}"]) == 2
    assert "holds another search" in capsys.readouterr().err


def test_the_result_is_an_experiment(tmp_path, capsys):
    out, store = tmp_path / "out", tmp_path / "store"
    assert learn.main([*SHARPEST, f"out={out}"]) == 0
    assert f"python -m fluxlab.run --config-dir {out} +exp=hello_learned model=tiny" in capsys.readouterr().out
    assert run.main(["--config-dir", str(out), "+exp=hello_learned", "tracking=none", f"out={store}"]) == 0
    found = fluxlab.read_run(store)
    assert found.variants == ["baseline", "start", "learned"]
    assert {row["prompt"] for row in found.metrics} == set(PROMPTS[2:])
    value = json.loads((out / "result.json").read_text())["values"]["a.factor"]
    edit = found.record["variants"]["learned"]["program"]["a"]
    assert edit["factor"] == pytest.approx(value)
    cells = {(r["variant"], int(r["seed"])): float(r["score"]) for r in csv.DictReader((out / "cells.csv").open())}
    for row in found.metrics:  # the score is the metric of the same name
        assert cells[row["variant"], row["seed"]] == pytest.approx(row["sharpness"], rel=0.05)  # of 8 bits


def test_scores_that_are_not_finite_stop_the_search(tmp_path, monkeypatch, capsys):
    bad = lambda self, values: (float("nan"), torch.zeros(1, dtype=torch.float64))  # noqa: E731
    monkeypatch.setattr(Problem, "gradient", bad)
    assert learn.main([*SHARPEST, f"out={tmp_path}"]) == 1
    assert "the score at a.factor" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_wandb_logs_offline(tmp_path):
    words = [word for word in SHARPEST if word != "tracking=none"]
    assert learn.main([*words, "tracking.mode=offline", f"out={tmp_path}"]) == 0
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_images_that_do_not_fit(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (32, 64)).save(tmp_path / "a.png")
    words = [word for word in SHARPEST if not word.startswith("objective=")] + [f"out={tmp_path / 'out'}"]
    for images, message in [
        (str(tmp_path / "a.png"), "has 64 × 32 pixels, expected 64 × 64"),
        (
            f"[{tmp_path / 'a.png'},{tmp_path / 'a.png'}]",
            "one file, or 3 files, one for each prompt, those held out last",
        ),
        (str(tmp_path / "none.png"), "not a run folder"),
    ]:
        assert learn.main([*words, "objective=likeness", f"objective.images={images}"]) == 2
        assert message in capsys.readouterr().err
