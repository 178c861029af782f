"""fluxlab: what do position ids do in a FLUX diffusion transformer?

    pipe = fluxlab.load_pipeline("tiny")             # images: pipe.generate(prompts, seeds, programs)
    experiment = fluxlab.make_experiment(...)        # variants × prompts × seeds
    run = fluxlab.run_experiment(experiment)         # the same as `python -m fluxlab.run`
    run = fluxlab.read_run("runs/article/3f2a…")     # a finished run: images, tables, attention

`fluxlab.experiment` and `fluxlab.run` are modules, the second one with `main` for command lines. Importing the package
is cheap: submodules, and torch with them, load on first use.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("checkpoints", "errors", "measure", "model", "pipeline", "positions", "probes", "sampling", "scenes")
_NAMES = {
    "load_pipeline": "loading",
    "Pipeline": "pipeline",
    "Sampling": "settings",
    "make_experiment": "api",
    "run_experiment": "api",
    "read_run": "experiment.reading",
    "UserError": "errors",
}

__all__ = ["__version__", *_SUBMODULES, *_NAMES]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"fluxlab.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"fluxlab.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'fluxlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
