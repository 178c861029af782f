"""A training run, whole: killed and resumed, exported, loaded by two libraries; and the model that ships."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fluxlab
from fluxlab.checkpoints import CheckpointError
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.compose import compose
from fluxlab.config import config_folder
from fluxlab.train import main, run
from fluxlab.training.recipe import Recipe
from fluxlab.training.state import locked
from tests import processes

SHIPPED = Path(fluxlab.__file__).parent / "assets" / "tiny"
MICRO = [
    "+train=tiny_small_d", "tracker=none", "device=cpu", "threads=1", "hidden_size=64", "depth=1",
    "depth_single_blocks=1", "t5_width=32", "clip_width=32", "text_layers=1", "pool=16", "pool_early=16",
    "pool_other=4", "batch=2", "early_batch=2", "workers=0", "warmup=2", "sample_steps=1", "save_every=2",
    "sample_every=100", "autoencoder.ch=32", "autoencoder.crop=16", "autoencoder.steps=3", "autoencoder.polish=1",
    "autoencoder.batch=2", "autoencoder.whole_batch=1", "guidance_steps=6", "guidance_batch=2",
]  # fmt: skip


def start(out: Path, steps: int) -> processes.Started:
    return processes.start("fluxlab.train", *MICRO, f"out={out}", f"steps={steps}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run = start(out, 8)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return out


@pytest.mark.parametrize("stage", ["state", "guidance"])
def test_a_killed_run_goes_on_to_the_same_weights(undisturbed, tmp_path, stage):
    out = tmp_path / "killed"
    run = start(out, 8)
    deadline = time.monotonic() + 300
    while not (out / f"{stage}.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (out / "pipeline").exists()
    again = start(out, 8)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    for name in ("state.safetensors", "autoencoder.safetensors", "guidance.safetensors"):
        one, two = load_file(undisturbed / name), load_file(out / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (undisturbed / "curve.csv").read_text() == (out / "curve.csv").read_text()
    files = [p.relative_to(undisturbed) for p in (undisturbed / "pipeline").rglob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        assert (undisturbed / file).read_bytes() == (out / file).read_bytes()


def test_a_run_leaves_no_pickle_and_a_manifest(undisturbed):
    kinds = {p.suffix for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}
    assert kinds <= {".safetensors", ".json", ".csv", ".png"}
    verify_manifest(undisturbed / "pipeline")
    training = json.loads((undisturbed / "pipeline" / "training.json").read_text())
    assert training["steps"] == 8
    assert training["command"].startswith("python -m fluxlab.train +train=tiny_small_d")


def test_a_second_trainer_in_the_same_folder_is_refused(tmp_path, capsys):
    with locked(tmp_path):
        assert main([*MICRO, f"out={tmp_path}", "steps=2"]) == 2
    assert f"out={tmp_path}: another process uses this folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_another_recipe_in_the_same_folder_is_an_error_of_use(undisturbed, tmp_path, capsys):
    out = tmp_path / "other"
    shutil.copytree(undisturbed, out)
    assert main([*MICRO, "threads=null", f"out={out}", "steps=8", "hidden_size=128"]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_the_export_s_weights_are_the_average_in_bf16(undisturbed):
    state = load_file(undisturbed / "guidance.safetensors")
    pipe = fluxlab.load_pipeline(undisturbed / "pipeline")
    average = state["ema.transformer.img_in.weight"]
    assert torch.equal(pipe.transformer.img_in.weight, average.bfloat16())
    assert not torch.equal(average, state["net.transformer.img_in.weight"])
    taught_by = load_file(undisturbed / "state.safetensors")["ema.transformer.img_in.weight"]
    assert not torch.equal(average, taught_by)


def test_a_run_continues_another_model(undisturbed, tmp_path, capsys):
    begun = undisturbed / "pipeline"
    slow = ["lr=1e-7", "adam_lr=1e-7", "text_lr=1e-7", "guidance_steps=0", "steps=2"]
    assert main([*MICRO, *slow, f"start={begun}", f"out={tmp_path / 'on'}"]) == 0
    assert not (tmp_path / "on" / "autoencoder.safetensors").exists()
    old, new = (load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
                for folder in (begun, tmp_path / "on" / "pipeline"))  # fmt: skip
    assert all(torch.allclose(old[name].float(), new[name].float(), atol=1e-3, rtol=1e-2) for name in old)
    file = "vae/diffusion_pytorch_model.safetensors"
    assert (begun / file).read_bytes() == (tmp_path / "on" / "pipeline" / file).read_bytes()
    facts = json.loads((tmp_path / "on" / "pipeline" / "training.json").read_text())
    assert facts["start"]["steps"] == 8
    assert len(facts["start"]["weights"]) == 12
    capsys.readouterr()
    assert main([*MICRO, f"start={begun}", f"out={tmp_path / 'wide'}", "hidden_size=128"]) == 2
    assert f"start={begun}: its networks are not those of the recipe" in capsys.readouterr().err


def test_a_recipe_runs_the_one_from_which_it_starts(undisturbed, tmp_path, monkeypatch):
    """With a configuration folder of two recipes: the whole of `+train=tiny`, small."""
    folder = shutil.copytree(config_folder(), tmp_path / "configs")
    small = dict(word.lstrip("+").split("=") for word in MICRO[2:] if "." not in word) | {"steps": "8", "name": "x"}
    parts = dict(word.removeprefix("autoencoder.").split("=") for word in MICRO if word.startswith("autoencoder."))
    body = "".join(f"{key}: {value}\n" for key, value in small.items())
    body += "autoencoder: {" + ", ".join(f"{key}: {value}" for key, value in parts.items()) + "}\n"
    (folder / "train" / "first.yaml").write_text(f"# @package _global_\ndefaults: [tiny_small_d, _self_]\n{body}")
    (folder / "train" / "then.yaml").write_text(
        f"# @package _global_\ndefaults: [tiny, _self_]\nstart: +train=first\n{body}"
    )
    monkeypatch.setattr("fluxlab.compose.configs.config_folder", lambda: folder)
    monkeypatch.setattr("fluxlab.compose.session.config_folder", lambda: folder)
    command = ["+train=then", "tracker=none", f"out={tmp_path / 'out'}", "steps=2", "guidance_steps=0"]
    assert main(command) == 0
    first = tmp_path / "out" / "start" / "pipeline"
    for file in undisturbed.glob("pipeline/*/*.safetensors"):  # the first recipe is MICRO
        assert file.read_bytes() == (first / file.relative_to(undisturbed / "pipeline")).read_bytes()
    facts = json.loads((tmp_path / "out" / "pipeline" / "training.json").read_text())
    assert facts["steps"] == 2
    assert facts["start"]["command"].startswith("python -m fluxlab.train +train=first device=cpu tracker=none")
    assert facts["start"]["steps"] == 8
    monkeypatch.setattr("fluxlab.train._read", lambda words: pytest.fail("the first recipe runs again"))
    run(replace(compose("train_schema", Recipe, "train_schema", command), steps=2), command)


def test_the_embedded_model_s_recipe_is_what_made_its_weights():
    """Stage by stage: the numbers that the shipped model's card states are those of the recipe."""
    made = json.loads((SHIPPED / "training.json").read_text())
    last = compose("train_schema", Recipe, "train_schema", ["+train=tiny"])
    first = compose("train_schema", Recipe, "train_schema", [last.start])
    assert not last.small_d
    assert first.small_d
    assert first.start is None
    for recipe, stage in ((last, made), (first, made["start"])):
        assert stage["notes"] == []
        assert (recipe.seed, recipe.steps) == (stage["seed"], stage["steps"])
        early = round(recipe.early * recipe.steps)
        assert early * recipe.early_batch + (recipe.steps - early) * recipe.batch == stage["samples"]
        assert asdict(recipe)["guidance_steps"] == stage["guidance"]["steps"]
        assert recipe.guidance_batch == stage["guidance"]["batch"]
        assert recipe.guidance == stage["guidance"]["scale"]


def test_a_flipped_bit_in_an_exported_folder_is_named(undisturbed, tmp_path):
    copy = shutil.copytree(undisturbed / "pipeline", tmp_path / "pipeline")
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.safetensors: not what manifest"):
        verify_manifest(copy)


def test_any_trained_folder_can_be_measured(undisturbed, tmp_path):
    copy = shutil.copytree(undisturbed / "pipeline", tmp_path / "pipeline")
    script = Path(__file__).parents[2] / "benchmarks" / "embedded.py"
    command = [sys.executable, script, "--model", copy, "--cells", "2", "--steps", "1", "--sheet", tmp_path / "s.png"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((copy / "embedded.json").read_text())
    assert results["edits"]["as trained"]["ssim"] == [1.0, 1.0, 1.0]
    assert set(results["edits"]) == {"as trained", "all zero", "× 0.5", "× 2", "× 1.2", "axis 0 = 1"}
    assert "`axis 0 = 1`" in (copy / "README.md").read_text()
    verify_manifest(copy)  # the card is no part of it


def test_diffusers_makes_the_same_images():
    import diffusers

    ours = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    theirs = diffusers.FluxPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["A cat holding a sign that says hello world", "a blue ring above a green square", ""]
    for seed, prompt in enumerate(prompts):
        height, width = ours.size if seed else (48, 80)
        (image,) = ours.generate(prompt, seed, height=height, width=width, steps=6)
        other = theirs(
            prompt,
            height=height,
            width=width,
            num_inference_steps=6,
            max_sequence_length=ours.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        assert image.size == other.size == (width, height)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_the_shipped_folder_is_what_its_manifest_says_and_small():
    verify_manifest(SHIPPED)
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 32e6
    assert not {p.suffix for p in files} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    for file in SHIPPED.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} <= {torch.bfloat16, torch.int64}


def test_a_flipped_bit_is_reported_by_name_on_loading(tmp_path):
    copy = shutil.copytree(SHIPPED, tmp_path / "tiny")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"transformer/diffusion_pytorch_model\.safetensors"):
        fluxlab.load_pipeline(copy)


def test_the_model_card_is_made_from_what_was_measured():
    from fluxlab.training.card import card

    results = json.loads((SHIPPED / "embedded.json").read_text())
    training = json.loads((SHIPPED / "training.json").read_text())
    assert card(results, training, SHIPPED) == (SHIPPED / "README.md").read_text()
    assert results["cells"] >= 64
    assert results["steps"] >= 20
