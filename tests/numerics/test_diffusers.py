"""The pipeline and Diffusers' `FluxPipeline` on the same folder: random weights, fp32, CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fluxlab
from tests import tiny

LENGTH = 24
PROMPTS = ["A cat holding a sign that says hello world", "the red dog on the left", "", "a blue fox"]


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "plain"])
def guidance(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def folder(guidance, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("folder")
    return tiny.save(where, guidance=guidance, dynamic_shift=guidance, pool_by_argmax=not guidance, seed=guidance)


def load_diffusers(folder):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(folder):
    return load_diffusers(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return fluxlab.load_pipeline(folder)


def diffusers_images(pipe, prompt, seed, height, width, steps, output="pil", **options):
    return pipe(
        prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        max_sequence_length=LENGTH,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output,
        **options,
    ).images


def pixel_gap(ours, theirs) -> int:
    """Return the largest difference of any pixel, in steps of 1/255."""
    return int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max())


def has_contrast(image) -> bool:
    return np.asarray(image).std() > 10


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("length", [LENGTH, 64, 512])
def test_prompt_embeddings(ours, theirs, prompt, length):
    with torch.no_grad():  # as FluxPipeline does; other kernels run when gradients are recorded
        txt, y, _ = theirs.encode_prompt(prompt, max_sequence_length=length)
    our_txt, our_y = ours.encode_prompt(prompt, length)
    assert torch.equal(our_txt, txt)
    assert torch.equal(our_y, y)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 64)])
@pytest.mark.parametrize("steps", [1, 6])
def test_latents_and_images(ours, theirs, size, steps, guidance):
    options = {"guidance_scale": 2.5} if guidance else {}
    for prompt, seed in zip(PROMPTS[:2], (0, 7), strict=True):
        latents = diffusers_images(theirs, prompt, seed, *size, steps, "latent", **options)
        image = diffusers_images(theirs, prompt, seed, *size, steps, **options)[0]
        common = {"steps": steps, "max_sequence_length": LENGTH, "guidance": options.get("guidance_scale")}
        our_latents = ours.generate(prompt, seed, height=size[0], width=size[1], output="latent", **common)
        (our_image,) = ours.generate(prompt, seed, height=size[0], width=size[1], **common)
        assert (our_latents - latents).abs().max() < 1e-4 * latents.std()
        assert has_contrast(image)
        assert pixel_gap(our_image, image) <= 1


def test_true_guidance(ours, theirs):
    image = diffusers_images(theirs, PROMPTS[0], 3, 32, 32, 4, negative_prompt="a dog", true_cfg_scale=6.0)[0]
    common = {"steps": 4, "max_sequence_length": LENGTH}
    (ours_image,) = ours.generate(PROMPTS[0], 3, height=32, width=32, true_cfg=6.0, negative_prompts="a dog", **common)
    (without,) = ours.generate(PROMPTS[0], 3, height=32, width=32, **common)
    assert pixel_gap(ours_image, image) <= 1
    assert pixel_gap(without, image) > 10


def test_batch_equals_one_at_a_time(ours):
    common = {"height": 32, "width": 48, "steps": 4, "max_sequence_length": LENGTH}
    together = ours.generate(PROMPTS, [0, 1, 2, 3], output="latent", **common)
    for i, prompt in enumerate(PROMPTS):
        alone = ours.generate(prompt, i, output="latent", **common)
        assert (together[i : i + 1] - alone).abs().max() <= 1e-5 * alone.std()


def test_diffusers_loads_a_saved_folder(ours, theirs, tmp_path):
    ours.save(tmp_path)
    again = load_diffusers(tmp_path)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(theirs, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (
        pixel_gap(
            diffusers_images(again, PROMPTS[0], 1, 32, 32, 3)[0],
            ours.generate(PROMPTS[0], 1, height=32, width=32, steps=3, max_sequence_length=LENGTH)[0],
        )
        <= 1
    )


def test_inversion_round_trip(ours):
    """Image to noise to image over 50 steps has a PSNR above 40 dB."""
    common = {"steps": 50, "max_sequence_length": LENGTH}
    ours.max_sequence_length, kept = LENGTH, ours.max_sequence_length
    image = ours.generate(PROMPTS[0], 5, height=32, width=32, output="pt", steps=6)
    noise = ours.invert(image, PROMPTS[0], steps=50)
    x, _rows, _cols = ours.encode(image)
    back = ours.generate(PROMPTS[0], height=32, width=32, latents=noise, output="latent", **common)
    ours.max_sequence_length = kept
    psnr = 20 * torch.log10((x.max() - x.min()) / (x - back).square().mean().sqrt())
    assert psnr > 40
    assert not torch.allclose(noise, x, atol=0.1)


def test_bf16_follows_diffusers_with_its_timesteps(folder, guidance):
    """bf16 rounds differently in many places. The images must be ten times closer than those of two seeds."""
    from diffusers import FluxPipeline

    theirs = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    ours = fluxlab.load_pipeline(folder, dtype=torch.bfloat16)
    image = diffusers_images(theirs, PROMPTS[0], 0, 32, 32, 4)[0]
    common = {"steps": 4, "max_sequence_length": LENGTH, "timestep_rounding": "diffusers"}
    same, other = (ours.generate(PROMPTS[0], seed, height=32, width=32, **common)[0] for seed in (0, 1))
    gaps = [np.abs(np.asarray(a, float) - np.asarray(image, float)).mean() for a in (same, other)]
    assert gaps[0] < 0.1 * gaps[1]
