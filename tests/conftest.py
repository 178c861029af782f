"""Shape annotations are checked under pytest only: a runtime hook would break torch.compile."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

# where shapes are the contract; elsewhere the hook would turn our own errors about wrong types into its own
install_import_hook(["fluxlab.model", "fluxlab.sampling.latents"], "beartype.beartype")
