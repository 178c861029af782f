"""Shape annotations are checked under pytest only: a runtime hook would break torch.compile."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("WANDB_MODE", "offline")
# nor for the cache of whoever runs the tests; commands that a test starts share this one
os.environ["FLUXLAB_CACHE"] = tempfile.mkdtemp(prefix="fluxlab-cache-")

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401 (the hook takes an attribute of what is imported)

install_import_hook("fluxlab", "tests.shapes.check")
atexit.register(shutil.rmtree, os.environ["FLUXLAB_CACHE"], ignore_errors=True)
