"""Captured activations against forward hooks on Diffusers' blocks, in whole runs of a random checkpoint."""

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.errors import UserError
from fluxlab.model.sites import OF_HEADS, SITES
from fluxlab.probes import Probe
from tests import families, tiny
from tests.numerics.test_sites import Hooks

LENGTH, STEPS, DOUBLE = 24, 2, 2
OPTIONS = {"steps": STEPS, "max_sequence_length": LENGTH, "height": 16, "width": 24, "output": "latent"}


@pytest.fixture(scope="module", params=families.NAMES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """FLUX.1 with guidance, which is 3.5 unless it is given, and FLUX.2 without."""
    return tiny.save(tmp_path_factory.mktemp("folder")) if family == "flux1" else families.folder(family)


@pytest.fixture(scope="module")
def pipe(folder):
    return fluxlab.load_pipeline(folder, cache="none")


@pytest.fixture(scope="module")
def hooked(family, folder):
    import diffusers

    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    hooks = Hooks(theirs.transformer)
    with torch.no_grad():
        theirs(
            prompt="a red cat",
            generator=torch.Generator().manual_seed(7),
            num_inference_steps=STEPS,
            guidance_scale=3.5 if family == "flux1" else 1,
            max_sequence_length=LENGTH,
            output_type="latent",
            height=16,
            width=24,
        )
    return hooks.found  # of the last step


def capture(pipe, requests, prompts="a red cat", seeds=7, **more):
    probe = Probe(requests)
    latents = pipe.generate(prompts, seeds, probe=probe, **{**OPTIONS, **more})
    return probe.arrays, latents


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("site", SITES)
def test_against_hooks(site, kind, pipe, hooked, family):
    request = {"kind": "activation", "site": site, "blocks": kind, "steps": -1}
    if site in ("queries", "keys"):
        request["rotation"] = "before"
    found = capture(pipe, {"a": request})[0]["a"]
    blocks = range(DOUBLE) if kind == "double" else range(DOUBLE, families.BLOCKS[family])
    for n, block in enumerate(blocks):
        expected = hooked[block, site].numpy()
        assert found.values[:, 0, n].shape == expected.shape
        bound = {"flux1": 1e-4, "flux2": 3e-4}[family]  # of the latents of two pipelines; FLUX.2 here has large gates
        assert np.abs(found.values[:, 0, n] - expected).max() <= bound * expected.std()
    heads = ("head",) if site in OF_HEADS else ()
    assert found.axes == ("sample", "step", "block", *heads, "token", "channel")
    assert found.coords["stream"][1] == [kind] * len(blocks)


def test_rotated_keys_give_the_attention_of_the_block(pipe):
    """softmax(q·k) of the captured queries and keys is the captured attention map."""
    arrays, _ = capture(
        pipe,
        {
            "q": {"kind": "activation", "site": "queries", "blocks": [2]},
            "k": {"kind": "activation", "site": "keys", "blocks": [2]},
            "v": {"kind": "activation", "site": "values", "blocks": [2]},
            "o": {"kind": "activation", "site": "attention", "blocks": [2]},
            "p": {"kind": "map", "from": "all", "to": "all", "blocks": [2]},
        },
    )
    q, k, v, o, p = (torch.from_numpy(arrays[name].values).double() for name in "qkvop")
    dense = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    assert (dense - p).abs().max() <= 1e-5
    assert (dense @ v - o).abs().max() <= 1e-5 * o.std()


def test_tokens_heads_steps_and_means(pipe):
    whole = {"kind": "activation", "site": "values", "steps": [0, 1]}
    box = {"box": [1, 2, 3, 5]}
    arrays, _ = capture(
        pipe,
        {
            "whole": whole,
            "box": {**whole, "tokens": box, "heads": 1, "steps": 1, "blocks": [1, 3]},
            "mean": {**whole, "tokens": box, "average": ["tokens", "heads", "steps"]},
        },
        prompts=["a red cat", "the blue fox"],
    )
    image = arrays["whole"].values[..., LENGTH:, :]
    image = image.reshape(*image.shape[:-2], 4, 6, -1)[..., 1:3, 2:5, :]
    assert arrays["box"].axes == ("sample", "step", "block", "head", "row", "col", "channel")
    assert np.array_equal(arrays["box"].values[:, 0, :, 0], image[:, 1, [1, 3], 1])
    assert arrays["mean"].axes == ("sample", "block", "channel")
    assert np.abs(arrays["mean"].values - image.mean((1, 3, 4, 5))).max() <= 1e-5 * image.std()


def test_no_bit_of_the_image_changes(pipe):
    plain = pipe.generate("a red cat", 7, **OPTIONS)
    requests = {site: {"kind": "activation", "site": site, "blocks": "double"} for site in SITES}
    assert torch.equal(capture(pipe, requests)[1], plain)


def test_bf16(folder):
    pipe = fluxlab.load_pipeline(folder, dtype=torch.bfloat16, cache="none")
    plain = pipe.generate("a red cat", 7, **OPTIONS)
    requests = {site: {"kind": "activation", "site": site, "blocks": "single"} for site in SITES}
    arrays, latents = capture(pipe, requests)
    assert torch.equal(latents, plain)
    assert all(array.values.dtype == np.float32 and np.isfinite(array.values).all() for array in arrays.values())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"site": "key"}, "capture.a.site: 'key', expected input or queries .*; did you mean keys"),
        ({}, "capture.a.site: missing, activation needs it"),
        ({"site": "mlp"}, "mlp has 64 channels in double blocks and {mlp} in single blocks: .*blocks: double"),
        ({"site": "residual", "heads": 0}, "capture.a.heads: .*residual has no heads"),
        ({"site": "values", "rotation": "before"}, "values are not rotated"),
        ({"site": "values", "blocks": 7}, "capture.a.blocks: 7, expected a block below {blocks}"),
        ({"site": "residual", "steps": 5}, "capture.a.steps: 5, expected a step"),
    ],
)
def test_errors(pipe, family, request_, message):
    message = message.format(mlp={"flux1": 256, "flux2": 192}[family], blocks=families.BLOCKS[family])
    with pytest.raises(UserError, match=message) as error:
        capture(pipe, {"a": {"kind": "activation", **request_}})
    assert len(str(error.value).splitlines()) == 1


def test_the_budget(pipe):
    with pytest.raises(UserError, match=r"capture.max_mb: 0.1, but \d+ MB are needed"):
        capture(pipe, {"max_mb": 0.1, "a": {"kind": "activation", "site": "residual"}})


def test_keys_that_groups_see_apart(pipe):
    program = {"a": {"op": "zero", "side": "keys", "seen_by": "text"}}
    with pytest.raises(UserError, match="use rotation: before"):
        capture(pipe, {"a": {"kind": "activation", "site": "keys"}}, programs=program)
    capture(pipe, {"a": {"kind": "activation", "site": "keys", "rotation": "before"}}, programs=program)
