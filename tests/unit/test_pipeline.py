"""What generate() and load_pipeline() refuse, and how they say it."""

import pytest
import torch

import fluxlab
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("folder"), guidance=False, dynamic_shift=False)


@pytest.fixture(scope="module")
def pipe(folder):
    return fluxlab.load_pipeline(folder)


GOOD = {"prompts": "a cat", "height": 16, "width": 16, "steps": 1, "max_sequence_length": 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 18}, "height=18: must be a multiple of 4, for instance 16 or 20"),
        ({"width": 0}, "width=0: expected a whole number, at least 1"),
        ({"steps": 0}, "steps=0: expected a whole number, at least 1"),
        ({"seeds": -1}, "seed -1"),
        ({"seeds": [1, 2, 3], "prompts": ["a", "b"]}, "2 prompts, 3 seeds: expected equal numbers"),
        ({"prompts": []}, "0 prompts, 1 seeds"),
        ({"prompts": [3]}, "prompts holds 3: expected strings"),
        ({"prompts": None}, "prompts=None"),
        ({"seeds": 1.5}, "seeds=1.5"),
        ({"height": 24.0}, "height=24.0: expected a whole number"),
        ({"width": "24"}, "width='24': expected a whole number"),
        ({"max_sequence_length": -1}, "max_sequence_length=-1: expected a whole number"),
        ({"max_sequence_length": 20.5}, "max_sequence_length=20.5: expected a whole number"),
        ({"true_cfg": float("nan")}, "true_cfg=nan: expected a finite number"),
        ({"guidance": "x"}, "guidance='x': expected a finite number"),
        ({"guidance": 3.5}, "guidance=3.5: this model is not guidance-distilled"),
        ({"negative_prompts": "dog"}, "negative_prompts have no effect without true_cfg"),
        ({"latents": torch.zeros(1, 15, 16)}, r"latents have shape \(1, 15, 16\)"),
        ({"output": "jpeg"}, "output='jpeg': expected pil, latent, pt"),
        ({"timestep_rounding": "bf16"}, "timestep_rounding='bf16': expected bfl or diffusers"),
        ({"prompts": "a red cat " * 6}, "max_sequence_length=16"),
    ],
)
def test_misuse_is_named(pipe, change, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe.generate(**{**GOOD, **change})
    assert len(str(error.value).splitlines()) <= 3


def test_the_words_that_would_be_cut_are_shown(pipe):
    with pytest.raises(ValueError, match="'the dog says hello' would be cut"):
        pipe.generate(
            **{
                **GOOD,
                "prompts": "a red cat and a green fox on the left of the dog says hello",
                "max_sequence_length": 12,
            }
        )
    assert pipe.generate(**{**GOOD, "prompts": "a cat " * 20, "truncate": True})


def test_prompts_are_encoded_once(pipe, monkeypatch):
    pipe.generate(**GOOD)
    monkeypatch.setattr(type(pipe.text), "encode", lambda *a: pytest.fail("encoded again"))
    pipe.generate(**{**GOOD, "prompts": ["a cat"] * 2, "seeds": [1, 2]})


def test_length_one_broadcasts(pipe):
    assert len(pipe.generate(**{**GOOD, "seeds": [1, 2, 3]})) == 3
    assert pipe.generate(**{**GOOD, "output": "latent"}).shape == (1, 16, 16)
    assert pipe.generate(**{**GOOD, "output": "pt"}).shape == (1, 3, 16, 16)


def test_given_noise_takes_the_seeds_place(pipe):
    noise = fluxlab.sampling.pack(fluxlab.sampling.noise([9], 4, 8, 8))
    by_seed, by_noise = (
        pipe.generate(**{**GOOD, "output": "latent", **way}) for way in ({"seeds": 9}, {"latents": noise})
    )
    assert torch.equal(by_seed, by_noise)


def test_defaults_are_the_models(pipe):
    assert pipe.steps == 4
    assert pipe.guidance is None
    assert pipe.max_sequence_length == 512
    assert pipe.size == (256, 256)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="schnell"):
        fluxlab.load_pipeline("schnel")


def test_arguments_stand_in_the_documented_order(pipe):
    by_order = pipe.generate("a cat", 3, None, 16, 24, 2, None, None, None, max_sequence_length=16, output="latent")
    by_name = pipe.generate(
        prompts=["a cat"], seeds=[3], height=16, width=24, steps=2, max_sequence_length=16, output="latent"
    )
    assert torch.equal(by_order, by_name)
