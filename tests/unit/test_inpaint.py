"""Inpainting: what is exact about the known tokens, and which masks and arguments are refused."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

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


GUIDED = {"true_cfg": 3.0, "negative_prompts": "a dog"}


@pytest.mark.parametrize(("attention", "more"), [("one_way", {}), ("both_ways", {}), ("both_ways", GUIDED)])
def test_known_tokens_are_on_the_inverted_path_at_every_step(pipe, image, attention, more):
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
    pipe.invert(clean, PROMPT, programs=program, **SETTINGS, **more, on_step=lambda i, t, x: path.append(x.clone()))
    got = steps_of(pipe, image, attention=attention, path="inverted", **more)
    for after, expected in zip(got, path[-2::-1], strict=True):
        assert torch.equal(after[:, known], expected[:, known])
        assert not torch.equal(after[:, ~known], expected[:, ~known])


def test_known_tokens_are_the_image_mixed_with_noise_at_every_step(pipe, image):
    """The noise is the one that `generate` starts from with this seed, and the last step ends at the image."""
    from fluxlab.editing.inpaint import filled

    known, inside = torch.from_numpy(~HOLE.flatten()), torch.from_numpy(HOLE.repeat(4, 0).repeat(4, 1))
    encoded, rows, cols = pipe.encode(filled(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, inside))
    noise = pipe.family.noise([0], encoded.shape[-1] // 4, rows, cols, torch.float32)
    sigmas = pipe.schedule.times(2, rows * cols)
    for after, t in zip(steps_of(pipe, image), sigmas[1:], strict=True):
        expected = ((1 - t) * encoded.double() + t * noise.double())[:, known]
        assert torch.allclose(after[:, known].double(), expected, atol=1e-5)


def test_the_hole_is_guided_away_from_the_negative_prompt(pipe, image):
    """Known tokens are the image mixed with noise all the same. At scale 1 there is no guidance."""
    known = torch.from_numpy(~HOLE.flatten())
    plain, one = steps_of(pipe, image), steps_of(pipe, image, true_cfg=1)
    guided, other = steps_of(pipe, image, **GUIDED), steps_of(pipe, image, true_cfg=3.0)
    assert torch.equal(plain, one)
    assert torch.equal(guided[:, :, known], plain[:, :, known])
    assert not torch.equal(guided[:, :, ~known], plain[:, :, ~known])
    assert not torch.equal(guided[:, :, ~known], other[:, :, ~known])


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


def drawn() -> dict[str, Image.Image]:
    """Return a blob on 16 × 16 pixels as image editors save it: hard or soft edges, with or without alpha."""
    large = Image.new("L", (128, 128))
    ImageDraw.Draw(large).ellipse((50, 30, 118, 78), fill=255)
    soft = large.resize((16, 16), Image.Resampling.BOX)  # antialiased, as a brush paints
    white, red = Image.new("L", soft.size, 255), Image.new("RGB", soft.size, "red")
    hard = soft.point(lambda value: 255 * (value >= 128))
    painted = red.copy()
    painted.putalpha(soft)
    return {
        "1 bit": hard.convert("1"),
        "greyscale, soft edge": soft,
        "colour": Image.merge("RGB", [soft] * 3),
        "opaque alpha": Image.merge("RGBA", [soft] * 3 + [white]),
        "greyscale with alpha": Image.merge("LA", [soft, white]),
        "palette": hard.convert("P"),
        "red on a transparent layer": painted,
    }


@pytest.mark.parametrize("kind", drawn())
def test_a_mask_drawn_in_an_image_editor(kind, tmp_path):
    """The hole is every token with a pixel that is at least half white, whatever the file's format."""
    from fluxlab.editing.inpaint import hole_tokens

    values = np.asarray(drawn()["greyscale, soft edge"])
    expected = [
        [any(values[r, c] >= 128 for r in range(4 * i, 4 * i + 4) for c in range(4 * j, 4 * j + 4)) for j in range(4)]
        for i in range(4)
    ]
    assert 0 < np.sum(expected) < 16
    drawn()[kind].save(tmp_path / "mask.png")
    for mask in (str(tmp_path / "mask.png"), drawn()[kind]):
        assert hole_tokens(mask, (16, 16), (4, 4)).tolist() == expected


def test_a_drawn_mask_that_cannot_be_meant(tmp_path):
    """Another size, or mostly grey: one line that names the mask and what is expected."""
    from fluxlab.editing.inpaint import hole_tokens

    drawn()["colour"].resize((32, 16)).save(tmp_path / "wide.png")
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "grey.png")
    said = {"wide": "mask of 16 × 32 .* 16 × 16 pixels, or 4 × 4 tokens", "grey": "grey.png .*white on black"}
    for name, message in said.items():
        with pytest.raises(UserError, match=message) as error:
            hole_tokens(str(tmp_path / f"{name}.png"), (16, 16), (4, 4))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros((4, 4), bool)}, "mask covers no token"),
        ({"mask": np.ones((16, 16), bool)}, "mask covers every token"),
        ({"mask": np.ones((8, 4), bool)}, "mask of 8 × 4 .* 16 × 16 pixels, or 4 × 4 tokens"),
        ({"mask": "nowhere.png"}, "mask: .*nowhere.png"),
        ({"path": "sampled"}, "path='sampled': expected inverted or noised"),
        ({"attention": "none"}, "attention='none': expected one_way, image_one_way or both_ways"),
        ({"image": np.zeros((18, 16, 3), np.uint8)}, "height=18: must be a multiple of 4"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts, 3 seeds"),
        ({"iterations": 0, "path": "inverted"}, "iterations=0: expected at least 1"),
        ({"iterations": 3}, "iterations has no effect with path='noised': leave it out, or set path='inverted'"),
        ({"source_prompt": "a dog"}, "source_prompt has no effect with path='noised'"),
    ],
)
def test_wrong_arguments(pipe, image, change, message):
    arguments = {"image": image, "mask": HOLE, "prompt": PROMPT, "seed": 0, **SETTINGS, **change}
    with pytest.raises(UserError, match=message):
        pipe.inpaint(**arguments)
