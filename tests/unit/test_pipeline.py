"""The pipeline: which arguments it rejects and with which message, prompts, defaults, devices and progress."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fluxlab
from fluxlab.errors import UserError
from fluxlab.model.text import UnknownWordsWarning
from fluxlab.positions import Program
from fluxlab.sampling import Sampling
from tests import families


@pytest.fixture(scope="module", params=families.NAMES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family):
    return families.folder(family)


@pytest.fixture(scope="module")
def pipe(folder):
    return fluxlab.load_pipeline(folder, cache="none")


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
        ({"latents": torch.full((1, 16, 16), float("inf"))}, "latents hold NaN or infinity"),
        ({"unknown_words": "ignore"}, "unknown_words='ignore': expected error, allow or warn"),
        ({"truncate": "no"}, "truncate='no': expected true or false"),
        ({"probe": "words"}, "probe='words': expected a fluxlab.probes.Probe"),
        ({"output": "jpeg"}, "output='jpeg': expected pil, latent, pt"),
        ({"timestep_rounding": "bf16"}, "timestep_rounding='bf16': expected bfl or diffusers"),
        ({"prompts": "a red cat " * 6}, "max_sequence_length=16"),
    ],
)
def test_wrong_arguments_are_named(pipe, change, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe.generate(**{**GOOD, **change})
    assert len(str(error.value).splitlines()) <= 3


LONG = "a red cat and a green fox on the left of the dog says hello"


def test_the_words_that_would_be_cut_are_shown(pipe):
    call = {**GOOD, "prompts": LONG, "max_sequence_length": 12}
    with pytest.raises(UserError, match=r"the dog says hello' would be cut\n"):
        pipe.generate(**call)
    assert pipe.generate(**call, truncate=True)
    with pytest.raises(UserError, match="would be cut"):  # also after the prompt was encoded with truncate
        pipe.generate(**call)


def test_cut_prompts_are_reported_before_unknown_words(pipe):
    with pytest.raises(UserError, match="would be cut"):
        pipe.generate(**{**GOOD, "prompts": ["a cat 1", LONG], "max_sequence_length": 12})


UNKNOWN = {"flux1": ["7", "8", "9"], "flux2": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]}
"""Parts of a prompt that do not reach the text encoders. FLUX.2's reads all characters, but refuses its own marks."""


@pytest.fixture
def unknown(family) -> list[str]:
    return UNKNOWN[family]


def test_unknown_words_are_an_error(pipe, family, unknown):
    listed = {f"a cat {unknown[0]}": f"'{re.escape(unknown[0])}'"}
    if family == "flux1":
        listed |= {"a 猫 and 😀": "'猫', '😀'", "a cat</s>": "'</s>'.*"}
    for prompt, words in listed.items():
        with pytest.raises(UserError, match=f"the text encoders have no token for {words}\n.*unknown_words='allow'"):
            pipe.generate(**{**GOOD, "prompts": prompt}, unknown_words="error")
    assert pipe.generate(**{**GOOD, "prompts": "a cat, on the left!"})  # punctuation alone is no word
    more = {**GOOD, "prompts": f"a cat {unknown[0]}"}
    allowed = pipe.generate(**more, unknown_words="allow", output="pt")
    assert not torch.equal(allowed, pipe.generate(**GOOD, output="pt"))
    with pytest.raises(UserError, match=f"no token for '{re.escape(unknown[0])}'"):  # also after it was encoded
        pipe.generate(**more, unknown_words="error")


def test_unknown_words_are_a_warning_from_python_by_default(pipe, unknown):
    words = {**GOOD, "prompts": f"a cat {unknown[0]}", "output": "pt"}
    expected = f"no token for '{re.escape(unknown[0])}'\n.*placeholder.*unknown_words='error'"
    with pytest.warns(UnknownWordsWarning, match=expected):
        image = pipe.generate(**words)
    assert torch.equal(image, pipe.generate(**words, unknown_words="allow"))
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        pipe.generate(**GOOD)
    assert not [w for w in recorded if w.category is UnknownWordsWarning]


def test_unknown_words_of_every_text_are_found(pipe, unknown):
    a, b, c = unknown
    prompt, word = f"a {a}", re.escape(a)
    found = f"prompt 'a {word}'"
    with pytest.raises(UserError, match=found):
        pipe.generate(**{**GOOD, "prompts": ["a cat", prompt]}, unknown_words="error")
    others = f"'{re.escape(b)}', '{re.escape(c)}'"
    with pytest.raises(UserError, match=f"{found}: .* no token for '{word}'; other prompts have {others}"):
        pipe.generate(**{**GOOD, "prompts": [prompt, "a cat", f"an {b}", f"a {c} {a}"]}, unknown_words="error")
    with pytest.raises(UserError, match=found):
        pipe.generate(**GOOD, true_cfg=2.0, negative_prompts=prompt, unknown_words="error")
    with pytest.raises(UserError, match=found):
        pipe.invert(torch.zeros(1, 3, 16, 16), prompt, max_sequence_length=16, unknown_words="error")
    with pytest.raises(UserError, match=found):
        pipe.encode_prompt(prompt, 16)
    with pytest.raises(UserError, match=found):
        pipe.check([prompt], None, Sampling(max_sequence_length=16))


def test_the_embedded_model_names_unknown_words_and_the_nearest_known_ones():
    tiny_flux = fluxlab.load_pipeline("tiny")
    assert {"cat", "fox", "holding"} <= set(tiny_flux.text.vocabulary)
    assert not any(word.startswith("<") for word in tiny_flux.text.vocabulary)
    with pytest.raises(UserError) as raised:
        tiny_flux.generate("a zebra and a catt, on the left!", 0, steps=1, unknown_words="error")
    first, second, third = str(raised.value).splitlines()
    assert "does not know 'zebra', 'and', 'catt'; did you mean" in first
    assert "cat for catt" in first
    assert "purple" in second
    assert "unknown_words='allow'" in third
    assert tiny_flux.generate("A cat, holding a sign that says: hello world!", 0, steps=1)


def test_prompts_are_encoded_once(pipe, monkeypatch):
    pipe.generate(**GOOD)
    monkeypatch.setattr(type(pipe.text), "encode", lambda *a: pytest.fail("encoded again"))
    pipe.generate(**{**GOOD, "prompts": ["a cat"] * 2, "seeds": [1, 2]})


def test_length_one_broadcasts(pipe):
    assert len(pipe.generate(**{**GOOD, "seeds": [1, 2, 3]})) == 3
    assert pipe.generate(**{**GOOD, "output": "latent"}).shape == (1, 16, 16)
    assert pipe.generate(**{**GOOD, "output": "pt"}).shape == (1, 3, 16, 16)


def test_latents_replace_seeds(pipe):
    noise = pipe.family.noise([9], 4, 4, 4, torch.float32)
    by_seed, by_noise = (
        pipe.generate(**{**GOOD, "output": "latent", **way}) for way in ({"seeds": 9}, {"latents": noise})
    )
    assert torch.equal(by_seed, by_noise)


def test_defaults_of_the_model(pipe):
    assert pipe.steps == 4
    assert pipe.guidance is None
    assert pipe.max_sequence_length == 512
    assert pipe.size == (256, 256)


def test_an_unknown_model_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="schnell"):
        fluxlab.load_pipeline("schnel")


def test_positional_arguments_have_the_documented_order(pipe):
    by_order = pipe.generate("a cat", 3, None, 16, 24, 2, None, None, None, max_sequence_length=16, output="latent")
    by_name = pipe.generate(
        prompts=["a cat"], seeds=[3], height=16, width=24, steps=2, max_sequence_length=16, output="latent"
    )
    assert torch.equal(by_order, by_name)


def test_the_default_dtype_changes_nothing(folder):
    program = Program.from_config({"a": {"op": "jitter", "std": 2, "seed": 1}, "b": {"op": "rotate", "degrees": 30}})
    call = {**GOOD, "width": 24, "programs": program, "true_cfg": 2.0, "negative_prompts": "a dog"}
    expected = fluxlab.load_pipeline(folder, cache="none").generate(**call)[0]
    noise = fluxlab.load_pipeline(folder, cache="none").invert(expected, "a cat", steps=2)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            pipe = fluxlab.load_pipeline(folder, cache="none")
            image = pipe.generate(**call)[0]
            inverted = pipe.invert(expected, "a cat", steps=2)
        finally:
            torch.set_default_dtype(torch.float32)
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert torch.equal(inverted, noise)


class NoDoubleOnMeta(TorchDispatchMode):
    """Raises for fp64 tensors on the meta device, which takes the place of a device without fp64 such as MPS."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor) and x.is_meta and x.dtype == torch.float64:
                raise TypeError(f"{function}: fp64 on a device without it")
        return result


def test_no_fp64_reaches_a_device_without_it(folder):
    pipe = fluxlab.load_pipeline(folder, cache="none")
    pipe.transformer.to("meta")
    programs = [
        Program.from_config({"a": {"op": "rotate", "degrees": 30, "blocks": {"double": [0]}}}),
        Program.from_config(
            {
                "a": {"op": "offset", "by": 3, "side": "keys", "seen_by": "text"},
                "b": {"op": "mask", "from": "image", "to": "text"},
            }
        ),
    ]
    settings = pipe.resolve(Sampling(height=16, width=16, max_sequence_length=16, steps=2))
    with NoDoubleOnMeta():
        velocity = pipe._velocity(["a cat"] * 2, None, programs, settings, (4, 4), [1.0, 0.5, 0.0])
        v = velocity(torch.zeros(2, 16, 16, device="meta"), 1.0)
    assert v.shape == (2, 16, 16)


def test_to_moves_all_parts(folder, monkeypatch):
    pipe = fluxlab.load_pipeline(folder, cache="none")
    pipe.encode_prompt("a cat")
    with pytest.raises(UserError, match="device 'cuda:99': this machine has none"):
        pipe.to("cuda:99")
    assert pipe.to("cpu") is pipe
    monkeypatch.setattr("fluxlab.checkpoints.check_device", torch.device)
    pipe.to("meta")
    text = (pipe.text.clip, pipe.text.t5) if pipe.family.name == "flux1" else (pipe.text.encoder,)
    parts = (pipe.transformer, pipe.autoencoder, *text)
    assert all(parameter.is_meta for part in parts for parameter in part.parameters())
    assert pipe.device.type == "meta"
    assert not pipe._encoded  # else prompts would stay on the old device


def test_progress_is_shown_when_asked_for(pipe, capsys):
    pipe.generate(**{**GOOD, "steps": 2})
    assert capsys.readouterr().out == ""
    pipe.generate(**{**GOOD, "steps": 2}, progress=True)
    assert "sampling 2/2" in capsys.readouterr().out


def test_one_object_of_settings_samples_the_same(pipe):
    settings = Sampling(steps=2, height=16, width=24, max_sequence_length=16, true_cfg=2.0, negative_prompt="a dog")
    expected = pipe.generate(
        ["a cat", "a fox"],
        [1, 2],
        height=16,
        width=24,
        steps=2,
        max_sequence_length=16,
        true_cfg=2.0,
        negative_prompts=["a dog"],
        output="latent",
    )
    assert torch.equal(pipe.sample(["a cat", "a fox"], [1, 2], None, settings, output="latent"), expected)


def test_settings_for_another_dtype_or_device_are_refused(pipe):
    assert pipe.resolve(Sampling()) == Sampling(
        steps=4, height=256, width=256, max_sequence_length=512, dtype="float32", device="cpu"
    )
    with pytest.raises(UserError, match="dtype=float16: the model is loaded as float32"):
        pipe.resolve(Sampling(dtype="float16"))
    with pytest.raises(UserError, match="device=cuda: the model is on cpu"):
        pipe.resolve(Sampling(device="cuda"))
