"""Gradients with respect to gains of rotary tables and strengths of patches, against finite differences in fp64."""

from functools import partial

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab import gradients
from fluxlab.attribution import of_gains, of_patches, with_gains
from fluxlab.errors import UserError
from fluxlab.gradients import attention, denoising, likeness, sharpness
from fluxlab.positions import Program
from fluxlab.sampling import Sampling
from tests import families
from tests.numerics.test_probes import sharpen

SETTINGS = Sampling(steps=2, height=16, width=24, max_sequence_length=24)
PROMPTS, SEEDS, H = ["a red cat", "the blue fox"], [1, 2], 1e-4


@pytest.fixture(scope="module", params=families.NAMES)
def pipe(request):
    pipe = families.load(request.param)
    if request.param == "flux1":  # FLUX.2's folder has larger gates: a sharper model would multiply every rounding
        sharpen(pipe.transformer)
    pipe.transformer.double()
    pipe.autoencoder.double()
    return pipe


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def scores(pictures):
    return {
        "likeness": likeness(pictures),
        "denoising": denoising(pictures),
        "attention": attention({"indices": [1, 2], "of": "text"}, {"box": [0, 0, 2, 3]}),
        "sharpness": sharpness(),
    }


EDITED = {"a": {"op": "scale", "factor": 1.5}, "m": {"op": "temperature", "factor": 2}}
SITES = [(0, 0, 0, 3), (0, 1, 1, 10), (1, 2, 0, 0), (1, 3, 1, 8), (0, 2, 1, 15)]
PAIRS = {
    "flux1": ["index"] * 2 + ["row"] * 7 + ["col"] * 7,
    "flux2": [name for name in ("index", "row", "col", "order") for _ in range(4)],
}


@pytest.mark.parametrize("name", ["likeness", "denoising", "attention", "sharpness"])
@pytest.mark.parametrize(
    "program", [None, {"a": {"op": "scale", "factor": 1.5}, "m": {"op": "temperature", "factor": 2}}]
)
def test_gains_against_finite_differences(name, program, pipe, pictures):
    score = scores(pictures)[name]
    found = of_gains(pipe, PROMPTS, SEEDS, score, program=program, settings=SETTINGS)
    assert found.axes == ("step", "block", "head", "pair")
    shape = (2, families.BLOCKS[pipe.family.name], 2, 16)
    assert found.values.shape == shape
    assert found.coords["axis"][1] == PAIRS[pipe.family.name]
    for site in SITES:
        gains = []
        for sign in (1, -1):
            gain = torch.ones(shape, dtype=torch.float64)
            gain[site] += sign * H
            gains.append(gain)
        up, down = with_gains(pipe, PROMPTS, SEEDS, score, gains, program=program, settings=SETTINGS).mean(1)
        expected = float(up - down) / (2 * H)
        assert abs(found.values[site] - expected) <= 1e-3 * abs(expected) + 1e-12, site
    assert np.abs(found.values).max() > 1e-7


@pytest.mark.parametrize("name", ["likeness", "denoising", "attention"])
def test_patches_against_finite_differences_of_inject(name, pipe, pictures):
    """The derivative at strength 0 is that of `inject` as a program runs it, at every site."""
    score, what = scores(pictures)[name], ("queries", "keys", "values", "attention", "mlp", "residual")
    found = of_patches(pipe, PROMPTS, SEEDS, score, what=what, settings=SETTINGS)
    prepared = gradients.prepare(pipe, PROMPTS, SEEDS, SETTINGS)
    plain = gradients.compiled(prepared, Program())
    places = [(0, 0, 1), (1, 1, 0), (0, 2, 0), (1, 3, 1), (0, 1, 0), (1, 2, 0)]
    for site, (step, block, head) in zip(what, places, strict=True):
        has_heads = found[site].values.ndim == 3
        edit = {"op": "inject", "source": 0, "what": site, "blocks": block, "steps": step, "strength": H}
        edit |= {"heads": head} if has_heads else {}
        program = [Program(), Program.from_config({"a": edit})]
        interventions = fluxlab.positions.compile_interventions(program, prepared.context, 2)

        def sites(at, interventions=interventions):
            tables = [(plain.at(prepared.sigmas[at]).rotary,) * 2] * families.BLOCKS[pipe.family.name]
            return interventions.at(at, prepared.sigmas[at], tables)

        with torch.no_grad():
            moved = score(prepared, partial(gradients.stepping, prepared, plain, sites=sites))[1]
            base = score(prepared, partial(gradients.stepping, prepared, plain))[1]
        expected = float(moved - base) / H
        value = found[site].values[(step, block, head) if has_heads else (step, block)]
        assert abs(value - expected) <= 5e-3 * abs(expected) + 1e-9, (site, value, expected)  # a one-sided difference


def test_the_latents_are_those_of_generate(pipe):
    prepared = gradients.prepare(pipe, PROMPTS, SEEDS, SETTINGS)
    program = Program.from_config({"a": {"op": "scale", "factor": 0.5}})
    with torch.no_grad():
        x = gradients.sampled(prepared, gradients.stepping(prepared, gradients.compiled(prepared, program)))
    expected = pipe.sample(PROMPTS, SEEDS, [program] * 2, SETTINGS, output="latent")
    assert (x - expected).abs().max() <= 1e-5 * expected.std()  # generate keeps latents in fp32


def test_weights_get_no_gradients_and_blocks_their_forward_back(pipe, pictures):
    of_gains(pipe, PROMPTS, SEEDS, likeness(pictures), settings=SETTINGS)
    assert all(p.grad is None for p in pipe.transformer.parameters())
    assert all("forward" not in vars(block) for block in pipe.transformer.double_blocks)


def test_errors(pipe, pictures):
    score = likeness(pictures)
    for arguments, message in [
        ({"program": {"a": {"op": "ablate", "what": "mlp"}}}, "gradients are computed for edits of positions"),
        ({"settings": Sampling(true_cfg=4.0)}, "true_cfg=4.0: gradients go through one forward"),
    ]:
        with pytest.raises(UserError, match=message):
            of_gains(pipe, PROMPTS, SEEDS, score, **{"settings": SETTINGS, **arguments})
    with pytest.raises(UserError, match="expected two, the source and the target"):
        of_patches(pipe, PROMPTS[:1], SEEDS, score, settings=SETTINGS)
    with pytest.raises(UserError, match="what: 'key', expected some of input"):
        of_patches(pipe, PROMPTS, SEEDS, score, what=["key"], settings=SETTINGS)
