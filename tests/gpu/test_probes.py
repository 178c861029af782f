"""Probes on a GPU: the log-sum-exp of every kernel, and results equal to those of the CPU. Skipped without a GPU."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fluxlab
from fluxlab.model.attention import attend
from fluxlab.probes import Probe
from tests import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@pytest.fixture(autouse=True)
def exact_matmul():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [20, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@torch.inference_mode()
def test_log_sum_exp_of_every_kernel(kernel, dtype, width, masked):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 70, 3, width), (2, 333, 3, width), (2, 333, 3, width)]
    q, k, v = (torch.randn(*shape, generator=g, device="cuda").to(dtype).transpose(1, 2) for shape in shapes)
    mask = torch.randn(2, 1, 70, 333, generator=g, device="cuda").to(dtype) if masked else None
    calls = []
    with sdpa_kernel(kernel):
        try:
            plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        except RuntimeError:
            pytest.skip("this kernel does not support the case on this GPU")
        probed = attend(q, k, v, mask, calls.append)
    assert probed.shape == plain.shape
    assert (probed.float() - plain.float()).abs().max() <= 2 * torch.finfo(dtype).eps * plain.abs().max()
    scores = q.double() @ k.double().mT / math.sqrt(width) + (0 if mask is None else mask.double())
    assert calls[0].lse.shape == (2, 3, 70)
    assert (calls[0].lse - scores.logsumexp(-1)).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-3)


def test_results_equal_those_of_the_cpu(tmp_path):
    folder = tiny.save(tmp_path, guidance=True)
    call = {"prompts": "a cat", "height": 32, "width": 24, "steps": 2, "max_sequence_length": 24, "output": "latent"}
    programs = [
        None,
        {
            "a": {"op": "zero", "side": "keys", "seen_by": "text"},
            "b": {"op": "mask", "from": "image", "to": {"words": "cat"}},
        },
        {"a": {"op": "temperature", "factor": 2}, "b": {"op": "rotate", "degrees": 20, "heads": 1}},
    ]
    found = []
    for device in ("cpu", "cuda"):
        probe = Probe({**Probe("full").capture.to_config(), "all": {"kind": "map", "from": "all", "to": "all"}})
        fluxlab.load_pipeline(folder, device=device).generate(**call, programs=programs, probe=probe)
        found.append(probe.arrays)
    cpu, cuda = found
    assert list(cpu) == list(cuda)
    for name, one in cpu.items():
        if name != "peak":  # nearly equal weights may be ranked differently
            np.testing.assert_allclose(cuda[name].values, one.values, atol=1e-3 * max(1, np.abs(one.values).max()))
    assert np.abs(cuda["all"].values.sum(-1) - 1).max() <= 1e-5


def test_bf16_sums_to_one(tmp_path):
    pipe = fluxlab.load_pipeline(tiny.save(tmp_path, guidance=False), device="cuda", dtype=torch.bfloat16)
    probe = Probe({"all": {"kind": "map", "from": "image", "to": "all"}})
    pipe.generate("a cat", height=64, width=64, steps=1, max_sequence_length=24, output="latent", probe=probe)
    assert np.abs(probe.arrays["all"].values.sum(-1) - 1).max() <= 1e-3
