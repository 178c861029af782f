"""Shape annotations are checked under pytest only: a runtime hook would break torch.compile."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401 (the hook takes an attribute of what is imported)

install_import_hook("fluxlab", "tests.shapes.check")
