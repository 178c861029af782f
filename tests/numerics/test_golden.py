"""Outputs of the original implementation for its weights and inputs, with fractional ids that differ per sample."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams

GOLDEN = Path(__file__).parents[1] / "golden"


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.std()).item()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("name", ["dev_like", "schnell_like"])
def test_transformer(name, grad):
    flux = Flux(FluxParams(**json.loads((GOLDEN / name / "params.json").read_text())))
    flux.load_state_dict(load_file(GOLDEN / name / "flux.safetensors"), strict=True)
    inputs = load_file(GOLDEN / name / "io.safetensors")
    expected = inputs.pop("output")
    with torch.set_grad_enabled(grad):
        assert error(flux(**inputs), expected) <= 1e-5


def test_autoencoder():
    ae = AutoEncoder(AutoEncoderParams(**json.loads((GOLDEN / "ae_params.json").read_text())))
    ae.load_state_dict(load_file(GOLDEN / "ae.safetensors"), strict=True)
    io = load_file(GOLDEN / "ae_io.safetensors")
    with torch.inference_mode():
        assert error(ae.encode(io["image"]), io["latent_mean"]) <= 1e-5
        assert error(ae.decode(io["latent_mean"]), io["decoded"]) <= 1e-5
