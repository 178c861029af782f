"""plan=true prints what the run does, and changes nothing."""

import re
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fluxlab import loading
from fluxlab.checkpoints import CheckpointError, dtype_of, files, save_autoencoder, save_transformer
from fluxlab.checkpoints.stored import is_local, on_meta, published, stored
from fluxlab.config import ModelRow, find_row, model_row
from fluxlab.engines import Inline
from fluxlab.errors import UserError
from fluxlab.experiment import runner, settings
from fluxlab.experiment.costs import forward_flops, gb
from fluxlab.experiment.notes import notes
from fluxlab.experiment.plan import plan
from fluxlab.experiment.spec import Experiment, checked
from fluxlab.experiment.store import open_store
from fluxlab.loading import pipeline_without_weights
from fluxlab.model import Flux2Params, FluxParams
from fluxlab.model.rope import Rotary
from fluxlab.positions import Program
from fluxlab.probes import WORKING, Capture, load, recorder
from fluxlab.sampling import read_schedule
from tests import families, tiny

CPU = torch.device("cpu")
VARIANTS = {
    "baseline": Program(),
    "half": Program.from_config({"a": {"op": "scale", "factor": 0.5}}),
    "same": Program(),
    "word": Program.from_config({"a": {"op": "zero", "tokens": {"words": ["cat"]}}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "guided", guidance=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "plain", guidance=False, dynamic_shift=False)


def experiment(path, **changes):
    """Return an experiment of 4 variants, two of them equal, × 2 prompts × 2 seeds at 16 × 24 px."""
    row = ModelRow("local", str(path), max_sequence_length=16)
    values = {
        "name": "test",
        "caption": "a test",
        "model": row,
        "model_digest": "m",
        "variants": VARIANTS,
        "prompts": ("a cat", "a red cat"),
        "seeds": (0, 1),
        "height": 16,
        "width": 24,
        "steps": 2,
    }
    return checked(Experiment(**{**values, **changes}))


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


@pytest.mark.parametrize(
    ("guidance", "changes", "dtype"),
    [
        (True, {}, None),
        (False, {"height": None, "width": None, "steps": None}, torch.bfloat16),
        (True, {"steps": None, "guidance": 2.0, "true_cfg": 3.0}, torch.float16),
    ],
)
def test_settings_are_those_of_the_loaded_model(folder, plain, guidance, changes, dtype):
    requested = experiment(folder if guidance else plain, **changes)
    planned = pipeline_without_weights(requested.model, stored(requested.model), dtype, CPU)
    loaded = loading.load_row(requested.model, dtype)
    for batch_tokens in (None, 120):
        assert settings.resolve(requested, planned, None, batch_tokens, 2) == settings.resolve(
            requested, loaded, None, batch_tokens, 2
        )
    assert planned.text.t5_tokenizer("a red cat").input_ids == loaded.text.t5_tokenizer("a red cat").input_ids


def test_the_dtype_of_a_row(folder, tmp_path):
    row = model_row({"name": "local", "path": str(folder), "dtype": "bfloat16"}, "here")
    for asked, used in ((None, torch.bfloat16), ("float16", torch.float16)):
        assert dtype_of(asked, row) == used
    assert loading.load_row(row).dtype == torch.bfloat16
    assert loading.load_row(row, torch.float32).dtype == torch.float32
    assert dtype_of(None, replace(row, dtype=None)) is None
    requested = experiment(folder, model=row)
    assert line_of(plan(requested, tmp_path / "run"), "computed").startswith("computed   cpu, bfloat16")
    assert requested.digest != experiment(folder, model=replace(row, dtype=None)).digest
    with pytest.raises(UserError, match="here: dtype 'half', expected one of float32, bfloat16, float16"):
        model_row({"path": "here", "dtype": "half"}, "here")


def test_settings_of_parts_with_other_dtypes_and_of_single_files(folder, tmp_path):
    pipe = loading.load_row(ModelRow("local", str(folder)))
    save_transformer(pipe.transformer.bfloat16(), tmp_path / "flux.safetensors")
    save_autoencoder(pipe.autoencoder, tmp_path / "ae.safetensors")
    row = ModelRow("local", str(tmp_path / "flux.safetensors"), None, str(tmp_path / "ae.safetensors"), str(folder))
    requested = experiment(folder, model=row)
    loaded = loading.load_row(row)
    resolved = settings.resolve(requested, pipeline_without_weights(row, stored(row), None, CPU), None, None, None)
    assert resolved == settings.resolve(requested, loaded, None, None, None)
    assert resolved.dtype == "bfloat16+float32"
    parameters = sum(weight.numel() for weight in loaded.transformer.parameters())
    assert stored(row)["transformer"].parameters == Counter({torch.bfloat16: parameters})
    assert stored(row)["transformer"].bytes_as(torch.float32) == 4 * parameters
    with pytest.raises(CheckpointError, match="holds no autoencoder; pass autoencoder="):
        stored(replace(row, autoencoder=None))
    with pytest.raises(CheckpointError, match="holds no text encoders"):
        stored(replace(row, text=str(folder / "transformer")))


def test_batches_images_and_forwards_are_those_of_the_run(folder, tmp_path, monkeypatch):
    requested, out = experiment(folder), tmp_path / "run"
    printed = plan(requested, out, batch_tokens=120)
    assert line_of(printed, "folder").endswith(f"{out} (new)")
    assert line_of(printed, "cells").endswith(
        "4 variants × 2 prompts × 2 seeds = 16, 12 distinct; and 2 controls: noise floor"
    )
    assert not out.exists()

    ran, forwards = [], []
    run_batch = runner.run_batch
    monkeypatch.setattr(runner, "run_batch", lambda *given: (ran.append(given[3]), run_batch(*given)))

    def load(row, dtype, device, texts):
        pipe = loading.load_row(row, dtype, device, texts)
        pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
        return pipe

    with open_store(out) as store:
        runner.fill(requested, store, Inline(load), batch_tokens=120)
    most = max(map(len, ran))
    assert line_of(printed, "batches").endswith(
        f"{len(ran)} of up to {most} images ({most * 40} tokens); {len(forwards)} forwards"
    )

    done = plan(requested, out)
    assert line_of(done, "folder").endswith("(holds 14 of 14 images)")
    assert line_of(done, "time").endswith("nothing to do")
    next((out / "cells").glob("*.png")).unlink()
    assert f"{len(ran)} of up to {most} images ({most * 40} tokens), 1 of them to do; 2 forwards" in plan(
        requested, out
    )
    with pytest.raises(ValueError, match=r"batch_tokens=80: the images in .* were computed with 120"):
        plan(requested, out, batch_tokens=80)


def test_a_run_prints_the_notes_of_the_plan(folder, tmp_path, capsys):
    variants = {name: Program.from_config(edits, f"variants.{name}") for name, edits in NOTED.items()}
    requested = experiment(folder, variants=variants, prompts=("a cat",), seeds=(0,), steps=1)
    lines = plan(requested, tmp_path / "run").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("notes"))
    planned = [line[11:] for line in lines[start : start + 3]]
    assert planned == [
        "half, again: neighbouring image tokens are down to 0.5 apart; models are trained with a spacing of 1",
        "same.a: changes nothing: its factor is 1",
        "word.a: has no effect: b undoes it",
    ]
    assert lines[start + 3].startswith("time")
    with open_store(tmp_path / "run") as store:
        runner.fill(requested, store, Inline(loading.load_row))
    assert [line[6:] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")] == planned
    assert notes_of(requested, folder, most=2) == [planned[0], "and 2 more; plan=true prints all"]
    with open_store(tmp_path / "run") as store:  # nothing is computed again
        runner.fill(requested, store, Inline(loading.load_row))
    assert "note: " not in capsys.readouterr().out


NOTED = {
    "baseline": {},
    "half": {"a": {"op": "scale", "factor": 0.5}},
    "again": {"a": {"op": "scale", "factor": 0.5, "origin": "centre"}},
    "same": {"a": {"op": "scale", "factor": 1}},
    "word": {
        "a": {"op": "offset", "by": 2, "tokens": {"words": ["cat"]}},
        "b": {"op": "offset", "by": -2, "tokens": {"words": ["cat"]}},
    },
}


def notes_of(requested, folder, most):
    pipe = pipeline_without_weights(requested.model, stored(requested.model), None, CPU)
    return notes(requested, pipe, settings.resolve(requested, pipe, None, 120, 1), most)


def test_a_plan_reads_no_weights_and_writes_nothing(folder, tmp_path, monkeypatch):
    import transformers

    def touched(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(files.Entry, "read", touched)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", touched)
    monkeypatch.chdir(tmp_path)
    printed = plan(experiment(folder, seeds=(4,)), tmp_path / "runs" / "x")
    assert not list(tmp_path.iterdir())
    assert line_of(printed, "files").count("float32 in 1 file") == 2
    assert "4 controls: noise floor, another seed" in line_of(printed, "cells")
    assert line_of(printed, "image").endswith("2 steps, guidance 3.5; 40 tokens: 4 × 6 image + 16 text")
    assert "  half      scale factor 0.5 on image" in printed.splitlines()
    assert re.search(r"about [\d.]+ (s|min|h), ", line_of(printed, "time"))
    parts = stored(ModelRow("local", str(folder)))
    assert line_of(printed, "memory").startswith("memory     resident, ")
    weights = gb(sum(parts[name].bytes_as(None) for name in ("transformer", "autoencoder")))
    assert f"weights {weights}, text first" in line_of(printed, "memory")


def test_true_cfg_needs_a_second_forward(folder):
    alone = line_of(plan(experiment(folder)), "batches")
    both = line_of(plan(experiment(folder, true_cfg=4.0)), "batches")
    count = [int(re.search(r"(\d+) forwards", line)[1]) for line in (alone, both)]
    assert count[1] == 2 * count[0] > 0


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"height": 18}, {}, "height=18: must be a multiple of 4"),
        ({"guidance": 3.0, "prompts": ("a dog",)}, {}, "cat"),
        ({"prompts": ("a cat " * 9,)}, {}, "max_sequence_length=16"),
        ({"variants": {"baseline": Program.from_config({"a": {"op": "zero", "blocks": [9]}})}}, {}, "blocks"),
        ({}, {"threads": 0}, "threads=0: expected a whole number"),
    ],
)
def test_a_plan_raises_the_errors_of_the_run(folder, changes, more, message):
    with pytest.raises(ValueError, match=message):
        plan(experiment(folder, **changes), **more)


def test_folders_that_are_not_stores(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not a run folder, it contains 'notes.txt' and no experiment.yaml"):
        plan(experiment(folder), tmp_path)
    with pytest.raises(ValueError, match="a file, expected a folder"):
        plan(experiment(folder), tmp_path / "notes.txt")


def test_a_folder_with_files_of_a_tracker_only_is_new(folder, tmp_path):
    (tmp_path / "wandb" / "run").mkdir(parents=True)
    (tmp_path / ".lock").touch()
    assert line_of(plan(experiment(folder), tmp_path), "folder").endswith("(new)")


def test_the_schedule_is_the_one_of_the_loaded_model(folder):
    """A transformer folder uses the original schedule, even if a scheduler folder is next to it."""
    row = ModelRow("local", str(folder / "transformer"), autoencoder=str(folder), text=str(folder))
    loaded = loading.load_row(row).schedule
    assert (
        pipeline_without_weights(row, stored(row), None, CPU).schedule == loaded != read_schedule(folder / "scheduler")
    )


def test_a_plan_says_which_schedule_was_chosen_and_why(folder, plain, tmp_path):
    assert line_of(plan(experiment(folder)), "schedule").endswith(f": as {folder}/scheduler says")
    pipe = loading.load_row(ModelRow("local", str(plain)))
    save_transformer(pipe.transformer, tmp_path / "flux.safetensors")
    row = ModelRow("local", str(tmp_path / "flux.safetensors"), None, str(plain), str(folder), like="dev")
    printed = line_of(plan(experiment(folder, model=row)), "schedule")
    assert printed == "schedule   times shifted by image size (mu 0.5 to 1.15): as model.like=dev says"
    with pytest.raises(ValueError, match=r"model\.like=dev"):
        plan(experiment(folder, model=replace(row, like=None)))


CAPTURE = {
    "where": {"kind": "words"},
    "cat": {"kind": "words", "words": ["cat"], "direction": "word_to_image", "steps": [0], "average": ["blocks"]},
    "masses": {"kind": "quadrants", "average": ["heads"]},
}


def test_a_capture_takes_the_memory_and_disk_of_the_run(folder, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(recorder, "check_budget", lambda parts, max_mb: needed.append(parts))
    requested, out = experiment(folder, capture=Capture.from_config(CAPTURE)), tmp_path / "run"
    printed = plan(requested, out, batch_tokens=120)
    with open_store(out) as store:
        runner.fill(requested, store, Inline(loading.load_row), batch_tokens=120)
    files_made = list((out / "attention").rglob("*.safetensors"))
    values = [array.values.nbytes for file in files_made for array in load(file).values()]
    line = line_of(printed, "attention")
    assert line.endswith(f"; {len(files_made)} files, {sum(values) / 1e3:.1f} kB on disk")
    one = max(load(file)["where"].values.nbytes for file in files_made)
    assert line.startswith(f"attention  where {one / 1e3:.1f} kB, cat ")
    largest = max(needed, key=lambda parts: sum(parts.values()))
    working = largest.pop(WORKING)
    batch = f"a batch {gb(sum(largest.values()))}, and {gb(working)} of working memory, of capture.max_mb=512 MB"
    assert printed.splitlines()[-1].strip() == batch
    done = plan(requested, out)
    assert line_of(done, "attention").endswith(f", {len(files_made)} stored already")
    assert "0 of them to do" in line_of(done, "batches")
    files_made[0].unlink()
    assert "1 of them to do" in line_of(plan(requested, out), "batches")
    other = replace(requested, capture=Capture.from_config({"masses": {"kind": "quadrants"}}))
    again = plan(other, out)
    assert line_of(again, "folder").endswith("(holds 14 of 14 images)")
    assert "5 of up to 3 images" in line_of(again, "batches")
    assert "4 of them to do" in line_of(again, "batches")


def test_a_capture_is_planned_for_a_language_model(tmp_path):
    requested = experiment(families.folder("flux2"), capture=Capture.from_config({"where": {"kind": "words"}}))
    printed = plan(requested, tmp_path / "run")
    assert line_of(printed, "attention").startswith("attention  where ")
    assert ", language model " in line_of(printed, "files")


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"a": {"kind": "words"}, "max_mb": 0.001}, "capture.max_mb: 0.001, but"),
        ({"a": {"kind": "words", "words": ["dog"]}}, "capture.a.words: 'dog' is not in the prompt"),
        ({"a": {"kind": "quadrants", "blocks": {"double": [7]}}}, "capture.a.blocks"),
    ],
)
def test_a_capture_raises_the_errors_of_the_run(folder, tmp_path, capture, message):
    requested = experiment(folder, capture=Capture.from_config(capture))
    with pytest.raises(ValueError, match=message) as planned:
        plan(requested)
    with open_store(tmp_path / "run") as store, pytest.raises(ValueError, match=message) as ran:
        runner.fill(requested, store, Inline(loading.load_row))
    assert str(planned.value) == str(ran.value)


def test_a_damaged_file_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{weights}: truncated or corrupt"):
        plan(experiment(copy))


@pytest.mark.parametrize(
    "p",
    [
        FluxParams(64, 64, 32, 96, 256, 4.0, 2, 3, 5, (16, 56, 56), 10000, True, False),
        Flux2Params(64, 64, 96, 256, 3.0, 2, 3, 5, (32, 32, 32, 32), 2000, False),
    ],
    ids=["flux1", "flux2"],
)
def test_flops_against_a_count_of_every_operation(p):
    text, image = 48, 80
    with FlopCounterMode(display=False) as counted, torch.inference_mode(), torch.device("meta"):
        table = torch.empty(1, 1, text + image, 64)
        inputs = [torch.empty(1, image, 64), None, torch.empty(1, text, 96), None, torch.empty(1)]
        inputs += [torch.empty(1, 32)] if isinstance(p, FluxParams) else []
        on_meta(p)(*inputs, rotary=Rotary(table, table))
    assert forward_flops(p, text, image) == pytest.approx(counted.get_total_flops(), rel=1e-3)


def test_a_published_model_before_it_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    row = find_row("dev")
    parts = published(row)
    assert (parts["transformer"].parameters.total(), parts["transformer"].tensors) == (11_901_408_320, 780)
    assert published(find_row("schnell"))["transformer"].parameters.total() == 11_891_178_560
    assert not is_local(row)
    printed = plan(experiment(tmp_path, model=row, height=None, width=None, steps=None, prompts=("a dog",)))
    assert "black-forest-labs/FLUX.1-dev, not downloaded yet" in printed
    assert "transformer 23.8 GB bfloat16, autoencoder 0.2 GB bfloat16, text encoders 9.8 GB bfloat16" in printed
    assert "1024 × 1024 px, 28 steps, guidance 3.5; 4,608 tokens: 64 × 64 image + 512 text" in printed
    assert "74.4 TFLOP per forward and image" in printed
    capture = Capture.from_config({"where": {"kind": "words"}, "masses": {"kind": "quadrants", "average": ["heads"]}})
    requested = experiment(
        tmp_path, model=row, height=None, width=None, steps=None, prompts=("a dog",), capture=capture
    )
    lines = plan(requested).splitlines()
    assert lines[-3] == "attention  where: unknown until the tokenizer is downloaded"
    assert lines[-2] == f"           masses {28 * 57 * 4 * 4 / 1e3:.1f} kB per image; 6 files, 0.2 MB on disk"
    with pytest.raises(ValueError, match="some/model: not on this machine, and its sizes are unknown"):
        plan(experiment(tmp_path, model=ModelRow("local", "some/model")))


def test_a_downloaded_model_is_found_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--some--model"
    shutil.copytree(folder, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    row = ModelRow("local", "some/model", max_sequence_length=16)
    assert is_local(row)
    assert "not downloaded yet" not in plan(experiment(tmp_path, model=row))
    assert not is_local(replace(row, path="some/model@other"))
    (root / "snapshots" / "abc" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert not is_local(row)


def test_batches_on_a_gpu_leave_memory_for_the_weights(folder, monkeypatch):
    row = ModelRow("local", str(folder))
    parts = stored(row)
    pipe = pipeline_without_weights(row, parts, None, CPU)
    weights = sum(part.bytes_as(None) for part in parts.values())
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=pipe.dtype, transformer=pipe.transformer, streaming=None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    loaded = settings.default_batch_tokens(gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9 + weights, 10**9 + weights))
    assert settings.default_batch_tokens(gpu, weights) == loaded
