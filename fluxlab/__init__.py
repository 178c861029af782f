"""fluxlab: what do position ids do in a FLUX diffusion transformer?

Importing the package costs nothing: submodules, and torch with them, load on first use.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("checkpoints", "measure", "model", "pipeline", "positions", "probes", "sampling", "scenes")
_FUNCTIONS = {"load_pipeline": "loading", "Pipeline": "pipeline", "read_run": "experiment.reading"}

__all__ = ["__version__", *_SUBMODULES, *_FUNCTIONS]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"fluxlab.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"fluxlab.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'fluxlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
