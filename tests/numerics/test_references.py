"""Reference images: Diffusers' `FluxKontextPipeline` on the same folder, and batches against one sample at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlab
from tests import tiny
from tests.numerics.test_diffusers import LENGTH, PROMPTS, has_contrast, pixel_gap

OPTIONS = {"height": 32, "width": 48, "steps": 3, "max_sequence_length": LENGTH, "guidance": 2.5}


def picture(height, width, seed=0):
    rows, cols = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (2 + k) + seed) * np.cos(cols / (3 - k / 2)) for k in range(3)], -1)
    return Image.fromarray(((waves + 1) * 127).astype(np.uint8))


SMALL, WIDE, TALL = picture(24, 16), picture(16, 40, seed=1), picture(48, 32, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose attention is strong and sharp, so that a reference changes the image visibly."""
    pipe, where = tiny.diffusers_pipeline(guidance=True), tmp_path_factory.mktemp("model")
    for name, weight in pipe.transformer.named_parameters():
        if ".norm_" in name or ".norm_added_" in name:
            weight.data *= 2
        elif "attn.to_" in name or "attn.add_" in name or ("transformer_blocks" in name and "proj_out.weight" in name):
            weight.data *= 4
    pipe.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def ours(folder):
    return fluxlab.load_pipeline(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from diffusers import FluxKontextPipeline, FluxPipeline

    pipe = FluxKontextPipeline(**FluxPipeline.from_pretrained(folder).components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kontext(pipe, prompt, seed, image, output="pil", **more):
    return pipe(
        prompt=prompt,
        image=image,
        height=32,
        width=48,
        max_area=32 * 48,
        _auto_resize=False,
        num_inference_steps=OPTIONS["steps"],
        max_sequence_length=LENGTH,
        guidance_scale=2.5,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output,
        **more,
    ).images


@pytest.mark.parametrize("reference", [SMALL, WIDE, TALL], ids=["small", "wide", "tall"])
@pytest.mark.parametrize("negative", [None, "a dog"])
def test_kontext(ours, theirs, reference, negative):
    more = {} if negative is None else {"negative_prompt": negative, "true_cfg_scale": 2.0}
    mine = {} if negative is None else {"negative_prompts": negative, "true_cfg": 2.0}
    (image,) = kontext(theirs, PROMPTS[0], 5, reference, **more)
    latents = kontext(theirs, PROMPTS[0], 5, reference, "latent", **more)
    (found,) = ours.generate(PROMPTS[0], 5, references=[[reference]], **mine, **OPTIONS)
    our_latents = ours.generate(PROMPTS[0], 5, references=[[reference]], output="latent", **mine, **OPTIONS)
    assert has_contrast(image)
    assert pixel_gap(found, image) <= 1
    assert (our_latents - latents).abs().max() < 1e-4 * latents.std()
    (without,) = ours.generate(PROMPTS[0], 5, **mine, **OPTIONS)
    assert pixel_gap(found, without) > 10


def test_two_references_of_different_size(ours, theirs, monkeypatch):
    """Diffusers takes one reference. Its own parts, called once for each, give the sequence for two."""
    prepare = theirs.prepare_latents

    def both(image, *rest):
        latents, tokens, ids, image_ids = prepare(image, *rest)
        second = theirs.image_processor.preprocess(WIDE, WIDE.height, WIDE.width)
        _, more, _, more_ids = prepare(second, *rest[:-1], latents)
        more_ids[..., 0] = 2
        return latents, torch.cat((tokens, more), 1), ids, torch.cat((image_ids, more_ids))

    monkeypatch.setattr(theirs, "prepare_latents", both)
    (image,) = kontext(theirs, PROMPTS[1], 3, SMALL)
    (found,) = ours.generate(PROMPTS[1], 3, references=[[SMALL, WIDE]], **OPTIONS)
    assert pixel_gap(found, image) <= 1
    for others in ([[SMALL]], [[WIDE, SMALL]], [[WIDE]]):
        assert pixel_gap(ours.generate(PROMPTS[1], 3, references=others, **OPTIONS)[0], image) > 2


SHIFT = {"a": {"op": "place", "arrangement": "diagonal", "index": 0}}
SECOND = {"a": {"op": "offset", "by": [0, 2, 0], "tokens": "reference[1]", "side": "keys"}}
BATCH = [  # (prompt, seed, references, program)
    (PROMPTS[0], 0, [SMALL], SHIFT),
    (PROMPTS[1], 1, [], None),
    (PROMPTS[1], 2, [WIDE, SMALL], SECOND),
    (PROMPTS[3], 3, [TALL], None),
    (PROMPTS[0], 4, [SMALL], None),
    (PROMPTS[2], 5, [SMALL, WIDE], SHIFT),
]


def sampled(pipe, rows, **more):
    prompts, seeds, references, programs = (list(column) for column in zip(*rows, strict=True))
    options = {**OPTIONS, "output": "latent", **more}
    return pipe.generate(prompts, seeds, programs, references=references, **options)


@pytest.mark.parametrize("true_cfg", [None, 2.0])
def test_different_references_in_one_batch(ours, true_cfg):
    """Each sample is the one computed alone, bit for bit, and so are its ids."""
    together = sampled(ours, BATCH, true_cfg=true_cfg)
    for i, row in enumerate(BATCH):
        assert torch.equal(together[i : i + 1], sampled(ours, [row], true_cfg=true_cfg))
    assert torch.equal(sampled(ours, BATCH[::-1], true_cfg=true_cfg), together.flip(0))


def test_ids_do_not_depend_on_the_place_in_the_batch(ours, monkeypatch):
    """Every sample's first reference is at index 1, and its second at index 2."""
    seen = []
    original = fluxlab.positions.compile_programs

    def compiled(programs, context):
        made = original(programs, context)
        seen.extend((context.layout.references, made.ids(sample=b)) for b in range(len(programs)))
        return made

    monkeypatch.setattr(fluxlab.positions, "compile_programs", compiled)
    rows = [(prompt, seed, references, None) for prompt, seed, references, _ in BATCH]
    sampled(ours, rows)
    for grids, ids in seen:
        start = LENGTH + 8 * 12
        for k, (height, width) in enumerate(grids):
            expected = [(k + 1, r, c) for r in range(height) for c in range(width)]
            assert ids[start : start + height * width].tolist() == [list(map(float, place)) for place in expected]
            start += height * width
        assert len(ids) == start
    assert {grids for grids, _ in seen} == {((6, 4),), (), ((4, 10), (6, 4)), ((12, 8),), ((6, 4), (4, 10))}


def test_one_list_serves_all_and_order_counts(ours):
    prompts, seeds = [PROMPTS[0], PROMPTS[1]], [0, 1]
    both = ours.generate(prompts, seeds, references=[[SMALL, WIDE]], output="latent", **OPTIONS)
    repeated = ours.generate(prompts, seeds, references=[[SMALL, WIDE]] * 2, output="latent", **OPTIONS)
    one = ours.generate(prompts, seeds, references=SMALL, output="latent", **OPTIONS)
    assert torch.equal(both, repeated)
    assert torch.equal(one, ours.generate(prompts, seeds, references=[[np.asarray(SMALL)]], output="latent", **OPTIONS))
    without = ours.generate(prompts, seeds, output="latent", **OPTIONS)
    for empty in (None, [[]], [None, []]):
        assert torch.equal(ours.generate(prompts, seeds, references=empty, output="latent", **OPTIONS), without)


def test_a_masked_reference_has_no_effect(ours):
    """Nothing sees the reference's keys: the image is the one without a reference, up to rounding."""
    hidden = {"a": {"op": "mask", "from": ["text", "image"], "to": "reference"}}
    masked = ours.generate(PROMPTS[0], 0, hidden, references=[[WIDE, SMALL]], output="latent", **OPTIONS)
    plain = ours.generate(PROMPTS[0], 0, output="latent", **OPTIONS)
    assert (masked - plain).abs().max() < 1e-4 * plain.std()


def test_all_ids_may_be_shifted(ours):
    """The noise floor: shifting text, image and references by one constant changes nothing but rounding."""
    shift = {"a": {"op": "offset", "by": [3, -2.5, 7], "tokens": "all"}}
    shifted, plain = (
        ours.generate(PROMPTS[0], 0, program, references=[[WIDE, SMALL]], output="latent", **OPTIONS)
        for program in (shift, None)
    )
    assert (shifted - plain).abs().max() < 1e-4 * plain.std()


def test_inverted_with_references(ours):
    """The noise of two images, each with its own references, makes them again; without references it does not."""
    prompts, references = [PROMPTS[0], PROMPTS[1]], [[SMALL], [WIDE, SMALL]]
    more = {**OPTIONS, "steps": 32}  # each is small enough for the fixed-point iteration to converge
    size = {key: more.pop(key) for key in ("height", "width")}
    images = [picture(size["height"], size["width"], seed) for seed in (3, 4)]
    target = ours.encode(images)[0]
    noise = ours.invert(images, prompts, references=references, iterations=6, **more)
    alone = ours.invert(images[1], prompts[1], references=[references[1]], iterations=6, **more)
    assert (noise[1:] - alone).abs().max() < 1e-3 * alone.std()  # the autoencoder's bits depend on the batch
    again, without = (
        ours.generate(prompts, latents=noise, references=given, output="latent", **size, **more)
        for given in (references, None)
    )
    assert (again - target).norm() < 0.01 * (without - target).norm()
    assert (without - target).norm() > 0.01 * target.norm()
