"""Packed weights: the same bits, freed at the end, and never those of another tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fluxlab
from fluxlab.memory import costs
from fluxlab.model import linear as linears
from fluxlab.model import packing
from fluxlab.model.linear import JoinedLinear, Linear, linear
from fluxlab.model.packing import for_mkl, for_onednn, packed_weights
from fluxlab.model.torch_ops import MKL_PACKS, ONEDNN_DTYPES, PACKED_BITS

pytestmark = pytest.mark.skipif(not ONEDNN_DTYPES[torch.float32], reason="PyTorch without oneDNN")
DTYPES = [dtype for dtype, available in ONEDNN_DTYPES.items() if available]
packs = pytest.mark.skipif(not PACKED_BITS[torch.float32], reason="PyTorch whose bits change by packing in fp32")
needs_mkl = pytest.mark.skipif(not MKL_PACKS, reason="PyTorch without MKL")


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("mkl_first", [False, pytest.param(True, marks=needs_mkl)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_the_bits_are_those_without_packing(dtype, gelu, mkl_first, monkeypatch):
    monkeypatch.setattr(linears, "MKL_FIRST", mkl_first)
    for out, width in ((48, 16), (192, 576)):
        layer = Linear(width, out).to(dtype)
        for shape in ((1, width), (5, width), (2, 1, width), (1, 72, width), (3, 80, width)):
            x = drawn(*shape, dtype=dtype)
            expected = linear(x, layer.weight, layer.bias, gelu)
            with packed_weights(layer):
                for _ in range(2):
                    assert linear(x, layer.weight, layer.bias, gelu).equal(expected)
                part = layer.weight[: out // 2]
                assert linear(x, part, None, gelu).equal(linear(x, part.clone(), None, gelu))
                assert packing._packed or not PACKED_BITS[dtype]
        assert not packing._packed


@needs_mkl
@torch.inference_mode()
def test_a_sample_of_mkl_has_the_bits_of_its_own_product(monkeypatch):
    """Also where MKL's bits depend on the number of rows, which is then found out."""
    monkeypatch.setattr(linears, "MKL_FIRST", True)
    monkeypatch.setattr(linears, "_same_bits", {})
    layer, x = Linear(40, 96), drawn(3, 70, 40)
    expected = torch.cat([layer(sample) for sample in x.split(1)])
    case = (3, 70, 96, 40, torch.get_num_threads())
    assert layer(x).equal(expected)
    assert case in linears._same_bits
    right = linears.mkl_linear

    def rows_matter(x, packed, weight, bias):
        return right(x, packed, weight, bias) + 1e-6 * (x.numel() // x.shape[-1])

    monkeypatch.setattr(linears, "mkl_linear", rows_matter)
    monkeypatch.setattr(linears, "_same_bits", {})
    expected = torch.cat([layer(sample) for sample in x.split(1)])
    for _ in range(2):
        with packed_weights(layer):
            assert layer(x).equal(expected)
    assert linears._same_bits == {case: False}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_the_projection_of_joined_inputs(dtype, bias):
    """That of their concatenation, which compiled code does not make in fp32."""
    torch._dynamo.reset()
    layer, inputs = JoinedLinear(56, 40, bias).to(dtype), (drawn(2, 33, 24, dtype=dtype), drawn(2, 33, 32, dtype=dtype))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    expected = linear(torch.cat(inputs, dim=-1), layer.weight, layer.bias)
    assert layer(*inputs).equal(expected)
    with packed_weights(layer):
        for _ in range(2):
            found = compiled(*inputs)
            assert found.equal(expected) if dtype == torch.bfloat16 else (found - expected).abs().max() < 1e-6
    (graph,) = graphs
    assert any(node.target is torch.cat for node in graph.graph.nodes) == (dtype == torch.bfloat16)
    single = [x[:1, :1] for x in inputs]
    assert (compiled(*single) - layer(*single)).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_compiled_code_has_the_same_bits_with_packed_weights(dtype):
    torch._dynamo.reset()
    layer, x = Linear(24, 40).to(dtype), drawn(2, 33, 24, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for part in (x, x[:, :1], x[:1, :1]):
        exact = F.linear(part.double(), layer.weight.double(), layer.bias.double())
        expected = compiled(part)
        assert (expected - exact).abs().max() < 8 * torch.finfo(dtype).eps
        with packed_weights(layer):
            assert compiled(part).equal(expected)
            assert len(packing._packed) == (dtype != torch.float32 or part.numel() > 24)
    torch._dynamo.reset()


@packs
@torch.inference_mode()
def test_copies_are_freed():
    inner, outer = Linear(16, 32), Linear(16, 32)
    x = drawn(2, 16)
    with packed_weights(outer):
        outer(x)
        with packed_weights(inner), packed_weights(outer):
            inner(x)
            assert len(packing._packed) == 2
        assert [weight.data_ptr() for weight, _ in packing._packed.values()] == [outer.weight.data_ptr()]
    with pytest.raises(RuntimeError), packed_weights(inner):
        inner(x[:, :3])
    assert not packing._packed
    assert not packing._storages


@torch.inference_mode()
def test_other_weights_are_not_kept(monkeypatch):
    """Neither those of another model, nor of a large one, nor of one that is not there."""
    layer, other = Linear(16, 32), Linear(16, 32)
    with packed_weights(layer):
        assert for_onednn(other.weight, 5) is other.weight
        if MKL_PACKS:
            for_mkl(other.weight, 5)
        assert not packing._packed
    monkeypatch.setattr(packing, "PACK_BYTES", 1000)
    with packed_weights(layer):
        assert not packing._storages
    monkeypatch.undo()
    with torch.device("meta"):
        away = Linear(16, 32)
    with packed_weights(nn.ModuleList([layer, away])):
        assert not packing._storages


@torch.inference_mode()
def test_a_replaced_weight_is_packed_anew():
    """The address of a packed weight is not given to another one."""
    layer, x = Linear(64, 64, bias=False), drawn(3, 64)
    with packed_weights(layer):
        for seed in range(20):
            layer.weight.data = drawn(64, 64, seed=seed)
            assert (layer(x) - x @ layer.weight.T).abs().max() < 1e-4


@packs
def test_sampling_packs(monkeypatch):
    """A model that is in memory, and no other one."""
    seen = []
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    observe = lambda step, *rest: seen.append(len(packing._packed))  # noqa: E731
    options = {"steps": 2, "height": 64, "width": 64, "output": "latent"}
    packed = pipe.generate("a red cat", on_step=observe, **options)
    assert min(seen) > 20
    assert not packing._packed
    monkeypatch.setattr(packing, "PACK_BYTES", 0)
    assert pipe.generate("a red cat", on_step=observe, **options).equal(packed)
    assert seen[2:] == [0, 0]


def test_the_plan_counts_the_copies():
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    size = sum(weight.nbytes for weight in pipe.transformer.parameters())
    assert costs.packed_bytes(pipe.transformer.params, 4, "cpu") == size * (2 if linears.MKL_FIRST else 1)
    assert costs.packed_bytes(pipe.transformer.params, 2, "cpu") == size // 2
    assert costs.packed_bytes(pipe.transformer.params, 4, "cuda") == 0
