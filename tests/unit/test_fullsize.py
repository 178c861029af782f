"""The files that `make fullsize` writes, and that it writes none on a disk without room."""

import shutil
from collections import namedtuple

import torch
from safetensors.torch import load_file

from benchmarks import fullsize
from fluxlab.model import TRANSFORMERS


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


def test_sizes_are_those_of_flux1():
    sizes = {
        name: sum(torch.Size(shape).numel() for shape in shapes.values()) for name, shapes in fullsize.files().items()
    }
    assert sizes["flux1-dev.safetensors"] == 11_901_408_320
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
