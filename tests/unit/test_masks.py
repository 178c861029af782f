"""Masks from image files: each kind that drawing programs write is read by its meaning, and the rest is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from fluxlab.errors import UserError
from fluxlab.positions import Context, Layout, Program, compile_programs
from fluxlab.select.masks import _pack, _selected, compact, parse_mask, to_array

SIDE = 64
LEFT = np.zeros((SIDE, SIDE), bool)
LEFT[:, : SIDE // 2] = True
TOP = LEFT.T.copy()
ON_OFF = np.where(LEFT, 255, 0).astype(np.uint8)
WHITE, BLACK = np.full((SIDE, SIDE), 255, np.uint8), np.zeros((SIDE, SIDE), np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
RAMP = np.tile(np.arange(SIDE, dtype=np.uint8) * 4, (SIDE, 1))


def stacked(*channels) -> Image.Image:
    return Image.fromarray(np.stack(channels, -1))


def gray_alpha(gray, alpha) -> Image.Image:
    return Image.fromarray(np.stack((gray, alpha), -1), "LA")


def palette(indices, *colours) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([part for colour in colours for part in colour])
    return image


def soft_edge(largest: int) -> np.ndarray:
    return np.tile(np.clip(np.linspace(3, -3, SIDE) + 0.5, 0, 1) * largest, (SIDE, 1))


SELECTS_LEFT = {
    "white on black": (Image.fromarray(ON_OFF), {}),
    "white on black in colour": (stacked(ON_OFF, ON_OFF, ON_OFF), {}),
    "1 bit": (Image.fromarray(ON_OFF).convert("1"), {}),
    "8 bits that hold 0 and 1": (Image.fromarray(LEFT.astype(np.uint8)), {}),
    "16 bits": (Image.fromarray(ON_OFF.astype(np.uint16) * 257), {}),
    "16 bits that hold 0 and 255": (Image.fromarray(ON_OFF.astype(np.uint16)), {}),
    "16 bits, soft edge": (Image.fromarray(soft_edge(65535).astype(np.uint16)), {}),
    "8 bits, soft edge": (Image.fromarray(soft_edge(255).astype(np.uint8)), {}),
    "opaque": (stacked(ON_OFF, ON_OFF, ON_OFF, WHITE), {}),
    "opaque, nearly": (stacked(ON_OFF, ON_OFF, ON_OFF, WHITE - 2), {}),
    "white, the rest transparent": (stacked(WHITE, WHITE, WHITE, ON_OFF), {}),
    "black, the rest transparent": (stacked(BLACK, BLACK, BLACK, ON_OFF), {}),
    "red, the rest transparent": (stacked(WHITE, BLACK, BLACK, ON_OFF), {}),
    "white, the rest half transparent": (stacked(WHITE, WHITE, WHITE, np.where(LEFT, 255, 128).astype(np.uint8)), {}),
    "painted at half opacity": (stacked(WHITE, WHITE, WHITE, ON_OFF // 2), {}),
    "painted with a soft brush": (stacked(WHITE, WHITE, WHITE, soft_edge(255).astype(np.uint8)), {}),
    "a photo cut out": (stacked(*np.moveaxis(NOISE, -1, 0), ON_OFF), {}),
    "grayscale and alpha": (gray_alpha(WHITE, ON_OFF), {}),
    "grayscale, one transparent value": (Image.fromarray(ON_OFF), {"transparency": 0}),
    "1 bit, one transparent value": (Image.fromarray(ON_OFF).convert("1"), {"transparency": 0}),
    "16 bits, one transparent value": (Image.fromarray(LEFT.astype(np.uint16) * 9 + 5), {"transparency": 5}),
    "colour, one transparent value": (stacked(WHITE, ON_OFF, ON_OFF), {"transparency": (255, 0, 0)}),
    "palette, white on black": (palette(LEFT, (0, 0, 0), (255, 255, 255)), {}),
    "palette, black first": (palette(~LEFT, (255, 255, 255), (0, 0, 0)), {}),
    "palette, one transparent entry": (palette(LEFT, (255, 255, 255), (255, 255, 255)), {"transparency": 0}),
    "palette with alpha": (palette(LEFT, (9, 9, 9), (200, 0, 0)), {"transparency": bytes([0, 255])}),
}


@pytest.mark.parametrize("name", SELECTS_LEFT)
def test_an_image_is_read_by_its_meaning(name, tmp_path):
    image, options = SELECTS_LEFT[name]
    image.save(tmp_path / "mask.png", **options)
    assert (to_array(parse_mask(str(tmp_path / "mask.png"), "mask")) == LEFT).all()


def test_black_and_white_within_a_transparent_border(tmp_path):
    """White is selected, black and transparent are not."""
    stacked(ON_OFF, ON_OFF, ON_OFF, np.where(TOP, 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    assert (to_array(parse_mask(str(tmp_path / "mask.png"), "mask")) == (LEFT & TOP)).all()


def test_a_jpeg_of_a_mask_is_read_in_spite_of_its_noise(tmp_path):
    stacked(ON_OFF, ON_OFF, ON_OFF).save(tmp_path / "mask.jpg", quality=60)
    assert (to_array(parse_mask(str(tmp_path / "mask.jpg"), "mask")) == LEFT).all()


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    Image.fromarray(ON_OFF).save(tmp_path / "mask.png", exif=exif)
    assert (to_array(parse_mask(str(tmp_path / "mask.png"), "mask")) == TOP).all()


@pytest.mark.parametrize("name", [f"mask.{ending}" for ending in ("gif", "webp", "tif", "bmp", "tga", "ico")])
def test_other_formats(name, tmp_path):
    options = {"lossless": True} if name.endswith("webp") else {}
    stacked(ON_OFF, ON_OFF, ON_OFF).save(tmp_path / name, **options)
    assert (to_array(parse_mask(str(tmp_path / name), "mask")) == LEFT).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(NOISE), "has colours and no transparent part, expected a mask: white on black, or painted"),
        (palette(LEFT, (200, 0, 0), (0, 200, 0)), "has colours and no transparent part"),
        (Image.fromarray(RAMP), "is not black and white (50% of it is gray)"),
        (Image.fromarray((soft_edge(200)).astype(np.uint16)), "is not black and white (it is dark everywhere)"),
        (stacked(WHITE, WHITE, WHITE, BLACK), "is transparent everywhere"),
        (stacked(WHITE, WHITE, WHITE, RAMP), "half transparent over 50% of it, neither opaque nor transparent"),
    ],
)
def test_an_image_without_a_mask_in_it_is_refused(image, message, tmp_path):
    file = tmp_path / "mask.png"
    image.save(file)
    with pytest.raises(UserError) as error:
        parse_mask(str(file), "a.tokens.mask")
    assert str(error.value).startswith(f"a.tokens.mask: {file}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(content, tmp_path):
    file = tmp_path / "mask.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"^a\.mask: .*mask\.png.*expected an image file or rows of"):
        parse_mask(str(file), "a.mask")


def test_a_folder_and_an_impossible_name_are_refused(tmp_path):
    for name in (str(tmp_path), "a\0b", "~no_such_user/mask.png"):
        with pytest.raises(UserError, match="expected an image file"):
            parse_mask(name, "mask")


LARGE = np.hypot(*np.indices((600, 500)) - 250.0) < 200


def edit(mask) -> dict:
    return {"a": {"op": "zero", "tokens": {"mask": mask}}}


def rows(selected: np.ndarray) -> list[str]:
    return ["".join("#" if x else "." for x in row) for row in selected]


def test_a_large_mask_is_packed_in_a_config_and_read_back():
    program = Program.from_config(edit(rows(LARGE)))
    packed = program.to_config()
    assert packed["a"]["tokens"]["mask"]["size"] == [600, 500]
    assert len(json.dumps(packed)) < LARGE.size / 50
    again = Program.from_config(packed)
    assert again == program
    assert again.digest == program.digest
    assert (to_array(again.edits[0].where["tokens"]["mask"]) == LARGE).all()
    assert Program.from_config({"a": {"op": "relocate", "to": {"mask": rows(LARGE)}}}).to_config()["a"]["to"]["mask"]


def test_a_large_mask_by_digest_is_short_and_says_where_the_mask_is():
    program = Program.from_config(edit(rows(LARGE)))
    short = program.to_config(mask_digests=True)
    assert short == compact(program.to_config(), digests=True)
    assert len(json.dumps(short)) < 250
    assert short != Program.from_config(edit(rows(~LARGE))).to_config(mask_digests=True)
    with pytest.raises(UserError, match=r"a\.tokens\.mask: .*digest of a mask only.*experiment\.yaml"):
        Program.from_config(short)


def test_a_mask_of_256_by_256_is_written_out_with_the_digest_it_always_had():
    program = Program.from_config(edit(rows(LARGE[:256, :256])))
    assert program.to_config() == program.to_config(mask_digests=True)
    assert program.to_config()["a"]["tokens"]["mask"] == rows(LARGE[:256, :256])
    assert Program.from_config(edit(["#.", ".."])).digest[:16] == "2b6d4c2365f4661e"
    assert Program.from_config(edit(rows(LARGE))).digest[:16] == "7c6b6bd36a006cea"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [2, 2]}, "expected rows of equal length"),
        ({"sizes": [2, 2]}, "unknown key of a packed mask, expected size, packed; did you mean size"),
        ({"size": [2, 2], "packed": "AAAA"}, "packed: damaged"),
        ({"size": [2, 2], "packed": "é"}, "packed: damaged"),
        ({"size": [600, 499], "packed": None}, "packed: damaged, expected 37425 bytes"),
        ({"size": [9000, 9000], "packed": ""}, "9000 × 9000, expected a mask of at most 4096 × 4096 pixels"),
        ({"size": [0, 5], "packed": ""}, "0 × 5"),
    ],
)
def test_a_damaged_packed_mask_is_refused(mask, message):
    if mask.get("packed", "") is None:
        mask = {**mask, "packed": Program.from_config(edit(rows(LARGE))).to_config()["a"]["tokens"]["mask"]["packed"]}
    with pytest.raises(UserError, match=message):
        Program.from_config(edit(mask))


def test_a_large_mask_selects_the_tokens_it_covers():
    layout = Layout(text=0, grid=(6, 5))
    ids = torch.ones(1, layout.tokens, 3)
    context = Context(ids, layout, axes_dim=(4, 14, 14), theta=10000, double=1, single=0, heads=1)
    after = compile_programs([Program.from_config(edit(rows(LARGE)))], context).ids()
    zeroed = (after == 0).all(1).reshape(6, 5)
    share = LARGE.reshape(6, 100, 5, 100).mean((1, 3))
    assert torch.equal(zeroed, torch.from_numpy(share >= 0.5))
    assert zeroed.sum() == 9


SMALL = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9))
AS_CHANNELS = {
    "L": lambda on: on,
    "LA": lambda on: np.stack((on, np.full_like(on, 255)), -1),
    "RGB": lambda on: np.stack((on, on, on), -1),
    "RGBA": lambda on: np.stack((np.full_like(on, 255),) * 3 + (on,), -1),
}


@settings(deadline=None, max_examples=60)
@given(SMALL.filter(lambda selected: selected.any() and not selected.all()), st.sampled_from(sorted(AS_CHANNELS)))
def test_any_mask_is_read_back_from_any_mode(selected, mode):
    image = Image.fromarray(AS_CHANNELS[mode](np.where(selected, 255, 0).astype(np.uint8)))
    assert image.mode == mode
    assert (_selected(image, "mask.png") == selected).all()


@settings(deadline=None, max_examples=60)
@given(SMALL)
def test_any_mask_is_read_back_from_its_packed_form(selected):
    assert (to_array(parse_mask(_pack(rows(selected), digest=False), "mask")) == selected).all()
