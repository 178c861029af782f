"""Probes in `generate` against Diffusers' pipeline with a dense softmax."""

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.probes import Probe
from tests import tiny

TEXT, STEPS, BLOCKS = 24, 2, 4


@pytest.fixture
def softmaxes(monkeypatch):
    """Record every softmax that Diffusers computes, `(B, H, N, N)`."""
    from diffusers.models.transformers import transformer_flux

    recorded = []

    def attention(q, k, v, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        recorded.append(p)
        return (p @ v).transpose(1, 2)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", attention)
    return recorded


@torch.no_grad()
def test_against_diffusers(tmp_path, softmaxes):
    theirs = tiny.diffusers_pipeline(guidance=True)
    theirs.set_progress_bar_config(disable=True)
    for name, weight in theirs.transformer.named_parameters():
        if ".norm_" in name:
            weight.add_(1)  # with random weights, attention is nearly uniform
    theirs.save_pretrained(tmp_path)
    size = {"height": 16, "width": 24}
    capture = {
        "word": {"kind": "words", "words": "cat", "direction": "image_to_word"},
        "all": {"kind": "map", "from": "all", "to": "all"},
    }
    probe = Probe(capture)
    fluxlab.load_pipeline(tmp_path).generate(
        "a red cat", 7, steps=STEPS, guidance=3.5, max_sequence_length=TEXT, probe=probe, **size
    )
    theirs(
        "a red cat",
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=TEXT,
        output_type="latent",
        **size,
    )
    assert len(softmaxes) == STEPS * BLOCKS
    expected = torch.stack(softmaxes).unflatten(0, (STEPS, BLOCKS)).transpose(0, 2).transpose(1, 2).numpy()
    found = probe.arrays
    assert np.abs(found["all"].values - expected).max() <= 1e-4  # limited by the activations of the two pipelines
    assert expected.max() > 0.1
    cat = expected[..., TEXT:, 2].reshape(1, STEPS, BLOCKS, 2, 1, 1, 4, 6)
    assert np.abs(found["word"].values - cat).max() <= 1e-4
