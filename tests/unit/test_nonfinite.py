"""NaN and infinity are reported, with sample and step, and never become an image."""

import numpy as np
import pytest
import torch

from fluxlab.errors import NonFiniteError, UserError
from tests import families

CALL = {"height": 16, "width": 16, "steps": 3, "max_sequence_length": 16}
PROMPTS = ["a cat", "a red fox", "the dog"]


@pytest.fixture(params=families.NAMES)
def pipe(request):
    return families.load(request.param)


def poison(pipe, sample: int, step: int, value: float = float("nan")) -> None:
    """Make the transformer return `value` for one sample from the given step on."""
    forward, calls = pipe.transformer.forward, []

    def poisoned(*arguments, **options):
        v = forward(*arguments, **options).clone()
        if len(calls) >= step:
            v[sample, 0, 0] = value
        calls.append(step)
        return v

    pipe.transformer.forward = poisoned


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("output", ["pil", "pt", "latent"])
def test_the_first_step_is_named_and_the_other_images_are_kept(pipe, output, value):
    expected = pipe.generate(PROMPTS, [3, 4, 5], **CALL, output=output)
    poison(pipe, sample=1, step=1, value=value)
    with pytest.raises(NonFiniteError) as raised:
        pipe.generate(PROMPTS, [3, 4, 5], **CALL, output=output)
    error = raised.value
    assert str(error).startswith("sample 1 (prompt 'a red fox', seed 4): its latents are not finite after step 2 of 3")
    assert (error.samples, error.steps) == ([1], {1: 1})
    assert error.results[1] is None
    for i in (0, 2):
        assert np.array_equal(np.asarray(error.results[i]), np.asarray(expected[i]))


def test_sampling_stops_when_no_sample_is_left(pipe):
    seen = []
    poison(pipe, sample=0, step=1)
    with pytest.raises(NonFiniteError) as raised:
        pipe.generate("a cat", 3, **CALL, on_step=lambda i, t, x: seen.append(i))
    assert raised.value.steps == {0: 1}
    assert raised.value.results is None
    assert seen == [0]


def test_non_finite_is_not_a_user_error():
    """A non-finite image ends a run with exit code 1, after the other cells; a user error with 2, before them."""
    assert not issubclass(NonFiniteError, UserError)


def test_infinite_pixels_are_not_clamped_to_white(pipe):
    x = pipe.generate(PROMPTS[:2], [1, 2], **CALL, output="latent")
    with torch.no_grad():
        pipe.autoencoder.decoder.conv_out.bias.fill_(float("inf"))
    for call in (lambda: pipe.decode(x, 4, 4), lambda: pipe.generate(PROMPTS[:2], [1, 2], **CALL)):
        with pytest.raises(NonFiniteError, match="the autoencoder decodes them to NaN") as raised:
            call()
        assert raised.value.steps == {0: None, 1: None}
        assert raised.value.results == [None, None]


def test_a_non_finite_prompt_embedding_is_named_as_the_cause(pipe):
    if pipe.family.name == "flux1":
        name, table, token = "T5", pipe.text.t5.shared, pipe.text.t5_tokenizer("cat").input_ids[0]
    else:
        name, table = "the language model", pipe.text.encoder.get_input_embeddings()
        token = pipe.text.tokenizer(" cat").input_ids[0]
    with torch.no_grad():
        table.weight[token] = float("nan")
    with pytest.raises(NonFiniteError, match=f"{name} encodes its prompt to NaN") as raised:
        pipe.generate(PROMPTS, 0, **CALL)
    assert raised.value.steps == {0: 0}
    assert [result is None for result in raised.value.results] == [True, False, False]


@pytest.mark.parametrize("family", families.NAMES)
def test_float16_overflow_is_explained(family):
    pipe = families.load(family, dtype=torch.float16)
    with torch.no_grad():
        pipe.autoencoder.decoder.conv_in.weight.mul_(1e5)
    with pytest.raises(NonFiniteError, match=r"(?s)decodes.*float16 overflows above 65504.*bfloat16 or float32"):
        pipe.generate("a cat", **CALL)


def test_inversion_reports_non_finite_latents(pipe):
    image = pipe.generate("a cat", **CALL, output="pt")
    poison(pipe, sample=0, step=2)
    with pytest.raises(NonFiniteError, match="after step 1 of 3"):
        pipe.invert(image, "a cat", steps=3, iterations=3, max_sequence_length=16)


def test_encoding_reports_non_finite_latents(pipe):
    with torch.no_grad():
        pipe.autoencoder.encoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="image 0: the autoencoder encodes it to NaN"):
        pipe.encode(torch.zeros(1, 3, 16, 16))


def test_given_latents_must_be_finite(pipe):
    latents = torch.zeros(1, 16, 16)
    latents[0, 3, 2] = float("nan")
    with pytest.raises(UserError, match="latents hold NaN"):
        pipe.generate("a cat", **CALL, latents=latents)
