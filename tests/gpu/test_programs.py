"""Programs on a GPU give the same images as on the CPU. Skipped without a GPU."""

import pytest
import torch

import fluxlab
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

PROGRAMS = [
    None,
    {"a": {"op": "scale", "factor": 2, "origin": "centre", "strength": {"from": 1, "to": 0}}},
    {"a": {"op": "relocate", "tokens": {"words": "cat"}, "to": {"box": [0, 0, 2, 2]}}},
    {
        "a": {"op": "shuffle", "seed": 3},
        "b": {"op": "jitter", "std": 0.5},
        "c": {"op": "rotate", "degrees": 20, "heads": 1},
    },
    {"a": {"op": "warp", "field": [[[0, 0], [1, 2]]], "side": "keys", "seen_by": {"mask": ["#.", ".."]}}},
    {
        "a": {"op": "mask", "from": "image", "to": {"words": "cat"}, "steps": [1]},
        "b": {"op": "temperature", "factor": 2},
    },
    {"a": {"op": "centre", "tokens": "all"}, "b": {"op": "drop", "axes": "row", "blocks": "single"}},
]


def test_programs_match_the_cpu(tmp_path):
    folder = tiny.save(tmp_path, guidance=True)
    call = {"prompts": "a cat", "height": 32, "width": 32, "steps": 3, "max_sequence_length": 24, "output": "latent"}
    cpu, cuda = (
        fluxlab.load_pipeline(folder, device=device).generate(**call, programs=PROGRAMS).cpu()
        for device in ("cpu", "cuda")
    )
    assert (cpu - cuda).abs().max() <= 1e-3 * cpu.std()
