"""Values that are stored, hashed or scaled up are correctly rounded on every processor.

The expected values are computed with `decimal` or in fp64. `make test-processors` runs the tests
of this tier and of the integration tier as several kinds of processors.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from fluxlab.measure import compare
from fluxlab.model.layers import TIMESTEP_FREQUENCIES
from fluxlab.positions import Context, Layout, Program, compile_programs
from fluxlab.sampling import image_ids, text_ids

GRID, TEXT = (6, 7), 4


def context(sigmas=(1.0, 0.5, 0.0)) -> Context:
    ids = torch.cat((text_ids(1, TEXT), image_ids(1, *GRID)), dim=1)
    return Context(
        ids=ids,
        layout=Layout(TEXT, GRID, pixels_per_token=4),
        axes_dim=(4, 6, 6),
        theta=10000,
        double=1,
        single=1,
        heads=2,
        sigmas=list(sigmas),
        prompts=None,
    )


def rounded(value: Decimal) -> float:
    return torch.tensor(float(value), dtype=torch.float64).float().item()


def test_timestep_frequencies_are_correctly_rounded():
    with localcontext() as precision:
        precision.prec = 40
        exponents = -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128
        expected = [rounded(Decimal(x).exp()) for x in exponents.tolist()]
    assert TIMESTEP_FREQUENCIES.tolist() == expected


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.7, 0.9, 0.99])
def test_strength_of_a_mask_is_correctly_rounded(strength):
    program = Program.from_config({"a": {"op": "mask", "from": "image", "to": "text", "strength": strength}})
    mask = compile_programs([program], context()).at(1.0).mask[0]
    with localcontext() as precision:
        precision.prec = 40
        expected = rounded((1 - Decimal(strength)).ln())
    assert mask[..., TEXT:, :TEXT].unique().tolist() == [expected]


@pytest.mark.parametrize("degrees", [1, 17, 30, 33.3, 200])
def test_rotated_ids_use_correctly_rounded_cosines(degrees):
    program = Program.from_config({"a": {"op": "rotate", "degrees": degrees, "about": "corner"}})
    ids = compile_programs([program], context()).ids()[TEXT:].reshape(*GRID, 3)
    angle = degrees * (math.pi / 180)
    cos, sin = (torch.tensor(f(angle), dtype=torch.float64).float().item() for f in (math.cos, math.sin))
    assert ids[1, 0, 1:].tolist() == [cos, sin]  # the token one row below the corner


def test_colour_shift_is_computed_in_fp64():
    """CIELAB takes a cube root and a power of 2.4: in fp32 the mean colours are off by up to 4e-6."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    rng = np.random.default_rng(0)
    image, baseline = (rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(2))
    means = [rgb2lab(x.astype(np.float64) / 255).mean((0, 1)) for x in (image, baseline)]
    assert compare(image, baseline)["colour_shift"] == pytest.approx(float(deltaE_ciede2000(*means)), rel=1e-13)
