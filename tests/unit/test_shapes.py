"""The import hook of conftest.py checks shape annotations under pytest, also those with a single axis."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from fluxlab.model import Flux, FluxParams

ROOT = Path(__file__).parents[2]

PARAMS = FluxParams(8, 8, 8, 8, 64, 4.0, 2, 1, 0, (4, 14, 14), 10000, True, False)


def inputs() -> dict[str, torch.Tensor]:
    return {
        "img": torch.zeros(2, 6, 8),
        "img_ids": torch.zeros(2, 6, 3),
        "txt": torch.zeros(2, 4, 8),
        "txt_ids": torch.zeros(2, 4, 3),
        "timesteps": torch.zeros(2),
        "y": torch.zeros(2, 8),
    }


@pytest.mark.parametrize(
    ("name", "shape"), [("timesteps", (3,)), ("timesteps", (2, 1)), ("y", (3, 8)), ("txt", (2, 8))]
)
def test_wrong_shapes_raise(name, shape):
    flux = Flux(PARAMS)
    assert flux(**inputs()).shape == (2, 6, 8)
    with pytest.raises(TypeCheckError, match=name):
        flux(**(inputs() | {name: torch.zeros(shape)}))


def test_every_function_with_shapes_is_checked():
    files = [file for file in ROOT.glob("fluxlab/**/*.py") if re.search(r"\b(Float|Int|Bool)\[", file.read_text())]
    assert len(files) > 10
    for file in files:
        module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                functions += [f for f in vars(kind).values() if inspect.isfunction(f)]
        with_shapes = [f for f in functions if "jaxtyping" in repr(f.__annotations__)]
        assert with_shapes, module
        assert all(hasattr(f, "__wrapped__") for f in with_shapes), module
