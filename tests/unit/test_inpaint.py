"""Inpainting: what is exact about the known tokens, and which masks and arguments are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlab.errors import UserError
from fluxlab.positions import Program
from tests import families

PROMPT = "a cat"
SETTINGS = {"steps": 2, "max_sequence_length": 16}
HOLE = np.zeros((4, 4), bool)
HOLE[1:3, 2:] = True


@pytest.fixture(scope="module", params=families.NAMES)
def pipe(request):
    return families.load(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def steps_of(pipe, image, **options):
    """Return the latents after each step."""
    seen = []
    pipe.inpaint(image, HOLE, PROMPT, **SETTINGS, **options, on_step=lambda i, t, x: seen.append(x.clone()))
    return torch.stack(seen)


def nearest(image):
    """Return the image with each pixel of the hole replaced by the nearest known one, by exhaustive search."""
    inside = HOLE.repeat(4, 0).repeat(4, 1)
    known, copy = np.argwhere(~inside), image.copy()
    for r, c in np.argwhere(inside):
        distances = ((known - (r, c)) ** 2).sum(1)
        values = image[tuple(known[distances == distances.min()].T)]
        copy[r, c] = values[0] if len(values) == 1 else copy[r, c]
    return copy


@pytest.mark.parametrize("attention", ["one_way", "both_ways"])
def test_known_tokens_are_on_the_inverted_path_at_every_step(pipe, image, attention):
    known = torch.from_numpy(~HOLE.flatten())
    program = None
    if attention == "one_way":
        numbers = [[int(n) for n in np.flatnonzero(part)] for part in (~HOLE, HOLE)]
        edit = {"op": "mask", "from": ["text", {"indices": numbers[0]}], "to": {"indices": numbers[1]}}
        program = Program.from_config({"a": edit})
    from fluxlab.editing.inpaint import filled

    clean = filled(
        torch.from_numpy(image).permute(2, 0, 1)[None] / 255, torch.from_numpy(HOLE.repeat(4, 0).repeat(4, 1))
    )
    path = [pipe.encode(clean)[0]]
    pipe.invert(clean, PROMPT, programs=program, **SETTINGS, on_step=lambda i, t, x: path.append(x.clone()))
    got = steps_of(pipe, image, attention=attention)
    for after, expected in zip(got, path[-2::-1], strict=True):
        assert torch.equal(after[:, known], expected[:, known])
        assert not torch.equal(after[:, ~known], expected[:, ~known])


@pytest.mark.parametrize("path", ["inverted", "noised"])
def test_nothing_depends_on_what_the_image_shows_in_the_hole(pipe, image, path):
    other = image.copy()
    other[HOLE.repeat(4, 0).repeat(4, 1)] = 255
    assert torch.equal(steps_of(pipe, image, path=path), steps_of(pipe, other, path=path))


def test_one_way_keeps_the_hole_out_of_the_velocity_of_known_tokens(pipe, image):
    """Sampling from the inverted noise without holding anything: known tokens do not see another hole."""
    from fluxlab.editing.known import one_way

    known = torch.from_numpy(~HOLE.flatten())
    noise = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    noise[1, known] = noise[0, known]
    for program, equal in ((one_way(known), True), (None, False)):
        out = pipe.generate(
            [PROMPT] * 2, programs=program, height=16, width=16, latents=noise, output="latent", **SETTINGS
        )
        assert torch.equal(out[0, known], out[1, known]) == equal


def test_a_pixel_of_the_hole_is_the_nearest_known_one(image):
    from fluxlab.editing.inpaint import filled

    inside = torch.from_numpy(HOLE.repeat(4, 0).repeat(4, 1))
    got = filled(torch.from_numpy(image).permute(2, 0, 1)[None].float(), inside)[0].permute(1, 2, 0).numpy()
    expected = nearest(image)
    unique = (expected != image).any(-1) | ~inside.numpy()
    assert unique.sum() > (~inside.numpy()).sum()
    assert (got[unique] == expected[unique]).all()


def test_masks_of_pixels_tokens_and_files_are_equal(pipe, image, tmp_path):
    pixels = HOLE.repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    given = [HOLE, pixels, HOLE.astype(int).tolist(), Image.fromarray(pixels), str(tmp_path / "mask.png")]
    results = [pipe.inpaint(image, mask, PROMPT, steps=1, max_sequence_length=16, output="latent") for mask in given]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros((4, 4), bool)}, "mask covers no token"),
        ({"mask": np.ones((16, 16), bool)}, "mask covers every token"),
        ({"mask": np.ones((8, 4), bool)}, "mask of 8 × 4 .* 16 × 16 pixels, or 4 × 4 tokens"),
        ({"mask": "nowhere.png"}, "mask: .*nowhere.png"),
        ({"path": "sampled"}, "path='sampled': expected inverted or noised"),
        ({"attention": "none"}, "attention='none': expected one_way or both_ways"),
        ({"image": np.zeros((18, 16, 3), np.uint8)}, "height=18: must be a multiple of 4"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts, 3 seeds"),
        ({"iterations": 0}, "iterations=0: expected at least 1"),
    ],
)
def test_wrong_arguments(pipe, image, change, message):
    arguments = {"image": image, "mask": HOLE, "prompt": PROMPT, "seed": 0, **SETTINGS, **change}
    with pytest.raises(UserError, match=message):
        pipe.inpaint(**arguments)
