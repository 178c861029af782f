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
from fluxlab.check import held
from fluxlab.check.__main__ import main
from fluxlab.checkpoints import save_autoencoder, save_transformer
from fluxlab.checkpoints.manifest import write_manifest
from fluxlab.checkpoints.random import write_random
from fluxlab.checkpoints.stored import Stored, on_meta
from fluxlab.config import ModelRow
from fluxlab.files import sha256_of
from fluxlab.model import TRANSFORMERS
from fluxlab.positions import Program
from fluxlab.positions import noise as oracle
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
    "pictures",
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
    lines = [line.removeprefix("ok  ") for line in out.splitlines()]
    assert all(line.startswith("ok  ") for line in out.splitlines())
    return status, {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}, err


def failed(path, capsys, name, *more):
    """What is said on stderr of a check that fails after all before it were ok."""
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
        assert lines[name].endswith("which are not FLUX.1's; stored as float32")
    assert "nothing to compare with" in lines["sha256"]
    assert f"as {dtype};" in lines["loading"]
    assert "trained weights have more than 0.5" in lines["step"]  # these are random
    assert "trained weights have more than 25" in lines["pictures"]
    assert "a step of 64 × 64 px; 20 steps of 256 × 256 px: about" in lines["speed"]


def test_trained_weights_are_known_as_such(capsys):
    assert main(["model=tiny", "device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "every file is what manifest.json says" in out
    assert out.count("as trained weights have it") == 2


def test_original_files_without_guidance_pass(tmp_path, capsys):
    folder = write_random(tmp_path / "random")
    pipe = loading.load_row(ModelRow("local", str(folder)))
    save_transformer(pipe.transformer, tmp_path / "flux.safetensors")
    save_autoencoder(pipe.autoencoder, tmp_path / "ae.safetensors")
    beside = f"model.autoencoder={tmp_path / 'ae.safetensors'}", f"model.text={folder}"
    status, lines, err = checked(tmp_path / "flux.safetensors", capsys, *beside)
    assert (status, list(lines), err) == (0, NAMES, "")
    assert "a transformer alone" in lines["files"]


def test_the_published_sizes():
    for name, count, tensors in (("dev", 11_901_408_320, 780), ("schnell", 11_891_178_560, 776)):
        network = on_meta(TRANSFORMERS[name])
        part = Stored((), 0, Counter({torch.bfloat16: count}), torch.bfloat16)
        said, _ = held.counts(network, part)
        assert said.startswith(f"{count:,} parameters in {tensors} tensors, the size of {name}")
        assert said.endswith("stored as bfloat16")
        with pytest.raises(ValueError, match=f"{count - 1:,} in the files"):
            held.counts(network, Stored((), 0, Counter({torch.bfloat16: count - 1}), torch.bfloat16))


def test_a_flipped_bit_is_named_where_there_is_a_manifest(copy, capsys):
    write_manifest(copy)
    weights = bytearray((copy / AUTOENCODER).read_bytes())
    weights[-1000] ^= 1
    (copy / AUTOENCODER).write_bytes(weights)
    assert str(copy / AUTOENCODER) in failed(copy, capsys, "sha256")


def test_a_flipped_bit_in_a_hub_s_cache_is_named(model, copy):
    blob = copy.parent / sha256_of(copy / TRANSFORMER)
    shutil.move(copy / TRANSFORMER, blob)
    (copy / TRANSFORMER).symlink_to(blob)
    used = [copy / TRANSFORMER, copy / AUTOENCODER]
    assert held.hashes(copy, used) == ("1 weight file as published", None)
    weights = bytearray(blob.read_bytes())
    weights[-1000] ^= 1
    blob.write_bytes(weights)
    with pytest.raises(ValueError, match=f"{copy / TRANSFORMER}: not what was published"):
        held.hashes(copy, used)


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
    ("file", "tensor", "name", "message"),
    [
        (T5, "encoder.block.0.layer.0.SelfAttention.q.weight", "text", "T5 gives values that are not finite"),
        (TRANSFORMER, "proj_out.weight", "step", "the velocity is not finite"),
        (AUTOENCODER, "decoder.conv_out.bias", "pictures", "the autoencoder gives values that are not finite"),
    ],
)
def test_values_that_are_not_finite(copy, capsys, file, tensor, name, message):
    edit(copy / file, **{tensor: torch.full_like(load_file(copy / file)[tensor], float("nan"))})
    assert message in failed(copy, capsys, name)


def test_a_velocity_of_a_wrong_size(copy, capsys):
    edit(copy / TRANSFORMER, **{"proj_out.weight": 100 * load_file(copy / TRANSFORMER)["proj_out.weight"]})
    assert "0.2 to 5 is expected" in failed(copy, capsys, "step")


def test_a_text_encoder_that_does_not_listen(copy, capsys):
    words = load_file(copy / T5)["shared.weight"]
    edit(copy / T5, **{"shared.weight": words[:1].expand_as(words).contiguous()})
    assert "T5 gives the same for" in failed(copy, capsys, "text")


def test_ids_that_are_not_used(model, capsys, monkeypatch):
    monkeypatch.setattr("fluxlab.model.layers.apply_rotary_", lambda x, table: x)
    assert "The ids are not used" in failed(model, capsys, "ids")


def test_absolute_positions_that_leak(model, capsys, monkeypatch):
    def image_only(program, by):
        return program + Program.from_config({"shift": {"op": "offset", "by": by}})

    monkeypatch.setattr(oracle, "shifted", image_only)
    assert "attention sees differences of positions only" in failed(model, capsys, "shift")


def test_memory_that_does_not_suffice(model, capsys, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(held, "load_row", full)
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
        (["model=dve"], "model=dve: there is none; available: "),
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
