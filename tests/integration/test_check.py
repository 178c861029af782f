"""`python -m fluxlab.check`: what is whole passes, and each fault fails the check that is there for it."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxlab import loading
from fluxlab.check import weights
from fluxlab.check.__main__ import main
from fluxlab.checkpoints import save_autoencoder, save_transformer
from fluxlab.checkpoints.manifest import write_manifest
from fluxlab.checkpoints.random import write_random
from fluxlab.checkpoints.stored import Stored, on_meta
from fluxlab.config import ModelRow
from fluxlab.files import sha256_of
from fluxlab.model import TRANSFORMERS
from fluxlab.positions import Program
from fluxlab.positions import shift_invariance as oracle
from tests import tiny

ROOT = Path(__file__).parents[2]
NAMES = [
    "files",
    "sha256",
    "loading",
    "transformer",
    "autoencoder",
    "text",
    "step",
    "shift",
    "ids",
    "images",
    "speed",
]
TRANSFORMER = Path("transformer", "diffusion_pytorch_model.safetensors")
AUTOENCODER = Path("vae", "diffusion_pytorch_model.safetensors")
T5 = Path("text_encoder_2", "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "guided", guidance=True)


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


def checked(path, capsys, *more):
    """(exit status, the lines that are ok by name, what stands on stderr)."""
    words = ["model=local", f"model.path={path}", "model.max_sequence_length=16", "device=cpu", *more]
    status = main(words)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith(("ok  ", "warning  "))]
    warned = [line.split()[1] for line in lines if line.startswith("warning")]
    rest = [line for line in out.splitlines() if line not in lines]
    if warned and status == 0:  # the last line repeats the warnings
        assert out.splitlines()[-1].startswith(f"{len(warned)} warning")
        assert f"({', '.join(warned)})" in rest.pop()
    assert not rest
    return status, {line.split()[1]: line.split(maxsplit=2)[2] for line in lines}, err


def failed(path, capsys, name, *more):
    """Return what is printed on stderr for a check that fails after all checks before it have passed."""
    status, lines, err = checked(path, capsys, *more)
    assert status == 2
    assert list(lines) == NAMES[: NAMES.index(name)]
    assert err.startswith(f"failed  {name}: ")
    assert len(err.splitlines()) <= 3
    return err


def edit(file, **changes):
    """Replace tensors of a file, or drop those that are None."""
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model_passes(model, capsys, dtype):
    status, lines, err = checked(model, capsys, f"dtype={dtype}")
    assert (status, list(lines), err) == (0, NAMES, "")
    pipe = loading.load_row(ModelRow("local", str(model)))
    for name, network in (("transformer", pipe.transformer), ("autoencoder", pipe.autoencoder)):
        tensors = network.state_dict()
        count = sum(tensor.numel() for tensor in tensors.values())
        assert lines[name].startswith(f"{count:,} parameters in {len(tensors)} tensors")
        assert lines[name].endswith("which are not published ones; stored as float32")
    assert "nothing to compare with" in lines["sha256"]
    assert f"as {dtype};" in lines["loading"]
    assert "per step of 64 × 64 px; 20 steps of 256 × 256 px: about" in lines["speed"]


def test_random_weights_are_a_warning(model, capsys):
    assert main(["model=local", f"model.path={model}", "model.max_sequence_length=16", "device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning  ")]
    assert [line.split()[1] for line in warnings] == ["step", "images"]
    assert "trained weights have more than 0.5" in warnings[0]
    assert "trained weights have more than 25" in warnings[1]
    assert lines[-1].startswith("2 warnings (step, images): ")
    assert "do not look trained" in lines[-1]


def test_trained_weights_are_known_as_such(capsys):
    assert main(["model=tiny", "device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "every file is what manifest.json says" in out
    assert out.count("as with trained weights") == 2
    assert "warning" not in out


def test_original_files_without_guidance_pass(tmp_path, capsys):
    folder = write_random(tmp_path / "random")
    pipe = loading.load_row(ModelRow("local", str(folder)))
    save_transformer(pipe.transformer, tmp_path / "flux.safetensors")
    save_autoencoder(pipe.autoencoder, tmp_path / "ae.safetensors")
    beside = f"model.autoencoder={tmp_path / 'ae.safetensors'}", f"model.text={folder}"
    status, lines, err = checked(tmp_path / "flux.safetensors", capsys, *beside)
    assert (status, list(lines), err) == (0, NAMES, "")
    assert "flux.safetensors: a transformer;" in lines["files"]


def test_the_published_sizes():
    for name, count, tensors in (("dev", 11_901_408_320, 780), ("schnell", 11_891_178_560, 776)):
        network = on_meta(TRANSFORMERS[name])
        part = Stored((), 0, Counter({torch.bfloat16: count}), torch.bfloat16)
        said = weights.counts(network, part).text
        assert said.startswith(f"{count:,} parameters in {tensors} tensors, the size of {name}")
        assert said.endswith("stored as bfloat16")
        with pytest.raises(ValueError, match=f"{count - 1:,} in the files"):
            weights.counts(network, Stored((), 0, Counter({torch.bfloat16: count - 1}), torch.bfloat16))


def test_a_flipped_bit_is_named_where_there_is_a_manifest(copy, capsys):
    write_manifest(copy)
    content = bytearray((copy / AUTOENCODER).read_bytes())
    content[-1000] ^= 1
    (copy / AUTOENCODER).write_bytes(content)
    assert str(copy / AUTOENCODER) in failed(copy, capsys, "sha256")


def test_a_flipped_bit_in_a_hub_s_cache_is_named(model, copy):
    blob = copy.parent / sha256_of(copy / TRANSFORMER)
    shutil.move(copy / TRANSFORMER, blob)
    (copy / TRANSFORMER).symlink_to(blob)
    used = [copy / TRANSFORMER, copy / AUTOENCODER]
    assert weights.hashes(copy, used).text == "1 weight file as published"
    content = bytearray(blob.read_bytes())
    content[-1000] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ValueError, match=f"{copy / TRANSFORMER}: not what was published"):
        weights.hashes(copy, used)


def test_a_truncated_file_is_named(copy, capsys):
    (copy / T5).write_bytes((copy / T5).read_bytes()[:-10])
    assert f"{copy / T5}: truncated or corrupt" in failed(copy, capsys, "files")


def test_a_missing_tensor_and_a_wrong_shape_are_named(copy, capsys):
    name = "transformer_blocks.0.attn.to_q.weight"
    edit(copy / TRANSFORMER, **{name: None, "proj_out.bias": torch.zeros(7)})
    err = failed(copy, capsys, "loading")
    assert f"1 missing ({name})" in err
    assert "proj_out.bias (7,) instead of (16,)" in err


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (T5, "encoder.block.0.layer.0.SelfAttention.q.weight"),
        (TRANSFORMER, "proj_out.weight"),
        (AUTOENCODER, "decoder.conv_out.bias"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_not_finite(copy, capsys, file, tensor, value):
    values = load_file(copy / file)[tensor]
    values.view(-1)[1] = float(value)
    edit(copy / file, **{tensor: values})
    err = failed(copy, capsys, "loading")
    assert f"tensor {tensor} holds 1 values that are not finite (the first is {value})" in err


def test_values_that_overflow_name_the_first_block(copy, capsys):
    name = "transformer_blocks.1.attn.to_out.0.weight"
    edit(copy / TRANSFORMER, **{name: 6e4 * torch.ones_like(load_file(copy / TRANSFORMER)[name])})
    assert "the velocity is not finite, first in double_blocks.1" in failed(copy, capsys, "step", "dtype=float16")


def test_an_autoencoder_that_overflows(copy, capsys):
    name = "decoder.conv_in.weight"
    edit(copy / AUTOENCODER, **{name: 6e4 * torch.ones_like(load_file(copy / AUTOENCODER)[name])})
    assert "the autoencoder returns values that are not finite" in failed(copy, capsys, "images", "dtype=float16")


def test_a_velocity_of_a_wrong_size(copy, capsys):
    edit(copy / TRANSFORMER, **{"proj_out.weight": 100 * load_file(copy / TRANSFORMER)["proj_out.weight"]})
    assert "expected 0.2 to 5" in failed(copy, capsys, "step")


def test_a_text_encoder_that_does_not_listen(copy, capsys):
    words = load_file(copy / T5)["shared.weight"]
    edit(copy / T5, **{"shared.weight": words[:1].expand_as(words).contiguous()})
    assert "T5 returns the same for" in failed(copy, capsys, "text")


def test_ids_that_are_not_used(model, capsys, monkeypatch):
    monkeypatch.setattr("fluxlab.model.norm_rotate.apply_rotary_", lambda x, table: x)
    assert "The ids are not used" in failed(model, capsys, "ids")


def test_absolute_positions_that_leak(model, capsys, monkeypatch):
    def image_only(program, by):
        return program + Program.from_config({"shift": {"op": "offset", "by": by}})

    monkeypatch.setattr(oracle, "shifted", image_only)
    assert "attention depends on differences of positions only" in failed(model, capsys, "shift")


def test_memory_that_does_not_suffice(model, capsys, monkeypatch):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(weights, "load_row", full)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert "out of memory (CUDA out of memory" in failed(model, capsys, "loading")
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    assert "out of memory (DefaultCPUAllocator" in failed(model, capsys, "loading")
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        checked(model, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=dve"], "model=dve: there is none; did you mean dev?; available: "),
        (["model=local"], "model.path"),
        (["model=dev", "dtype=int8"], "dtype=int8: expected float32"),
        (["model=dev", "device=gpu9"], "gpu9"),
        (["model=dev", "steps=3"], "steps"),
        (["model=local", "model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["-m", "model=dev,schnell"], "one model at a time"),
    ],
)
def test_misuse_ends_in_three_lines(words, message, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert len(err.strip().splitlines()) <= 3


def test_on_the_command_line_it_explains_itself(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for words in ([], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "fluxlab.check", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "model=local model.path=" in done.stdout
        assert "schnell" in done.stdout
    assert not list(tmp_path.iterdir())
