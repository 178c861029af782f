"""The article's setting, `+exp=article model=schnell`, and Diffusers called as the page of FLUX.1 schnell calls it.

The folder has schnell's shape (no guidance embedding, even times) and random weights in bf16. Its images are smaller
than schnell's 1024 × 1024, everything else is as on the page.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlab
from fluxlab import batching, run
from fluxlab.families import FAMILIES
from tests import tiny

PROMPT = "A cat holding a sign that says hello world"
SIDE = 128
COMMAND = ["+exp=article", "model=schnell", f'prompts=["{PROMPT}"]', "seeds=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of bf16 weights."""
    pipe = tiny.diffusers_pipeline(guidance=False, dynamic_shift=False, seed=5)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, part).to(torch.bfloat16)
    where = tmp_path_factory.mktemp("schnell") / "model"
    pipe.save_pretrained(where)
    return where


def diffusers(folder, dtype):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_on_the_page(pipe, **changes):
    """The call of the model's page; only the size differs."""
    arguments = {
        "guidance_scale": 0.0,
        "num_inference_steps": 4,
        "max_sequence_length": 256,
        "generator": torch.Generator("cpu").manual_seed(0),
    }
    return pipe(PROMPT, height=SIDE, width=SIDE, **arguments | changes).images[0]


def as_the_command_draws(folder, out, *words):
    """The baseline's image of the article's command, with the weights of `folder`."""
    size = [f"height={SIDE}", f"width={SIDE}"]
    words = [*COMMAND, f"model.path={folder}", *size, "device=cpu", "tracking=none", f"out={out}", *words]
    assert run.main(words) == 0
    read = fluxlab.read_run(out)
    settings = read.record["settings"]
    assert (settings["steps"], settings["max_sequence_length"]) == (4, 256)
    return np.asarray(Image.open(read.image("baseline", PROMPT, 0)))


def gap(a, b):
    return np.asarray(a).astype(float) - np.asarray(b).astype(float)


def rms(x):
    return float(np.sqrt((x**2).mean()))


def test_the_model_is_the_article_s():
    row = fluxlab.config.find_row("schnell")
    assert (row.steps, row.max_sequence_length, row.size) == (4, 256, (1024, 1024))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_noise_is_equal_to_the_bit(folder, dtype):
    pipe = diffusers(folder, dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    channels = pipe.transformer.config.in_channels // 4
    theirs, _ = pipe.prepare_latents(1, channels, SIDE, SIDE, dtype, torch.device("cpu"), generator)
    ours = batching.start([0], None, 1, 4 * channels, (SIDE // 4, SIDE // 4), dtype, FAMILIES["flux1"])
    assert theirs.dtype == dtype
    assert torch.equal(ours, theirs.float())


def test_pixels_in_fp32(folder, tmp_path):
    theirs = as_on_the_page(diffusers(folder, torch.float32))
    ours = as_the_command_draws(folder, tmp_path / "run", "dtype=float32")
    assert np.asarray(theirs).std() > 10
    assert np.abs(gap(ours, theirs)).max() <= 1


def test_pixels_in_bf16(folder, tmp_path):
    """The two differ by what bf16 makes of either: their distance to fp32, from the same noise and weights."""
    theirs = as_on_the_page(diffusers(folder, torch.bfloat16))
    ours = as_the_command_draws(folder, tmp_path / "run")
    exact_pipe = diffusers(folder, torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    channels = exact_pipe.transformer.config.in_channels // 4
    noise, _ = exact_pipe.prepare_latents(1, channels, SIDE, SIDE, torch.bfloat16, torch.device("cpu"), generator)
    exact = as_on_the_page(exact_pipe, latents=noise.float())
    another = as_on_the_page(exact_pipe, generator=torch.Generator("cpu").manual_seed(1))
    of_theirs, of_ours, apart = (rms(gap(*pair)) for pair in ((theirs, exact), (ours, exact), (ours, theirs)))
    print(
        f"rms of 0..255: Diffusers in bf16 to fp32 {of_theirs:.2f}, fluxlab in bf16 to fp32 {of_ours:.2f}, "
        f"between the two in bf16 {apart:.2f}, another seed {rms(gap(another, exact)):.1f}"
    )
    assert of_ours <= 1.2 * of_theirs
    assert apart <= 1.2 * np.hypot(of_ours, of_theirs)
    assert rms(gap(another, exact)) > 10 * apart
