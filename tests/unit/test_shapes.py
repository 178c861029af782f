"""The import hook of conftest.py checks shape annotations under pytest, also those with a single axis."""

import pytest
import torch
from jaxtyping import TypeCheckError

from fluxlab.model import Flux, FluxParams

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
