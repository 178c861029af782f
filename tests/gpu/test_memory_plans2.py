"""FLUX.2 from files of its real size, on pretended cards that are too small for it: as `test_memory_plans`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.fullsize import shapes_of
from fluxlab.checkpoints.flux2 import transformer_config, transformer_pieces
from fluxlab.checkpoints.keys import their_shapes
from fluxlab.conditioning import Texts
from fluxlab.conditioning.language_model import StoredLanguageModel
from fluxlab.config import Lora, find_row
from fluxlab.loading import load_row
from fluxlab.memory.costs import modulation_width
from fluxlab.model import AUTOENCODERS, TRANSFORMERS2, AutoEncoder2, Flux2
from fluxlab.sampling import Sampling
from tests import tiny2
from tests.gpu.fake_device import UNAVAILABLE, available, captured, pretend
from tests.gpu.real_size import language_model
from tests.gpu.test_memory_plans import GB, PROMPT, unread, write_sparse  # noqa: F401 (unread is a fixture)

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)

SHARD = 10 * GB
"""Bytes of a file at most, as on the hub. Linux does not map one that is larger than the memory."""


def write_model(path: Path, name: str) -> Path:
    """Write sparse files of a transformer, as Diffusers', of the autoencoder and of a language model."""
    params, dev = TRANSFORMERS2[name], name == "flux2dev"
    with torch.device("meta"):
        transformer, autoencoder = Flux2(params), AutoEncoder2(AUTOENCODERS["flux2"])
        encoder = language_model("mistral3" if dev else "qwen3", params.context_in_dim // 3)
    shapes = their_shapes(transformer_pieces(params), shapes_of(transformer))
    for folder in ("transformer", "text_encoder"):
        (path / folder).mkdir()
    (path / "transformer" / "config.json").write_text(json.dumps(transformer_config(params)))
    write_shards(path / "transformer" / "diffusion_pytorch_model", shapes)
    write_sparse(path / "ae.safetensors", shapes_of(autoencoder), torch.bfloat16)
    encoder.config.save_pretrained(path / "text_encoder")
    text = shapes_of(encoder)
    if not dev:
        text.pop("lm_head.weight")  # the same tensor as the embedding
    write_shards(path / "text_encoder" / "model", text)
    tiny2.tokenizer(mistral=dev).save_pretrained(path / "tokenizer")
    return path


def write_shards(stem: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    shards, room = [], 0
    for name, shape in shapes.items():
        room -= (size := 2 * torch.Size(shape).numel())
        if room < 0:
            shards.append({})
            room = SHARD - size
        shards[-1][name] = shape
    files = [f"{stem.name}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, own in zip(files, shards, strict=True):
        write_sparse(stem.parent / file, own, torch.bfloat16)
    index = {"metadata": {}, "weight_map": {name: f for f, own in zip(files, shards, strict=True) for name in own}}
    stem.with_suffix(".safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def klein4b(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("klein4b"), "klein4b")


@pytest.fixture
def encoded(monkeypatch):
    """The language model is not opened: its states are 0."""
    zeros = lambda self, prompt, length: torch.zeros(1, length, self.width).bfloat16()  # noqa: E731
    monkeypatch.setattr(StoredLanguageModel, "_encoded", zeros)


def load(folder, **more):
    """Load a pipeline as a run does: its prompts are encoded first."""
    row = replace(
        find_row(folder / "transformer"),
        autoencoder=str(folder / "ae.safetensors"),
        text=str(folder),
        max_sequence_length=512,
        **more,
    )
    return load_row(row, device="cuda", texts=Texts((PROMPT,)), cache="none")


SIZES = [
    ("klein4b", 6),
    *(pytest.param(*large, marks=pytest.mark.soak) for large in (("klein9b", 12), ("flux2dev", 24))),
]
"""Models and cards in GB. klein 4B stands for all models: only depth and width differ."""


@pytest.mark.parametrize(("name", "card"), SIZES)
def test_an_image_at_full_size(tmp_path, unread, encoded, name, card):  # noqa: F811
    """Traced ≤ planned ≤ the card, of which 1 GB stays free. The plan promises at most a tenth more than is used."""
    folder = write_model(tmp_path, name)
    with pretend("cuda", card * GB) as device:
        pipe = load(folder)
        assert pipe.transformer.params == TRANSFORMERS2[name]
        plan = pipe.prepare(Sampling(steps=1), [PROMPT])
        device.read_back.clear()
        (image,) = pipe.generate(PROMPT, steps=1)
        assert image.size == (1024, 1024)
        assert device.peak <= plan.peak_bytes <= (card - 1) * GB
        assert plan.peak_bytes <= 1.1 * device.peak
        assert 0 < len(plan.streamed) < plan.blocks
        assert device.streams.copies > len(pipe.streaming.residency.source.units)
        tables = [shape for shape, dtype in device.read_back if dtype == torch.bfloat16]
        device.read_back = [(shape, dtype) for shape, dtype in device.read_back if dtype != torch.bfloat16]
        assert tables == [(1, modulation_width(TRANSFORMERS2[name]))]  # made once, and kept on the host
        assert captured(device) == []


def test_loras_are_in_the_plan(klein4b, unread, encoded, tmp_path):  # noqa: F811
    """They are added to each block in fp32 as it is used."""
    with torch.device("meta"):
        modules = Flux2(TRANSFORMERS2["klein4b"]).named_modules()
    linear = {name: m.weight.shape for name, m in modules if isinstance(m, torch.nn.Linear) and "_blocks" in name}
    factors = {f"{name}.lora_A.weight": (8, columns) for name, (_, columns) in linear.items()}
    factors |= {f"{name}.lora_B.weight": (rows, 8) for name, (rows, _) in linear.items()}
    write_sparse(tmp_path / "lora.safetensors", factors, torch.bfloat16)
    with pretend("cuda", 6 * GB) as device:
        pipe = load(klein4b, lora=(Lora(str(tmp_path / "lora.safetensors")),))
        plan = pipe.prepare(Sampling(steps=1, height=512, width=512), [PROMPT])
        pipe.generate(PROMPT, steps=1, height=512, width=512)
        assert plan.streamed
        assert device.peak <= plan.peak_bytes <= 5 * GB


def test_text_goes_first_layer_by_layer(klein4b, unread):  # noqa: F811
    with pretend("cuda", 6 * GB) as device:
        pipe = load(klein4b)
        peak = device.peak
        plan = pipe.prepare(Sampling(steps=1), [PROMPT])
        assert plan.text == "layers"
        assert peak <= plan.phases["text"] <= 5 * GB
        assert device.live <= plan.parts["ends"] + plan.parts["autoencoder"] + plan.parts["resident"] + 10**6
