"""Shape annotations are checked under pytest only: a runtime hook would break torch.compile."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("WANDB_MODE", "offline")
# nor for the cache of whoever runs the tests; commands that a test starts share this one
os.environ["FLUXLAB_CACHE"] = tempfile.mkdtemp(prefix="fluxlab-cache-")

# PyTorch fails in bf16 attention if oneDNN uses AMX and it must not use AVX-512 itself, as on no real processor
if os.environ.get("ATEN_CPU_CAPABILITY") in ("avx2", "default"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

import pytest
import torch
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401 (the hook takes an attribute of what is imported)

ROOT = Path(__file__).parents[1]
# the hook wraps every function of a module, with shapes or not, which makes a call take ten times as long
WITH_SHAPES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted(ROOT.glob("fluxlab/**/*.py"))
    if "jaxtyping" in file.read_text(encoding="utf-8")
]
install_import_hook(WITH_SHAPES, "tests.shapes.check")
atexit.register(shutil.rmtree, os.environ["FLUXLAB_CACHE"], ignore_errors=True)
os.fsync = lambda descriptor: None  # no test cuts the power, and thousands of files are written


@pytest.fixture
def one_thread():
    """Compute with one thread. Small products can take other bits in another thread (docs/numerics.md)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
