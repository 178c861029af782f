"""FLUX.2's pipeline and Diffusers' `Flux2KleinPipeline` and `Flux2Pipeline` on the same folders: random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.errors import UserError
from fluxlab.families.flux2 import FAMILY as FLUX2
from fluxlab.families.flux2 import SCHEDULE, Schedule2
from tests import tiny2

LENGTHS = {"klein": 56, "base": 56, "dev": 256}
PROMPTS = ["a red cat", "the hello sign, söme ünïcode", ""]


@pytest.fixture(scope="module", params=["klein", "dev"])
def which(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(which, tmp_path_factory) -> Path:
    return tiny2.save(tmp_path_factory.mktemp(which), dev=which == "dev", seed=3)


def load_diffusers(folder):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(folder):
    return load_diffusers(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return fluxlab.load_pipeline(folder, cache="none")


def diffusers_image(pipe, prompt, seed, size, steps, length, **options):
    return pipe(
        prompt=prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        max_sequence_length=length,
        generator=torch.Generator("cpu").manual_seed(seed),
        **options,
    ).images[0]


def pixel_gap(ours, theirs) -> int:
    """Return the largest difference of any pixel, in steps of 1/255."""
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())


def guidance_of(which: str, value: float) -> tuple[dict, dict]:
    """Return the settings of ours and theirs for a model without guidance, and for a guidance-distilled one."""
    return ({"guidance": value}, {"guidance_scale": value}) if which == "dev" else ({}, {"guidance_scale": 1.0})


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_prompt_embeddings(ours, theirs, which, prompt):
    length = LENGTHS[which]
    expected = theirs.encode_prompt(prompt, max_sequence_length=length)[0]
    (txt,) = ours.encode_prompt(prompt, length)
    assert txt.shape == expected.shape == (1, length, 48)
    assert (txt - expected).abs().max() <= 1e-6 * expected.std()


def test_prompts_differ(ours, which):
    first, second = (ours.encode_prompt(prompt, LENGTHS[which])[0] for prompt in PROMPTS[:2])
    assert (first - second).std() > 0.1 * first.std()


@pytest.mark.parametrize(("size", "steps"), [((32, 48), 4), ((48, 32), 9)])
def test_images(ours, theirs, which, size, steps):
    mine, others = guidance_of(which, 2.5)
    length = LENGTHS[which]
    for prompt, seed in zip(PROMPTS[:2], (0, 7), strict=True):
        expected = diffusers_image(theirs, prompt, seed, size, steps, length, **others)
        (image,) = ours.generate(
            prompt, seed, height=size[0], width=size[1], steps=steps, max_sequence_length=length, **mine
        )
        assert np.asarray(expected).std() > 10
        assert pixel_gap(image, expected) <= 1


def test_true_guidance(tmp_path):
    """A model that is not distilled takes true_cfg; Diffusers' negative prompt is empty."""
    folder = tiny2.save(tmp_path, distilled=False, seed=1)
    ours, theirs = fluxlab.load_pipeline(folder, cache="none"), load_diffusers(folder)
    assert (ours.steps, ours.distilled) == (50, False)
    expected = diffusers_image(theirs, PROMPTS[0], 3, (32, 32), 4, 56, guidance_scale=20.0)
    common = {"height": 32, "width": 32, "steps": 4, "max_sequence_length": 56}
    (image,) = ours.generate(PROMPTS[0], 3, true_cfg=20.0, **common)
    (without,) = ours.generate(PROMPTS[0], 3, **common)
    assert pixel_gap(image, expected) <= 1
    assert pixel_gap(without, expected) > 10


@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 80), (96, 64)]])
def test_references(ours, theirs, which, sizes):
    """Reference images at t = 10 and 20, each on its own grid."""
    from PIL import Image

    values = np.random.default_rng(0)
    images = [Image.fromarray(values.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    mine, others = guidance_of(which, 4.0)
    common = {"steps": 3, "max_sequence_length": LENGTHS[which], **mine}
    expected = diffusers_image(theirs, PROMPTS[0], 2, (32, 48), 3, LENGTHS[which], image=images, **others)
    (image,) = ours.generate(PROMPTS[0], 2, height=32, width=48, references=[images], **common)
    (without,) = ours.generate(PROMPTS[0], 2, height=32, width=48, **common)
    assert pixel_gap(image, expected) <= 1
    assert pixel_gap(without, expected) > 3


def test_diffusers_loads_a_saved_folder(ours, theirs, which, tmp_path):
    ours.save(tmp_path)
    again = load_diffusers(tmp_path)
    assert type(again) is type(theirs)
    assert again.config.get("is_distilled") == theirs.config.get("is_distilled")
    for name in ("transformer", "vae", "text_encoder"):
        before, after = getattr(theirs, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    mine, others = guidance_of(which, 4.0)
    length = LENGTHS[which]
    reloaded = fluxlab.load_pipeline(tmp_path, cache="none")
    assert (reloaded.schedule, reloaded.steps) == (ours.schedule, ours.steps)
    (image,) = reloaded.generate(PROMPTS[1], 1, height=32, width=32, steps=3, max_sequence_length=length, **mine)
    assert pixel_gap(diffusers_image(again, PROMPTS[1], 1, (32, 32), 3, length, **others), image) <= 1


def test_inversion_round_trip(ours, which):
    ours.max_sequence_length, kept = LENGTHS[which], ours.max_sequence_length
    image = ours.generate(PROMPTS[0], 5, height=32, width=32, output="pt", steps=4)
    noise = ours.invert(image, PROMPTS[0], steps=30)
    x, _rows, _cols = ours.encode(image)
    back = ours.generate(PROMPTS[0], height=32, width=32, latents=noise, output="latent", steps=30)
    ours.max_sequence_length = kept
    psnr = 20 * torch.log10((x.max() - x.min()) / (x - back).square().mean().sqrt())
    assert psnr > 40


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 200])
@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4300, 4301, 8100])
def test_schedule(steps, tokens):
    """Diffusers' scheduler with the μ of its pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    assert torch.tensor(SCHEDULE.times(steps, tokens)) == pytest.approx(scheduler.sigmas, abs=1e-6)


def test_words_are_found_in_the_chat_template(ours, which):
    """The tokens of a word cover its characters; those of the template cover none."""
    prompt = "  the hello sign, söme cat"
    spans = ours.text.spans(prompt, 512)
    covered = {prompt[a:b] for a, b in spans if a < b}
    assert "".join(prompt[a:b] for a, b in spans if a < b).replace(" ", "") in (
        prompt.replace(" ", ""),
        prompt.replace("ö", "öö").replace(" ", ""),  # one token per byte of a letter
    )
    assert "cat" in {part.strip() for part in covered}
    template = ours.text.template(prompt)
    assert len(spans) == len(ours.text.tokenizer(template, add_special_tokens=False).input_ids)
    assert sum(a == b for a, b in spans) >= 5


def test_a_prompt_that_is_cut(ours, which):
    with pytest.raises(UserError, match=r"more than max_sequence_length=12: .* would be cut"):
        ours.text.check(["hello " * 5], 12)
    ours.text.check(["hello " * 5], 12, truncate=True)


def test_a_special_token_in_a_prompt_is_refused(ours, which):
    mark = "</s>" if which == "dev" else "<|im_end|>"
    with pytest.raises(UserError, match="no token for"):
        ours.text.check([f"a cat {mark} a dog"], 512)


def test_the_text_encoder_is_not_opened_for_a_known_prompt(folder, which, tmp_path):
    settings = {"height": 32, "width": 32, "steps": 1, "max_sequence_length": LENGTHS[which], "output": "latent"}
    first = fluxlab.load_pipeline(folder, cache=tmp_path)
    expected = first.generate(PROMPTS[0], 0, **settings)
    second = fluxlab.load_pipeline(folder, cache=tmp_path)
    assert torch.equal(second.generate(PROMPTS[0], 0, **settings), expected)
    assert second.text._model is None


def test_ids():
    """(t, h, w, l), written out."""
    text, image, *references = FLUX2.ids(3, [(2, 2), (1, 1), (1, 1), (1, 2)])
    assert text.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert image.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert references[2].tolist() == [[30, 0, 0, 0], [30, 0, 1, 0]]


def test_settings_of_a_folder(ours, which):
    assert isinstance(ours.schedule, Schedule2)
    assert ours.steps == {"klein": 4, "dev": 50}[which]
    assert ours.guidance == {"klein": None, "dev": 4.0}[which]


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer", "vae"])
def test_an_incomplete_folder(folder, which, tmp_path, missing):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / missing)
    with pytest.raises(UserError, match=missing):
        fluxlab.load_pipeline(tmp_path / "copy", cache="none")


def test_a_language_model_of_another_kind(folder, which, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama"}))
    with pytest.raises(UserError, match="model_type is 'llama', expected 'qwen3' or 'mistral3'"):
        fluxlab.load_pipeline(tmp_path / "copy", cache="none")
