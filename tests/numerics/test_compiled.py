"""The transformer under torch.compile."""

import os
import subprocess
import sys
from dataclasses import replace
from shutil import which

import pytest
import torch

from fluxlab.model import Flux
from fluxlab.model.compiling import compile_options
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
    compiled = torch.compile(model, fullgraph=True, backend=backend, options=compile_options(backend, "cpu"))
    with torch.set_grad_enabled(grad):
        output, expected = compiled(**x), model(**x)
    assert difference(output, expected) <= (1e-5 if dtype == torch.float32 else 0.05)
    if grad:
        mine, theirs = (torch.autograd.grad(o.square().mean(), model.img_in.weight)[0] for o in (output, expected))
        assert difference(mine, theirs) <= (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.skipif(not which("g++"), reason="no g++")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no AVX-512")
def test_processors_share_a_folder_of_compiled_code(tmp_path):
    """Code that a processor with AVX-512 left in inductor's folder is not used with AVX2.

    It would write 8 of every 16 numbers.
    """
    script = "\n".join(
        (
            "import torch",
            "from fluxlab.model.compiling import compile_options",
            "torch.utils.deterministic.fill_uninitialized_memory = True",
            "torch.use_deterministic_algorithms(True)",
            "f = torch.compile(lambda x: x * 2, options=compile_options('inductor', 'cpu'))",
            "assert f(torch.ones(320)).equal(torch.full((320,), 2.0))",
        )
    )
    for variables in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **variables}
        subprocess.run([sys.executable, "-c", script], env=env, check=True)
