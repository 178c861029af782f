"""Products in code of torch.compile: calls of C++ by weights that one operator looks up, with the same bits."""

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
from fluxlab.model.packing import packed_weights
from fluxlab.model.torch_ops import GRAPH_PASSES, ONEDNN_DTYPES
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


def test_graphs_of_large_models_are_not_changed(monkeypatch):
    """Their weights are not kept packed. A graph that packs all of its weights first needs a copy of them."""
    name = "post_grad_custom_pre_pass"
    seen = []
    monkeypatch.setattr("fluxlab.model.compiling._compiled", lambda region, *rest: seen.append(rest) or region)
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    for limit, packed in ((1 << 30, True), (1000, False)):
        monkeypatch.setattr(packing, "PACK_BYTES", limit)
        compile_blocks(pipe.transformer)
        assert (name in compile_options(*seen[-1])) == packed
