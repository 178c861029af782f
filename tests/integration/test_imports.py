"""What a run imports: a library that it does not need costs every run its time."""

import json
import subprocess
import sys

import pytest

RUN = """
import json, sys
from fluxlab.run import main
assert main(sys.argv[1:]) == 0
print("modules:" + json.dumps(sorted(sys.modules)))
"""
NEVER = {
    "diffusers",
    "wandb",
    "ray",
    "xarray",
    "pandas",
    "torchvision",
    "IPython",
    "submitit",
    "scipy.stats",
    "matplotlib",
}
"""matplotlib draws programs, and this run has none. scipy.stats takes half a second."""
SLOW = {"transformers", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
"""What transformers' networks import: about two seconds. FLUX.1's prompts are encoded without them."""
OF_FLUX2 = {
    "fluxlab.checkpoints.flux2",
    "fluxlab.checkpoints.text2",
    "fluxlab.conditioning.language_model",
    "fluxlab.model.text2",
    "fluxlab.schedules.flux2",
    "fluxlab.training",
}
"""The modules that a family names. A run of FLUX.1 needs its own ones only."""
BUDGET = 2200
"""Modules of a run. 1,960 were imported when this was written."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The modules of a run that encodes its prompt, and of one that finds it in the cache."""
    folder = tmp_path_factory.mktemp("imports")
    found = []
    for out in ("cold", "warm"):
        words = ["+exp=hello", "steps=2", "tracking=none", f"cache={folder / 'cache'}", f"out={folder / out}"]
        ran = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found.append(set(json.loads(ran.stdout.partition("modules:")[2])))
    return found


def test_a_run_does_not_import_what_it_does_not_use(imported):
    for modules in imported:
        assert not modules & NEVER
        assert not modules & OF_FLUX2


def test_a_run_does_not_import_transformers(imported):
    cold, warm = imported
    assert not cold & SLOW
    assert not warm & SLOW
    assert len(cold) <= BUDGET


def test_importing_the_package_is_cheap():
    code = (
        "import fluxlab, sys; print(len({'torch', 'numpy', 'hydra', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "0"
