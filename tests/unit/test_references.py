"""Reference images as arguments: what is accepted, refused, and labelled."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlab
from fluxlab import references
from fluxlab.errors import UserError
from fluxlab.probes import Probe

SQUARE = Image.new("RGB", (16, 16), "red")
OPTIONS = {"steps": 1, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny", dtype=torch.float32)


@pytest.fixture(scope="module", params=["tiny", "tiny2"])
def either(request):
    return fluxlab.load_pipeline(request.param, dtype=torch.float32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([SQUARE, SQUARE], "references[0]: <PIL"),
        ([[SQUARE], SQUARE], "[[a], [b]] one to each"),
        ([], "references=[]: expected a list of images per sample, [[]] for none"),
        ("cat.png", "references[0][0]: images hold 'cat.png'"),
        ([["cat.png"]], "references[0][0]: images hold 'cat.png'"),
        ([[np.zeros((2, 16, 16, 3), np.uint8)]], "references[0][0]: a batch of 2 images, expected one image"),
        ([[SQUARE, Image.new("RGB", (18, 16))]], "references[0][1]: width=18: must be a multiple of 4"),
        ([[SQUARE]] * 3, "3 references: expected equal numbers, or one for the whole batch"),
        ([[torch.full((3, 16, 16), torch.nan)]], "references[0][0]: image with NaN"),
    ],
)
def test_refused(pipe, value, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        pipe.generate(["a red fox", "a cat"], [0, 1], references=value, **OPTIONS)
    assert "\n" not in str(error.value)


def test_forms(pipe):
    """A PIL image, its array, its tensor and a list of one are one reference."""
    array = np.asarray(SQUARE)
    forms = [SQUARE, array, torch.from_numpy(array.copy()), [[SQUARE]], ((array,),)]
    latents = [pipe.generate("a red fox", references=form, output="latent", **OPTIONS) for form in forms]
    assert all(torch.equal(one, latents[0]) for one in latents)
    assert not torch.equal(latents[0], pipe.generate("a red fox", output="latent", **OPTIONS))


def test_equal_images_are_encoded_once():
    calls = []

    def encode(image):
        calls.append(image)
        return torch.zeros(1, 4, 8), 2, 2

    a, b = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    made = references.encoded([[a, b], [b.clone()], []], lambda h, w: (h // 4, w // 4), encode)
    assert len(calls) == 2
    assert [one.grids for one in made] == [((2, 2), (2, 2)), ((2, 2),), ()]
    assert references.layouts(made) == [[0], [1], [2]]


def test_words_and_programs_in_groups(pipe):
    """Each group of one layout keeps its own prompts, programs and negative prompts."""
    program = {"a": {"op": "zero", "tokens": {"words": ["fox"]}}}
    wide = Image.new("RGB", (32, 16), "blue")
    prompts, programs, given = (
        ["a red fox", "a blue cat", "a green fox"],
        [program, None, program],
        [[SQUARE], [wide], []],
    )
    more = {"true_cfg": 2.0, "output": "latent", **OPTIONS}
    negatives = ["a cat", "a square", "a sign"]
    together = pipe.generate(prompts, [0, 1, 2], programs, references=given, negative_prompts=negatives, **more)
    for i in range(3):
        alone = pipe.generate(prompts[i], i, programs[i], references=[given[i]], negative_prompts=negatives[i], **more)
        assert torch.equal(together[i : i + 1], alone)


def test_probe(either):
    """Reference tokens are labelled; samples of different layouts cannot share the arrays of a probe."""
    wide = Image.new("RGB", (32, 16), "blue")
    capture = {
        "quadrants": {"kind": "quadrants"},
        "to": {"kind": "map", "from": {"indices": [0]}, "to": "reference[1]"},
        "some": {"kind": "map", "from": {"indices": [0]}, "to": ["reference[0]", {"indices": [0, 3]}]},
    }
    probe = Probe(capture)
    images = either.generate("a red fox", references=[[SQUARE, wide]], probe=probe, **OPTIONS)
    assert np.array_equal(images[0], either.generate("a red fox", references=[[SQUARE, wide]], **OPTIONS)[0])
    quadrants = probe.arrays["quadrants"]
    assert quadrants.labels("to") == ["text", "image", "reference 0", "reference 1"]
    assert np.allclose(quadrants.values.sum(-1), 1, atol=1e-5)
    whole = probe.arrays["to"]
    assert whole.labels("to_row") == [0, 1, 2, 3]
    assert whole.labels("to_col") == list(range(8))
    assert whole.coords["to_group"] == (("to_row",), ["reference 1"] * 4)
    some = probe.arrays["some"]
    assert some.coords["to_group"][1] == ["image"] * 2 + ["reference 0"] * 16
    assert fluxlab.probes.label(whole)["to_group"].values.tolist() == ["reference 1"] * 4
    with pytest.raises(
        UserError, match="probe: its arrays have one shape, but the samples differ in the number or size"
    ):
        either.generate("a red fox", [0, 1], references=[[SQUARE], [wide]], probe=Probe(capture), **OPTIONS)


def test_injecting_into_another_layout(pipe):
    wide = Image.new("RGB", (32, 16), "blue")
    inject = {"a": {"op": "inject", "source": 0, "what": "keys", "tokens": "all"}}
    given = [[SQUARE], [wide]]
    with pytest.raises(UserError, match="programs: inject takes from another sample, but the samples"):
        pipe.generate("a red fox", [0, 1], [None, inject], references=given, **OPTIONS)
    pipe.generate("a red fox", [0, 1], [None, inject], references=[[SQUARE], [SQUARE]], **OPTIONS)
    velocity = {"a": {"op": "inject", "source": 0, "what": "velocity", "tokens": "all"}}
    latents = pipe.generate("a red fox", [0, 1], [None, velocity], references=SQUARE, output="latent", **OPTIONS)
    noise = pipe.generate("a red fox", [0, 1], references=SQUARE, output="latent", **OPTIONS)
    assert latents.shape == noise.shape
    assert torch.equal(latents[0], noise[0])
