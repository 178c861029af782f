"""Images that `encode` and `invert` accept, each with its right values, and those that they refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlab.errors import UserError
from fluxlab.pixels import image_tensor, to_pil

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float() / 255
OPAQUE = np.dstack([PIXELS, np.full((4, 6), 255, np.uint8)])
HALF = np.dstack([PIXELS, np.full((4, 6), 128, np.uint8)])


def palette_image(**info) -> Image.Image:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) % 2, "L").convert("P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        Image.fromarray(OPAQUE),
        PIXELS,
        PIXELS[None],
        torch.from_numpy(PIXELS),
        [PIXELS],
        PIXELS / 255,
        (PIXELS / 255).astype(np.float32),
        EXPECTED,
        EXPECTED[0],
        EXPECTED.double(),
        [EXPECTED[0]],
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', getattr(x, 'mode', ''))}-{len(getattr(x, 'shape', ()))}",
)
def test_every_accepted_form_is_the_same_image(image):
    tensor = image_tensor(image)
    assert tensor.dtype == torch.float32
    assert torch.allclose(tensor, EXPECTED, atol=1e-7)


def test_minus_one_to_one_is_said():
    assert torch.allclose(image_tensor(2 * EXPECTED - 1, (-1, 1)), EXPECTED, atol=1e-6)
    assert torch.equal(image_tensor(PIXELS, (-1, 1)), EXPECTED)  # integers have one range


def test_lists_are_batches():
    assert image_tensor([Image.fromarray(PIXELS), PIXELS, EXPECTED]).shape == (3, 3, 4, 6)


def test_grey_images_have_equal_channels():
    tensor = image_tensor(Image.fromarray(PIXELS[..., 0]))
    assert torch.equal(tensor[:, 0], tensor[:, 2])
    assert torch.equal(tensor[:, 0], EXPECTED[:, 0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (2 * EXPECTED - 1, r"values from -1 to .*: expected floats in 0 … 1; for -1 … 1 pass value_range=\(-1, 1\)"),
        (255 * EXPECTED, "values from 0 to 213: expected floats in 0 … 1"),
        (EXPECTED.masked_fill(EXPECTED == 0, float("nan")), "NaN or infinity"),
        (EXPECTED.masked_fill(EXPECTED == 0, float("inf")), "NaN or infinity"),
        (EXPECTED * 255 % 1 == 0, "dtype torch.bool"),
        (PIXELS.astype(np.int64), "dtype int64: expected uint8"),
        (PIXELS.astype(np.uint16), "dtype uint16: expected uint8"),
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 4, 6\): expected \(H, W, 3\) or \(B, H, W, 3\) for a uint8 array"),
        ((EXPECTED * 255).byte(), r"shape \(1, 3, 4, 6\): expected \(H, W, 3\) or \(B, H, W, 3\) for a uint8 tensor"),
        (EXPECTED.permute(0, 2, 3, 1), r"shape \(1, 4, 6, 3\): expected \(3, H, W\)"),
        (OPAQUE, r"shape \(4, 6, 4\)"),
        (PIXELS[..., 0], r"shape \(4, 6\)"),
        (PIXELS[:0], r"shape \(0, 6, 3\)"),
        (Image.fromarray(HALF), "transparent pixels"),
        (palette_image(transparency=0), "transparent pixels"),
        (Image.fromarray(PIXELS[..., 0].astype(np.int32) * 256, "I"), "mode I: expected 8 bits"),
        (Image.fromarray(PIXELS[..., 0].astype(np.float32), "F"), "mode F: expected 8 bits"),
        ("cat.png", "images hold 'cat.png'"),
        ([], "at least one image"),
        (None, "images hold None"),
        ([PIXELS, PIXELS[:, :3]], r"sizes \[\(4, 3\), \(4, 6\)\]"),
    ],
)
def test_other_images_are_refused_in_one_line(image, message):
    with pytest.raises(UserError, match=message) as error:
        image_tensor(image)
    assert "\n" not in str(error.value)


def test_other_ranges_are_refused():
    with pytest.raises(UserError, match=r"value_range=\(0, 255\): expected \(0, 1\) or \(-1, 1\)"):
        image_tensor(EXPECTED, (0, 255))


def test_pixels_survive_the_way_there_and_back():
    (image,) = to_pil(image_tensor(PIXELS))
    assert np.array_equal(np.asarray(image), PIXELS)
