"""Runs from the command line: finished, killed, resumed, changed, mistyped."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from fluxlab import run as command_line
from fluxlab.experiment.reading import read_store
from tests import processes, tiny

SOAK = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), guidance=True)


def arguments(model, out, *more):
    """Return the arguments of a run of 3 variants × 2 prompts × 2 seeds, three cells per batch."""
    return [
        *tiny.run_of(model),
        "steps=2",
        "batch_tokens=120",
        "+variants.half={a: {op: scale, factor: 0.5}}",
        "+variants.moved={a: {op: offset, by: 3}}",
        f"out={out}",
        *more,
    ]


def start(*words):
    return processes.start("fluxlab.run", *words)


def contents(folder):
    """Return the files that must not depend on interruptions: images, their JSON, tables, the grid."""
    names = ["grid.png", "metrics.csv", "references.csv", "summary.csv"]
    parts = [folder / name for name in names]
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in [*parts, *folder.glob("cells/*"), *folder.glob("references/*")]
    }


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert command_line.main(arguments(model, out)) == 0
    return out


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_a_run_with_compiled_blocks(finished, model, tmp_path):
    """It ends well, and its images differ from the others by rounding only."""
    done = processes.run("fluxlab.run", *arguments(model, tmp_path / "run", "compile=true"))
    assert done.returncode == 0, done.stderr
    run, plain = read_store(tmp_path / "run"), read_store(finished)
    for variant in run.variants:
        a, b = (np.asarray(Image.open(r.image(variant, "a cat", 1))).astype(int) for r in (run, plain))
        assert abs(a - b).max() <= 1


def test_a_store_has_everything(finished):
    run = read_store(finished)
    assert run.variants == ["baseline", "half", "moved"]
    assert len(run.metrics) == 12
    assert len(list((finished / "cells").glob("*.png"))) == 12
    images = {v: np.asarray(Image.open(run.image(v, "a cat", 1))).astype(int) for v in run.variants}
    assert images["half"].shape == (16, 24, 3)
    assert abs(images["half"] - images["baseline"]).max() > 0
    assert run.cell("baseline", "a cat", 1)["psnr"] == float("inf")
    assert run.cell("half", "a cat", 1)["ssim"] < 1
    assert [r["variant"] for r in run.references] == ["noise floor"] * 2 + ["another seed"] * 4
    floor = [r["rmse"] for r in run.references if r["variant"] == "noise floor"]
    ceiling = [r["rmse"] for r in run.references if r["variant"] == "another seed"]
    assert max(floor) < 1 < min(ceiling)
    assert {row["variant"] for row in run.summary} >= {"half", "moved", "noise floor", "another seed"}
    listed = [json.loads(line)["file"] for line in (finished / "manifest.jsonl").read_text().splitlines()]
    files = [p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()]
    assert set(files) - set(listed) <= {"manifest.jsonl", ".lock"}


def test_the_same_command_again_writes_nothing(model, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    assert command_line.main(arguments(model, finished)) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_missing_cell_is_computed_again_bit_for_bit(model, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    expected = contents(finished)
    for file in sorted((out / "cells").glob("*.png"))[::5]:
        file.unlink()
    (out / "grid.png").unlink()
    damaged = sorted((out / "cells").glob("*.png"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert command_line.main(arguments(model, out)) == 0
    assert contents(out) == expected


def test_a_changed_experiment_keeps_the_old_images(model, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    old = {p.name: p.read_bytes() for p in (out / "cells").iterdir()}
    requested = [a for a in arguments(model, out) if "batch_tokens" not in a and "moved" not in a]
    assert command_line.main([*requested, "variants.half.a.factor=0.7"]) == 0
    run = read_store(out)
    assert run.variants == ["baseline", "half"]
    assert len(run.metrics) == 8
    assert "0.7" in run.describe("half")
    kept = {p.name: p.read_bytes() for p in (out / "cells").iterdir()}
    assert old.items() <= kept.items()
    assert len(kept) == len(old) + 8  # four images of half and their JSON
    assert run.record["settings"]["batch_tokens"] == 120  # as in the folder
    printed = capsys.readouterr().out
    assert "the experiment has changed: 8 images in" in printed
    assert "left out of the tables: half (4), moved (4)" in printed


def test_another_experiment_in_the_same_folder_is_refused(model, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    for more in (["name=other"], ["name=other", "plan=true"]):
        assert command_line.main(arguments(model, out, *more)) == 2
        assert "holds the experiment 'hello', this one is 'other'; name another folder" in capsys.readouterr().err
    assert contents(out) == before
    assert read_store(out).record["name"] == "hello"


def test_a_cut_table_is_refused_and_the_run_restores_it(model, finished, tmp_path, capsys):
    from fluxlab.report.__main__ import main as report

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    expected = contents(out)
    content = (out / "metrics.csv").read_bytes()
    (out / "metrics.csv").write_bytes(content[: len(content) // 2])
    assert report([str(out), "-o", str(tmp_path / "page.html")]) == 2
    assert "metrics.csv: it is not the file that manifest.jsonl lists" in capsys.readouterr().err
    assert command_line.main(arguments(model, out)) == 0
    assert contents(out) == expected


def test_a_damaged_record_is_written_again(model, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    content = (out / "experiment.yaml").read_bytes()
    for cut in (len(content) // 2, len(content) - 100):
        (out / "experiment.yaml").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"experiment\.yaml: "):
            read_store(out)
        assert command_line.main(arguments(model, out)) == 0
        assert "experiment.yaml: damaged, written again" in capsys.readouterr().out
        assert contents(out) == contents(finished)
        assert read_store(out).record["settings"] == read_store(finished).record["settings"]


@pytest.fixture
def contrast():
    """A metric that is added after a run."""
    from fluxlab.measure import METRICS, Sample, metric

    @metric("contrast of the luma", "0..1", shown=1)
    def contrast(image: Sample) -> float:
        """Standard deviation of the luma."""
        return image.luma.std()

    yield contrast
    del METRICS["contrast"]


def test_a_metric_that_is_added_is_measured_by_the_next_call(model, finished, tmp_path, contrast, monkeypatch, capsys):
    from fluxlab.experiment import runner

    def computed(*_):
        raise AssertionError("an image was computed again")

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    monkeypatch.setattr(runner, "run_batch", computed)
    assert command_line.main(arguments(model, out)) == 0
    run = read_store(out)
    assert all(row["contrast"] > 0 for row in [*run.metrics, *run.references])
    assert "contrast (0..1)" in capsys.readouterr().out
    assert "contrast" in (out / "report.html").read_text()
    assert list(run.metrics[0])[-1] == "contrast"


def test_measure_computes_the_tables_again(model, finished, tmp_path, monkeypatch):
    from fluxlab.experiment import effects

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    measured, real = [], effects.measure
    monkeypatch.setattr(effects, "measure", lambda *given: (measured.append(1), real(*given)))
    assert command_line.main(arguments(model, out)) == 0
    assert not measured
    assert command_line.main(arguments(model, out, "measure=true")) == 0
    assert measured
    assert contents(out) == contents(finished)


def test_a_cell_with_nan_has_no_image_and_the_others_are_finished(model, finished, tmp_path, monkeypatch, capsys):
    from fluxlab.errors import NonFiniteError
    from fluxlab.pipeline import Pipeline

    real = Pipeline.sample

    def sample(self, prompts, seeds, programs, settings, **options):
        images = real(self, prompts, seeds, programs, settings, **options)
        bad = [i for i, program in enumerate(programs) if program and "offset" in program.describe() and seeds[i] == 1]
        if not bad:
            return images
        reasons = dict.fromkeys(bad, "its latents are not finite after step 2 of 2")
        kept = [None if i in bad else image for i, image in enumerate(images)]
        raise NonFiniteError("not finite", dict.fromkeys(bad, 1), reasons, None if len(bad) == len(kept) else kept)

    monkeypatch.setattr(Pipeline, "sample", sample)
    out = tmp_path / "run"
    assert command_line.main(arguments(model, out)) == 1
    errors = capsys.readouterr().err
    assert "2 images not written" in errors
    assert "moved, prompt 'a cat', seed 1: its latents are not finite after step 2 of 2" in errors
    assert "Traceback" not in errors
    run = read_store(out)
    missing = {key for key, file in run.images.items() if not file.is_file()}
    assert missing == {("moved", "a cat", 1), ("moved", "a red dog", 1)}
    assert np.isnan(run.cell("moved", "a cat", 1)["ssim"])
    assert "missing" in (out / "report.html").read_text()
    monkeypatch.setattr(Pipeline, "sample", real)
    assert command_line.main(arguments(model, out)) == 0
    assert contents(out) == contents(finished)


def test_a_store_is_continued_with_its_own_settings_only(model, finished, capsys):
    requested = [a for a in arguments(model, finished) if "batch_tokens" not in a]
    assert command_line.main([*requested, "batch_tokens=240"]) == 2
    assert "batch_tokens=240: the images in" in capsys.readouterr().err
    assert command_line.main([*requested, "threads=64"]) == 2


def killed_and_resumed(model, out, times, seed):
    """Kill a run `times` times, each when a random file appears, then let it finish. Returns the number of kills."""
    undisturbed = out.parent / "undisturbed"
    first = start(*arguments(model, undisturbed))
    assert first.wait() == 0, first.read()
    files = sorted((f for f in undisturbed.rglob("*") if f.is_file()), key=lambda f: f.stat().st_mtime_ns)
    kills = 0
    for n in sorted(random.Random(seed).sample(range(len(files) - 1), times)):
        process = start(*arguments(model, out))
        wanted = out / files[n].relative_to(undisturbed)
        while not wanted.is_file() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    last = start(*arguments(model, out))
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors
    assert contents(out) == contents(undisturbed)
    assert not list(out.rglob("*.part"))
    return kills


def test_killed_at_random_writes_and_resumed(model, tmp_path):
    assert killed_and_resumed(model, tmp_path / "run", 3, seed=0) >= 1


@pytest.mark.soak
def test_killed_often(model, tmp_path):
    for i in range(SOAK // 4):
        assert killed_and_resumed(model, tmp_path / str(i) / "run", 4, seed=i) >= 1


def test_killed_at_every_write_and_resumed(model, finished, tmp_path, monkeypatch):
    """Stop a run before and after each of its renames."""
    from fluxlab import files

    class Killed(BaseException):
        pass

    out, real = tmp_path / "run", os.replace
    for instant in range(200):
        count = 0

        def replace(source, target, stop=instant):
            nonlocal count
            if count == stop // 2:
                if stop % 2:
                    real(source, target)
                raise Killed
            count += 1
            real(source, target)

        monkeypatch.setattr(files.os, "replace", replace)
        try:
            assert command_line.main(arguments(model, out)) == 0
            break
        except Killed:
            if instant % 7:  # continue most runs, start some again
                continue
            monkeypatch.setattr(files.os, "replace", real)
            assert command_line.main(arguments(model, out)) == 0
            assert contents(out) == contents(finished)
            shutil.rmtree(out)
    monkeypatch.setattr(files.os, "replace", real)
    assert command_line.main(arguments(model, out)) == 0
    assert contents(out) == contents(finished)


def test_a_second_process_is_refused(model, tmp_path):
    from fluxlab.experiment.store import open_store

    with open_store(tmp_path / "run"):
        second = start(*arguments(model, tmp_path / "run"))
        _, errors = second.communicate(timeout=600)
    assert second.returncode == 2
    assert "another process is running in this folder" in errors


def test_interrupted_from_the_keyboard(model, tmp_path):
    process = start(*arguments(model, tmp_path / "run", "seeds=40"))
    while not list((tmp_path / "run" / "cells").glob("*.json")):
        assert process.poll() is None, process.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("interrupted; finished images are kept")
    assert "Traceback" not in errors


def test_out_of_memory_halves_the_batch_and_prints_it_once(model, finished, tmp_path, monkeypatch, capsys):
    import torch

    from fluxlab.pipeline import Pipeline

    real = Pipeline.sample

    def small(self, prompts, *args, **kwargs):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return real(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "sample", small)
    assert command_line.main(arguments(model, tmp_path / "run")) == 0
    printed = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert printed == ["out of memory: batch_tokens 120 → 60, kept for this folder"]
    assert read_store(tmp_path / "run").record["settings"]["batch_tokens"] == 60

    def never(self, prompts, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pipeline, "sample", never)
    assert command_line.main(arguments(model, tmp_path / "other")) == 2
    assert "out of memory with one image of 16 × 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["prompts_file=/nowhere.txt"], "/nowhere.txt: "),
        (["prompts=[]"], "prompts=[]: expected at least one"),
        (["seeds=-1"], "seeds=-1"),
        (["seeds=[-1]"], "seeds=[-1]: -1, expected whole numbers"),
        (["height=18"], "height=18: must be a multiple of"),
        (["device=gpu9"], "gpu9"),
        (["variants.half.a.op=scael"], "variants.half.a.op: 'scael'"),
        (["variants.half.a.factor=wide"], "variants.half.a.factor: 'wide'"),
        (["+variants.half.a.factr=2"], "variants.half.a.factr"),
        (["+variants.cat={a: {op: zero, tokens: {words: [elephant]}}}"], "variants.cat.a.tokens"),
        (["~variants.baseline"], "baseline=baseline: no such variant"),
        (["guidance=nan"], "guidance=nan"),
        (["stepz=2"], "stepz: there is no such key"),
        (["model=tinny"], "model=tinny: there is none"),
        (["+op@variants.mine.a=skale"], "skale"),
        (["dtype=float8"], "dtype='float8': expected float32"),
        (["plugins=[no_such_module]"], "no_such_module"),
        (["name=../../up"], "name=../../up"),
        (["clip=/nowhere"], "/nowhere"),
    ],
)
def test_errors_have_at_most_three_lines(model, tmp_path, capsys, more, message):
    replaced = {word.split("=")[0].removesuffix("_file") for word in more}
    kept = [a for a in arguments(model, tmp_path / "run") if a.split("=")[0] not in replaced]
    if more[0].startswith("model="):
        kept = [a for a in kept if not a.startswith("model.")]
    assert command_line.main([*kept, *more]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert 1 <= len(errors.strip().splitlines()) <= 3
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())  # a run that does not start leaves nothing


def test_a_damaged_checkpoint(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert command_line.main(arguments(broken, tmp_path / "run")) == 2
    errors = capsys.readouterr().err
    assert str(weights) in errors
    assert len(errors.strip().splitlines()) <= 3


WORDS = """
+exp=article +exp=hello +exp=zero +exp= exp=hello +exp=nothing model=tiny model=local model= steps=1
steps=0 steps=-1 steps=a steps=[1] steps=1e3 height=8 height=17 height=-8 width=0 width=1.5 seeds=1
seeds=[] seeds={a:1} seeds=1,2 prompts=[] prompts=x prompts=[1] prompts=[a,a] prompts=['','']
prompts_file=/ prompts_file= variants={} variants=1 variants.baseline=1 variants.baseline.a=1
~variants ~variants.baseline ~model +variants.x={a:{op:zero}} +variants.x={a:1} +variants.x=[1]
+op@variants.y.a=zero +op@variants.y.a=nope +op@=zero @= = == + ~ a= =a a=b +a=b ++a.b.c=1
baseline=x baseline= device=cuda device=cpu:7 device=é dtype=int8 guidance=1e400 guidance=a
true_cfg=-inf negative_prompt=x batch_tokens=0 batch_tokens=-1 threads=0 threads=-2 out= plan=maybe
plan=true plugins=[os.nope] clip=x/y/z dino=1 name=/ name='' hydra.run.dir=/tmp/x
hydra/launcher=none --cfg --bogus '${oc.env:HOME}' caption=${nothing} steps=${steps} prompts='['
prompts="{" seeds=[1,
""".split()  # noqa: SIM905


def fuzz(model, folder, count, seed, capsys):
    rng = random.Random(seed)
    inside = folder / "inside"
    inside.mkdir()
    os.chdir(inside)
    base = [f"model.path={model}", "+exp=hello", "model=local", "steps=1", "height=16", "width=24", "tracking=none"]
    for _ in range(count):
        words = [w for w in base if rng.random() > 0.05] + rng.choices(WORDS, k=rng.randint(1, 4))
        rng.shuffle(words)
        words.append(f"out={folder / 'store'}")
        try:
            code = command_line.main(words)
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        assert code in (0, 2), (words, printed.err)
        assert "Traceback" not in printed.err, (words, printed.err)
        if code == 2:
            assert 1 <= len(printed.err.strip().splitlines()) <= 3, (words, printed.err)
        shutil.rmtree(folder / "store", ignore_errors=True)
        assert not list(inside.iterdir()), words  # nothing outside the store


def test_fuzzed_overrides(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fuzz(model, tmp_path, 20, 0, capsys)


@pytest.mark.soak
def test_many_fuzzed_overrides(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fuzz(model, tmp_path, 500, 1, capsys)
