"""Golden tensors and images on a GPU. Skipped without one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fluxlab
from fluxlab.checkpoints import load_transformer
from fluxlab.errors import NonFiniteError
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def exact_matmul():
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@pytest.mark.parametrize("name", ["dev_like", "schnell_like"])
def test_golden_transformer(name):
    params = fluxlab.model.FluxParams(**json.loads((GOLDEN / name / "params.json").read_text()))
    model = load_transformer(GOLDEN / name / "flux.safetensors", params=params, device="cuda")
    io = {key: value.cuda() for key, value in load_file(GOLDEN / name / "io.safetensors").items()}
    expected = io.pop("output")
    with torch.inference_mode():
        assert (model(**io) - expected).abs().max() <= 1e-5 * expected.std()


def test_images_equal_those_of_the_cpu(tmp_path):
    folder = tiny.save(tmp_path, guidance=True)
    common = {"prompts": "a cat", "height": 32, "width": 32, "steps": 4, "max_sequence_length": 24}
    cpu, cuda = (fluxlab.load_pipeline(folder, device=device).generate(**common)[0] for device in ("cpu", "cuda"))
    assert np.abs(np.asarray(cpu).astype(int) - np.asarray(cuda).astype(int)).max() <= 1


def test_to_moves_a_pipeline_to_the_gpu_and_back(tmp_path):
    pipe = fluxlab.load_pipeline(tiny.save(tmp_path, guidance=True), device="cpu")
    common = {"prompts": "a cat", "height": 32, "width": 32, "steps": 2, "max_sequence_length": 24}
    first, on_gpu, again = (pipe.to(device).generate(**common)[0] for device in ("cpu", "cuda", "cpu"))
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert np.abs(np.asarray(first).astype(int) - np.asarray(on_gpu).astype(int)).max() <= 1


def test_non_finite_latents_are_reported_on_a_gpu(tmp_path):
    pipe = fluxlab.load_pipeline(tiny.save(tmp_path, guidance=False), device="cuda", dtype=torch.float16)
    with torch.no_grad():
        pipe.transformer.final_layer.linear.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="not finite after step 1 of 2") as raised:
        pipe.generate(["a cat", "a dog"], [0, 1], height=32, width=32, steps=2, max_sequence_length=24)
    assert raised.value.steps == {0: 0, 1: 0}
