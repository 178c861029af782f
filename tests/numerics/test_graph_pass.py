"""Code of torch.compile on a CPU: what its products call, with the same bits, and the norm and rotation in C++."""

from collections import Counter
from dataclasses import replace
from shutil import which

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fluxlab
from fluxlab.families import architecture_of, family_of
from fluxlab.model import Flux2Params, packing
from fluxlab.model.compiling import compile_blocks, compile_options
from fluxlab.model.norm_rotate import FEW_TOKENS, norm_and_rotate
from fluxlab.model.packing import packed_weights
from fluxlab.model.rope import Rotary
from fluxlab.model.torch_ops import GRAPH_PASSES, ONEDNN_DTYPES, inductor_vector_bits
from fluxlab.sampling import Sampling
from tests.unit.test_flux import PARAMS, unchecked  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.skipif(not which("g++"), reason="no g++"),
    pytest.mark.skipif(not GRAPH_PASSES, reason="a PyTorch whose graphs are not changed"),
]
MODELS = {
    "flux1": replace(PARAMS, depth=1, depth_single_blocks=1),
    "flux2": Flux2Params(8, 8, 12, 32, 3.0, 2, 1, 1, (4, 4, 4, 4), 2000, True),
}


def calls(function) -> Counter:
    """Return how often each of fluxlab's operators is called."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        function()
    return Counter(event.name for event in events.events() if event.name.startswith("fluxlab::"))


def forward_of(params, dtype, batch):
    """Return a random model, and the arguments of a forward pass."""
    torch.manual_seed(0)
    model, family = architecture_of(params).build(params).eval().to(dtype), family_of(params)
    draw = lambda *shape: torch.randn(batch, *shape).to(dtype)  # noqa: E731
    txt_ids, img_ids = (part[None] for part in family.ids(5, [(6, 6)]))
    vectors = [draw(width) for width in family.pooled(params)] + [torch.linspace(1, 4, batch)]
    times = torch.linspace(1, 0.2, batch)
    return model, (draw(36, params.in_channels), img_ids, draw(5, params.context_in_dim), txt_ids, times, *vectors)


@pytest.mark.parametrize(("family", "dtype"), [("flux1", torch.float32), ("flux2", torch.bfloat16)])
@torch.inference_mode()
def test_bits_and_calls(family, dtype, unchecked):  # noqa: F811
    """Those without the pass, whether weights are packed or not. Python is called once for all weights."""
    if not ONEDNN_DTYPES[dtype]:
        pytest.skip("a processor without products in bf16")
    torch._dynamo.reset()
    model, inputs = forward_of(MODELS[family], dtype, 2)
    options = compile_options("inductor", "cpu")
    compiled = torch.compile(model, fullgraph=True, options=options)
    without = compile_options("inductor", "cpu", packed=False)
    expected = torch.compile(model, fullgraph=True, options=without)(*inputs)
    assert compiled(*inputs).equal(expected)
    with packed_weights(model):
        for _ in range(2):
            assert compiled(*inputs).equal(expected)
        assert len(packing._lists) == 1
        made = calls(lambda: compiled(*inputs))
    assert (made["fluxlab::all_packed"], made["fluxlab::linear"]) == (1, 0)
    assert not packing._lists
    assert "fluxlab::all_packed" not in calls(lambda: torch.compile(model, fullgraph=True, options=without)(*inputs))
    assert (expected - model(*inputs)).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * expected.std()
    torch._dynamo.reset()


def test_compiled_blocks():
    """Their sizes are not known when they are compiled. Some have a single product."""
    torch._dynamo.reset()
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")

    def latents(compiled, side, prompts):
        sampling = Sampling(2, height=side, width=side, compile=compiled)
        return pipe.sample(prompts, 0, [None] * len(prompts), sampling, output="latent")

    cases = [(side, prompts) for side in (32, 48) for prompts in (["a red cat"], ["a red cat", "a blue cat"])]
    for case in cases:
        assert (latents(True, *case) - latents(False, *case)).abs().max() < 1e-4
    made = calls(lambda: latents(True, *cases[0]))
    assert made["fluxlab::all_packed"] > 0
    assert made["fluxlab::linear"] == 0
    torch._dynamo.reset()


def test_weights_of_large_models_are_not_looked_up_together(monkeypatch):
    """They are not kept packed. A graph that packs all of its weights first needs a copy of them."""
    seen = []
    monkeypatch.setattr("fluxlab.model.compiling._compiled", lambda region, *rest: seen.append(rest) or region)
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    for limit, packed in ((1 << 30, True), (1000, False)):
        monkeypatch.setattr(packing, "PACK_BYTES", limit)
        compile_blocks(pipe.transformer)
        assert seen[-1] == ("inductor", "cpu", packed)


def heads(g, dtype, d, lengths, batch, heads):
    """Return arguments of `norm_and_rotate`: parts `(B, L, 3, H, d)`, scales, and a table for queries and keys."""
    parts = [torch.randn(batch, n, 3, 5, d, generator=g).to(dtype) for n in lengths]
    scales = [tuple(torch.randn(2, d, generator=g).to(dtype)) for _ in lengths]
    angles = torch.rand(batch, heads, sum(lengths), d // 2, generator=g) * 30
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    table = Rotary(angles.cos().to(exact), angles.sin().to(exact))
    return parts, scales, table, table


@torch.inference_mode()
def test_norm_and_rotation_in_cpp(unchecked):  # noqa: F811
    """They equal those of uncompiled code. Python is called for dtypes and widths that the C++ has not."""
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    cases = [
        (heads(g, fp32, 64, (7,), 2, 1), fp32),
        (heads(g, fp32, 32, (3, 70), 1, 5), fp32),
        (heads(g, bf16, 64, (3, 4), 2, 5), bf16),
        (heads(g, bf16, 32, (9,), 1, 1), fp32),
        (heads(g, bf16, 32, (8, 760), 1, 1), bf16),
        (heads(g, fp64, 32, (7,), 1, 1), fp64),
        (heads(g, fp32, 16, (3, 4), 2, 1), fp32),
    ]

    def all_of_them(cases):
        return [[x.to(dtype) for x in norm_and_rotate(*arguments)] for arguments, dtype in cases]

    compiled = torch.compile(all_of_them, fullgraph=True, options=compile_options("inductor", "cpu"))
    for (_, dtype), outs, both in zip(cases, compiled(cases), all_of_them(cases), strict=True):
        for out, expected in zip(outs, both, strict=True):
            assert out.dtype == dtype
            assert (out - expected).abs().max() <= max(2e-6, torch.finfo(dtype).eps) * expected.abs().max()
        few = outs[0].shape[2] < FEW_TOKENS
        assert outs[0].transpose(1, 2).is_contiguous() == few
        assert all(x.is_contiguous() for x in outs[few:])
    made = calls(lambda: compiled(cases))
    assert made["fluxlab::norm_rotate"] == 2 * 2
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [0, 256])
@torch.inference_mode()
def test_norm_and_rotation_with_shorter_vectors(bits, unchecked):  # noqa: F811
    torch._dynamo.reset()
    if bits > inductor_vector_bits():
        pytest.skip("a processor without such vectors")
    arguments = heads(torch.Generator().manual_seed(2), torch.bfloat16, 32, (3, 4), 2, 1)
    options = compile_options("inductor", "cpu") | {"cpp.simdlen": bits}
    outs = torch.compile(norm_and_rotate, fullgraph=True, options=options)(*arguments)
    for out, expected in zip(outs, norm_and_rotate(*arguments), strict=True):
        assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()
    torch._dynamo.reset()


@torch.inference_mode()
def test_which_conversions_are_in_the_cpp(unchecked):  # noqa: F811
    """That of queries without that of keys, unless somebody reads what is not converted."""
    torch._dynamo.reset()
    arguments = heads(torch.Generator().manual_seed(1), torch.bfloat16, 32, (9,), 1, 1)

    def some_converted(arguments):
        q, k = norm_and_rotate(*arguments)
        return q.to(torch.bfloat16), k.to(torch.bfloat16), k

    found = torch.compile(some_converted, fullgraph=True, options=compile_options("inductor", "cpu"))(arguments)
    q, k = norm_and_rotate(*arguments)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for out, expected, bound in zip(found, (q, k, k), (0.01, 0.01, 2e-6), strict=True):
        assert (out - expected).abs().max() <= bound * expected.abs().max()
    torch._dynamo.reset()
