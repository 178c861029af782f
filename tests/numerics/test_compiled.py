"""The transformer under torch.compile."""

from dataclasses import replace
from shutil import which

import pytest
import torch

from fluxlab.model import Flux
from tests.unit.test_flux import PARAMS, difference, inputs, unchecked  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    ("backend", "dtype", "grad"),
    [
        pytest.param("inductor", torch.float32, False, marks=pytest.mark.skipif(not which("g++"), reason="no g++")),
        ("aot_eager", torch.float32, True),
        ("aot_eager", torch.bfloat16, False),
        ("aot_eager", torch.bfloat16, True),
    ],
)
def test_compiled_equals_eager(backend, dtype, grad, unchecked):  # noqa: F811
    """Each backend compiles one graph. The sequence is long enough for every kernel of `attend`."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Flux(replace(PARAMS, depth=1, depth_single_blocks=1)).to(dtype), inputs(2, dtype)
    for name in ("img", "img_ids"):
        x[name] = x[name].repeat(1, 25, 1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(grad):
        output, expected = compiled(**x), model(**x)
    assert difference(output, expected) <= (1e-5 if dtype == torch.float32 else 0.05)
    if grad:
        mine, theirs = (torch.autograd.grad(o.square().mean(), model.img_in.weight)[0] for o in (output, expected))
        assert difference(mine, theirs) <= (1e-4 if dtype == torch.float32 else 0.1)
