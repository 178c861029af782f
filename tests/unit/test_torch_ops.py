"""PyTorch's private operators against their public counterparts. Runs in seconds, for a new PyTorch version first."""

import math
import re
from pathlib import Path
from shutil import which

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fluxlab
from fluxlab.model.linear import linear
from fluxlab.model.torch_ops import (
    MKL_PACKS,
    ONEDNN_DTYPES,
    PACKED_BITS,
    TRIED_VERSIONS,
    fused_attention_with_lse,
    inductor_vector_bits,
    lerp_,
    mkl_linear,
    onednn_linear,
    pack_for_mkl,
    pack_for_onednn,
)


def test_this_pytorch_version_has_been_tried():
    version = ".".join(torch.__version__.split(".")[:2])
    assert version in TRIED_VERSIONS, (
        f"PyTorch {version}: if the other tests of this file and `make test` pass, add it to "
        "fluxlab.model.torch_ops.TRIED_VERSIONS"
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [dtype for dtype, available in ONEDNN_DTYPES.items() if available], ids=str)
@torch.inference_mode()
def test_onednn_linear(dtype, gelu, bias):
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((2, 5, 24), (40, 24), (40,)))
    b = b if bias else None
    exact = F.linear(x.double(), weight.double(), b if b is None else b.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (onednn_linear(x, weight, b, gelu) - exact).abs().max() <= bound
    assert (linear(x, weight, b, gelu) - exact).abs().max() <= bound


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_packed_linear(bias):
    g = torch.Generator().manual_seed(4)
    x, weight, b = (torch.randn(shape, generator=g) for shape in ((2, 70, 48), (40, 48), (40,)))
    b = b if bias else None
    if ONEDNN_DTYPES[torch.float32] and PACKED_BITS[torch.float32]:
        assert onednn_linear(x, pack_for_onednn(weight), b, gelu=False).equal(onednn_linear(x, weight, b, gelu=False))
    if MKL_PACKS:
        for part in (x, x[:, 6:]):
            packed = pack_for_mkl(weight, part.numel() // 48)
            assert (mkl_linear(part, packed, weight, b) - F.linear(part, weight, b)).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 33])
@torch.inference_mode()
def test_compiled_linear_in_bf16_has_the_bits_of_the_other_one(rows):
    """`F.linear`, which compiled code calls, takes oneDNN's kernel where there is one."""
    g = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(shape, generator=g).bfloat16() for shape in ((1, rows, 64), (192, 64)))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert compiled(x, weight, None).equal(linear(x, weight, None))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_fused_attention_with_lse(dtype, backend, masked):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 20, generator=g).to(dtype) for n in (33, 70, 70))
    mask = torch.randn(2, 1, 33, 70, generator=g).to(dtype) if masked else None
    with sdpa_kernel(backend):
        out, lse = fused_attention_with_lse(q, k, v, mask)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    scores = q.double() @ k.double().mT / math.sqrt(20) + (0 if mask is None else mask.double())
    assert lse.shape == (2, 3, 33)
    assert (lse - scores.logsumexp(-1)).abs().max() <= (1e-3 if dtype == torch.bfloat16 else 1e-5)


def test_interpolation_in_place():
    tensors, ends = [torch.zeros(3), torch.ones(2)], [torch.ones(3), torch.full((2,), 3.0)]
    lerp_(tensors, ends, 0.25)
    assert [tensor.tolist() for tensor in tensors] == [[0.25] * 3, [1.5] * 2]


def test_private_operators_are_called_in_one_file_only():
    root = Path(fluxlab.__file__).parent
    private = re.compile(
        r"torch\._(?!dynamo|_version__|subclasses\.fake_tensor)|torch\.ops\.(?!fluxlab\b)|\b_scaled_dot_product"
    )
    # fake tensors count memory and compute nothing; torch.ops.fluxlab are our own operators
    files = [str(file.relative_to(root)) for file in root.rglob("*.py") if private.search(file.read_text())]
    assert files == ["model/torch_ops.py"]


@pytest.mark.skipif(not which("g++"), reason="no g++")
def test_inductors_vectors_are_those_of_the_processor():
    bits = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())
    if bits is None:
        pytest.skip("another processor")
    assert inductor_vector_bits() == bits
