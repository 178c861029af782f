"""Attention captured in a run: images do not change, arrays do not depend on interruptions, and labels are right."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab import files, loading
from fluxlab import run as command_line
from fluxlab.checkpoints.random import write_random
from fluxlab.compose import compose
from fluxlab.engines import Inline
from fluxlab.experiment.cells import batches, cells
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.runner import fill
from fluxlab.experiment.store import open_store
from fluxlab.pipeline import Pipeline
from fluxlab.probes import Probe, of_sample, similarity
from tests import processes

CAT, DOG = "a cat", "the red dog, a cat"
# the maps of all words; of one word whose position differs between prompts; and a request with two outputs
CAPTURE = [
    "capture=words",
    "+capture.cat={kind: map, from: {words: [cat]}, to: image, average: [steps, blocks, heads]}",
    "+capture.far={kind: distance, average: [steps, heads, tokens]}",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model"))


def arguments(model, *more):
    """3 variants × 2 prompts × 2 seeds in batches of three, with different prompts and programs in a batch."""
    return [
        "+exp=hello",
        "model=local",
        f"model.path={model}",
        "model.max_sequence_length=24",
        "tracking=none",
        "height=16",
        "width=24",
        "steps=2",
        "seeds=2",
        f"prompts=['{CAT}','{DOG}']",
        "batch_tokens=144",
        "+variants.half={a: {op: scale, factor: 0.5}}",
        "+variants.word={a: {op: offset, by: 3, tokens: {words: [cat]}}}",
        *more,
    ]


def run(model, out, *more):
    return command_line.main(arguments(model, f"out={out}", *more))


def experiment_of(model, *more):
    config = compose("config", command_line.RunConfig, "schema", arguments(model, *more))
    return command_line.read(config)


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    assert run(model, out) == 0
    return out


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(model, out, *CAPTURE) == 0
    return out


def contents(folder, *kinds):
    """Return the bytes of images, their JSON files and tables; with "attention" also of the arrays and their index."""
    kept = [*folder.glob("*.csv"), folder / "grid.png"]
    kept += [p for kind in ("cells", "references", *kinds) for p in (folder / kind).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept if p.exists()}


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_images_equal_those_without_a_capture(model, plain, finished):
    assert contents(plain) == contents(finished)
    assert experiment_of(model).digest == experiment_of(model, *CAPTURE).digest  # so that both can use one folder
    assert not (plain / "attention").exists()


def test_the_arrays_equal_those_of_generate(model, finished):
    experiment, made = experiment_of(model, *CAPTURE), read_store(finished)
    with open_store(finished) as store:
        settings = store.settings()
    pipe = loading.load_row(experiment.model)
    compositions = set()
    for batch in batches(cells(experiment, settings), settings):
        probe = Probe(experiment.capture)
        prompts, programs = [cell.prompt for cell in batch], [cell.program for cell in batch]
        pipe.generate(
            prompts,
            [cell.seed for cell in batch],
            programs,
            height=settings.height,
            width=settings.width,
            steps=settings.steps,
            probe=probe,
        )
        compositions.add((len(set(prompts)), len({program.digest for program in programs})))
        for i, cell in enumerate(batch):
            found = made.captured(cell.variant, cell.prompt, cell.seed)
            assert list(found) == ["words", "cat", "far.offset", "far.histogram"]
            for name, one in of_sample(probe.arrays, i).items():
                assert found[name].values.tobytes() == one.values.tobytes()
                assert (found[name].axes, found[name].coords) == (one.axes, dict(one.coords))
    assert (2, 2) in compositions  # a batch with prompts of different lengths and different programs
    half, word = (made.captured(variant, CAT, 0)["words"].values for variant in ("half", "word"))
    assert np.abs(half - word).max() > 0


def test_the_index_lists_the_files_of_cells(finished):
    made = read_store(finished)
    text = (finished / "attention" / "index.json").read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=1, ensure_ascii=False) + "\n"
    assert made.attention == index["cells"]
    places = [(row["variant"], row["prompt"], row["seed"], row["cell"]) for row in made.attention]
    assert places == [(row["variant"], row["prompt"], row["seed"], row["cell"]) for row in made.metrics]
    assert all(row["file"] == f"attention/{index['digest']}/{row['cell']}.safetensors" for row in made.attention)
    assert fluxlab.probes.Capture.from_config(index["capture"]).to_config() == index["capture"]
    sealed = {json.loads(line)["file"] for line in (finished / "manifest.jsonl").read_text().splitlines()}
    assert sealed >= {"attention/index.json", *(row["file"] for row in made.attention)}
    with pytest.raises(KeyError):
        made.captured("half", CAT, 7)


def test_capture_can_be_turned_on_later_and_off_again(model, plain, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    images = times(out / "cells") | times(out / "references")
    assert run(model, out, *CAPTURE) == 0
    assert f"{out}/attention" in capsys.readouterr().out.splitlines()[-1]
    assert contents(out, "attention") == contents(finished, "attention")
    assert {p: p.stat().st_mtime_ns for p in images} == images  # never rewritten

    def never(*_):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(loading, "load_row", never)
    before = times(out)
    assert run(model, out, *CAPTURE) == 0
    assert times(out) == before
    assert run(model, out, *CAPTURE, "capture.max_mb=900") == 0  # the same arrays, whatever the budget
    assert run(model, out) == 0
    assert read_store(out).attention == []
    assert not (out / "attention" / "index.json").exists()
    arrays = {p: t for p, t in before.items() if p.suffix == ".safetensors"}
    assert len(arrays) == 12
    assert {p: p.stat().st_mtime_ns for p in arrays} == arrays


def test_a_damaged_file_is_computed_again(model, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    first, second, *_ = sorted(out.glob("attention/*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-7])
    second.unlink()
    others = {p: t for p, t in times(out).items() if p not in (first, second) and p.parent.name != "run"}
    assert run(model, out, *CAPTURE) == 0
    assert contents(out, "attention") == contents(finished, "attention")
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_interruption_at_every_write(model, tmp_path, monkeypatch):
    """Stop before and after each rename, then resume."""
    more = [*CAPTURE, "~variants.word", "prompts=['a cat']"]
    experiment, pipe, real = experiment_of(model, *more), loading.load_row(experiment_of(model).model), os.replace

    class Killed(BaseException):
        pass

    def filled(out, stop=None):
        count = 0

        def replace_until(source, target):
            nonlocal count
            count += 1
            if stop is not None and count == stop // 2 + 1:
                if stop % 2:
                    real(source, target)
                raise Killed
            real(source, target)

        monkeypatch.setattr(files.os, "replace", replace_until)
        with open_store(out) as store:
            fill(experiment, store, Inline(lambda *_: pipe), batch_tokens=144)
        return count

    writes = filled(tmp_path / "uninterrupted")
    expected = contents(tmp_path / "uninterrupted", "attention")
    assert len(expected) == 4 * 3 + 1 + 2  # image, JSON and arrays of each cell; the index; the noise floor
    for stop in range(2 * writes):
        out = tmp_path / str(stop)
        with pytest.raises(Killed):
            filled(out, stop)
        filled(out)
        assert contents(out, "attention") == expected, stop


def test_killed_and_resumed(model, finished, tmp_path):
    out = tmp_path / "run"
    threads = f"threads={torch.get_num_threads()}"
    process = processes.start("fluxlab.run", *arguments(model, f"out={out}", *CAPTURE), threads)
    while not list(out.glob("attention/*/*.safetensors")):
        assert process.poll() is None, process.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (out / "attention" / "index.json").exists()
    assert run(model, out, *CAPTURE) == 0
    assert contents(out, "attention") == contents(finished, "attention")
    assert not list(out.rglob("*.part"))


def test_a_capture_over_the_budget_is_refused_before_the_run(model, plain, tmp_path, capsys):
    large = "+capture.all={kind: map, from: image, to: image}"  # 37 kB per image and 8.41 MB of working memory
    assert run(model, tmp_path / "run", large, "capture.max_mb=8.43") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[0].startswith("capture.max_mb: 8.43, but 9 MB are needed (working memory 8.4")
    assert len(error) == 2  # a single image needs more
    assert run(model, tmp_path / "run", large, "capture.max_mb=8.5") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[2] == "Or batch_tokens=96, for fewer images at a time."
    assert not list(tmp_path.iterdir())
    before = times(plain)
    assert run(model, plain, large, "capture.max_mb=8.5") == 2
    assert "batch_tokens=96 with another out= folder" in capsys.readouterr().err
    assert times(plain) == before
    less = [a for a in arguments(model, f"out={tmp_path / 'run'}", large, "capture.max_mb=8.5") if "_tokens" not in a]
    assert command_line.main([*less, "batch_tokens=96"]) == 0  # the proposed value works


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["+capture.x={kind: words, words: [dog]}"], f"capture.x.words: 'dog' is not in .*\n.* prompt is '{CAT}'"),
        (["+capture.x={kind: words, words: [elephant]}"], r"capture\.x\.words: 'elephant' is not in the prompt"),
        (["capture=words", "capture.words.steps=[5]"], r"capture\.words\.steps"),
        (["capture=words", "capture.words.blocks=0-9"], r"capture\.words\.blocks"),
        (["capture=words", "capture.words.average=[stepz]"], r"capture\.words\.average\[0\]: 'stepz'.* mean steps"),
        (["+capture.x={kind: wrods}"], r"capture\.x\.kind: 'wrods'"),
        (["+capture.x=3"], r"capture\.x: 3"),
        (["+capture.kind=words"], "a request without a name"),
        (["capture.max_mb=0"], r"capture\.max_mb: 0, expected a number above 0"),
        (["capture=wrods"], "capture=wrods: there is none; .*available: concepts, distance, full, none, words"),
        (["+capture.x={kind: similarity}"], r"capture\.x\.kind: similarity.*\n.*fluxlab\.probes\.similarity"),
    ],
)
def test_mistakes_are_reported_in_three_lines(model, tmp_path, capsys, more, message):
    import re

    assert run(model, tmp_path / "run", *more) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors
    assert 1 <= len(errors.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_out_of_memory_halves_the_batch(model, tmp_path, monkeypatch, capsys):
    real, calls = Pipeline.sample, []

    def small(self, prompts, *args, **kwargs):
        calls.append((len(prompts), kwargs["probe"] is not None))
        if kwargs["probe"] is not None and len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "sample", small)
    assert run(model, tmp_path / "run", "~variants.word", *CAPTURE) == 0
    assert capsys.readouterr().err.count("out of memory: batch_tokens 144 → 72") == 1
    assert calls == [(3, True), *[(1, True)] * 8, *[(1, False)] * 2]  # references are not captured
    assert len(read_store(tmp_path / "run").attention) == 8


def test_presets(model, tmp_path):
    assert run(model, tmp_path / "run", "~variants.word", "seeds=1", "capture=full", "capture.words.average=[]") == 0
    words = fluxlab.probes.read(tmp_path / "run", variants="half", prompts=[CAT])["words"]
    assert words.shape == (1, 1, 1, 2, 4, 2, 2, 2, 4, 6)
    assert run(model, tmp_path / "run", "~variants.word", "seeds=1", "capture=distance") == 0
    found = fluxlab.probes.read(tmp_path / "run")
    assert list(found) == ["distance.offset", "distance.histogram"]
    assert len(list((tmp_path / "run" / "attention").glob("*/"))) == 2  # the earlier arrays remain


def test_variants_with_equal_programs_share_arrays(model, tmp_path):
    more = ["~variants.word", "~variants.half", "+variants.same={}", "seeds=1", *CAPTURE]
    assert run(model, tmp_path / "run", *more) == 0
    rows = read_store(tmp_path / "run").attention
    assert len(rows) == 4
    assert len({row["file"] for row in rows}) == 2
    words = fluxlab.probes.read(tmp_path / "run")["words"]
    np.testing.assert_array_equal(words.sel(variant="same"), words.sel(variant="baseline"))


def test_read_combines_all_cells(finished):
    found, made = fluxlab.probes.read(finished), read_store(finished)
    words = found["words"]
    assert words.dims[:3] == ("variant", "prompt", "seed")
    assert words.dims[3:] == made.captured("half", CAT, 0)["words"].axes
    assert words.variant.values.tolist() == ["baseline", "half", "word"]
    assert words.prompt.values.tolist() == [CAT, DOG]
    assert words.word.values.tolist() == ["a", "cat", "the", "red", "dog"]  # in order of appearance
    assert words.sigma.dims == ("step",)
    assert words.stream.values.tolist() == ["double"] * 2 + ["single"] * 2
    cell = {"variant": "half", "seed": 1}
    assert bool(words.sel(prompt=CAT, word="dog").isnull().all())
    for prompt in (CAT, DOG):
        own = made.captured("half", prompt, 1)["words"]
        np.testing.assert_array_equal(words.sel(prompt=prompt, word=own.labels("word"), **cell), own.values)
    cat = found["cat"]
    own = made.captured("half", DOG, 1)["cat"]
    np.testing.assert_array_equal(cat.sel(prompt=DOG, **{"from": own.labels("from")}, **cell), own.values)
    assert found["far.offset"].notnull().all()
    assert words.attrs["unit"] == "probability"


def test_read_selects_cells(finished, plain, tmp_path):
    some = fluxlab.probes.read(finished, variants=["word", "baseline"], prompts=CAT, seeds=1)["words"]
    assert some.shape[:3] == (2, 1, 1)
    assert some.word.values.tolist() == ["a", "cat"]
    assert some.variant.values.tolist() == ["word", "baseline"]
    for wrong, message in (
        ({"variants": "hafl"}, "variants='hafl': not found, expected some of baseline, half, word"),
        ({"prompts": []}, r"prompts=\[\]: not found"),
        ({"seeds": [0, 9]}, "seeds=9: not found, expected some of 0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            fluxlab.probes.read(finished, **wrong)
    for captured in (fluxlab.probes.read, lambda folder: read_store(folder).captured("half", CAT, 0)):
        with pytest.raises(ValueError, match="run its command again with capture=words"):
            captured(plain)
    file = finished / read_store(finished).attention[0]["file"]
    assert fluxlab.probes.read(file)["words"].dims[0] == "step"
    with pytest.raises(ValueError, match="seeds= selects cells of a run folder"):
        fluxlab.probes.read(file, seeds=0)
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "index.json").write_text('{"cells": [{}]}')
    with pytest.raises(ValueError, match=r"index\.json: cannot be read \(variant is missing\)"):
        fluxlab.probes.read(tmp_path)


def test_maps_are_compared_across_cells(finished):
    words = fluxlab.probes.read(finished)["words"]
    alike = similarity(words, words.sel(variant="baseline"))
    assert alike.dims == words.dims[:-2]
    np.testing.assert_allclose(alike.sel(variant="baseline", prompt=DOG), 1)
    changed = alike.sel(variant="half", prompt=DOG)
    assert bool((changed < 1 - 1e-9).any())
    made = read_store(finished)
    one, other = (made.captured(variant, DOG, 0)["words"] for variant in ("half", "baseline"))
    np.testing.assert_allclose(similarity(one, other).values, changed.sel(seed=0, word=one.labels("word")))
    assert replace(one).axes[:-2] == similarity(one, other).axes
