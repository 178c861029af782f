"""The files that `make fullsize` writes, and that it writes none on a disk without room."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import fullsize
from fluxlab.model import TRANSFORMERS
from fluxlab.training.text2 import language_model


def test_random_files_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(fullsize, "POOL", 100)
    shapes = {"a.weight": (30, 7), "norm.scale": (5,), "layer_norm.weight": (3,), "b.bias": (40,)}
    fullsize.write_random(tmp_path / "x.safetensors", shapes)
    weights = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["norm.scale"].tolist() == [1] * 5
    assert weights["layer_norm.weight"].tolist() == [1] * 3
    assert 0.01 < weights["a.weight"].float().std() < 0.03
    assert not torch.equal(weights["a.weight"].flatten()[:40], weights["b.bias"])


def sizes_of(model: str) -> dict[str, int]:
    every = fullsize.files(model).items()
    return {name: sum(torch.Size(shape).numel() for shape in shapes.values()) for name, shapes in every}


def test_sizes_are_those_of_klein_4b():
    sizes = sizes_of("klein4b")
    assert sizes["transformer.safetensors"] == 3_875_544_576
    assert sizes["text_encoder/model.safetensors"] == 4_022_468_096
    assert list(sizes) == ["transformer.safetensors", "ae.safetensors", "text_encoder/model.safetensors"]


@pytest.mark.soak
def test_a_small_klein_is_written_and_drawn_with(tmp_path, monkeypatch, capsys):
    """The whole benchmark, with other sizes."""
    params = {"depth": 1, "depth_single_blocks": 1, "num_heads": 1, "context_in_dim": 96, "hidden_size": 128}
    monkeypatch.setitem(fullsize.TRANSFORMERS2, "klein4b", replace(fullsize.TRANSFORMERS2["klein4b"], **params))
    small = replace(fullsize.AUTOENCODERS["flux2"], ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
    monkeypatch.setitem(fullsize.AUTOENCODERS, "flux2", small)
    text = language_model(length=32, width=32, layers=28).encoder
    text.config.flux2_states = [1, 2, 28]
    shapes = {name: shape for name, shape in fullsize.shapes_of(text).items() if name != "lm_head.weight"}
    monkeypatch.setattr(fullsize, "qwen", lambda: {"text_encoder": (text.config, shapes)})
    monkeypatch.setattr("sys.argv", ["", "--model", "klein4b", "--folder", str(tmp_path), "--limit-gb", "4"])
    assert fullsize.main() == 0
    assert "limit 4 GB" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_sizes_are_those_of_flux1():
    sizes = sizes_of("dev")
    assert sizes["transformer.safetensors"] == 11_901_408_320
    assert TRANSFORMERS["dev"].guidance_embed
    assert sizes["text_encoder/model.safetensors"] == 123_060_480
    assert sizes["text_encoder_2/model.safetensors"] == 4_762_310_656


def test_a_disk_without_room(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**11, 0, 10**10))
    monkeypatch.setattr("sys.argv", ["fullsize", "--folder", str(tmp_path)])
    assert fullsize.main() == 0
    assert capsys.readouterr().out == "skipped: the disk has 10.0 GB free, 37.7 GB are needed\n"
    assert not list(tmp_path.iterdir())
