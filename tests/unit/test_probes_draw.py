"""Images of captured arrays: colours are where the values are, and the image below them stays visible."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fluxlab.drawing import attention as draw
from fluxlab.drawing.greyscale import BRIGHTEST, DARKEST, grey_formula, to_grey
from fluxlab.probes import Captured

WORDS, BLOCKS, STEPS, GRID = ["cat", "σign"], [0, 4, 7], [0, 1], (2, 3)


@pytest.fixture
def captured() -> Captured:
    rng = np.random.default_rng(0)
    values = rng.random((1, len(STEPS), len(BLOCKS), len(WORDS), *GRID)).astype(np.float32)
    values[:, :, :, 1] *= 10
    coords = {axis: ((axis,), labels) for axis, labels in (("step", STEPS), ("block", BLOCKS), ("word", WORDS))}
    return Captured(values, ("sample", "step", "block", "word", "row", "col"), coords, {})


def colour(share: float) -> tuple:
    return matplotlib.colormaps[draw.COLORMAP](share, bytes=True)[:3]


def find(sheet: Image.Image, wanted: tuple) -> np.ndarray:
    return np.argwhere((np.asarray(sheet) == wanted).all(-1))


def test_values_become_colours():
    heat = np.array([[0, 0.25, np.nan], [0.5, 0.1, 0]])
    image = draw.overlay(heat)
    assert image.size == (48, 32)
    assert image.getpixel((8, 24)) == colour(1.0)
    assert image.getpixel((24, 8)) == colour(0.5)
    assert image.getpixel((40, 8)) == draw.NAN_COLOUR
    assert draw.overlay(heat, highest=1).getpixel((8, 24)) == colour(0.5)
    assert draw.overlay(np.zeros((2, 2))).getpixel((0, 0)) == colour(0.0)


def test_opacity_grows_with_the_value():
    image = scene((200, 0, 0), (0, 0, 200))
    heat = np.zeros((4, 4))
    heat[0] = [0, 0.5, 1, np.nan]
    grey = np.asarray(to_grey(image)).astype(float)
    opaque, faint, hidden = (np.asarray(draw.overlay(heat, image, opacity=o)) for o in (1, 0.5, 0))
    assert opaque.shape == grey.shape
    np.testing.assert_array_equal(opaque[20:], grey[20:])  # no attention: the image in grey
    np.testing.assert_array_equal(hidden, grey)
    assert tuple(opaque[8, 40]) == colour(1.0)
    np.testing.assert_allclose(opaque[8, 24], (np.array(colour(0.5)) + grey[8, 24]) / 2, atol=2)
    np.testing.assert_allclose(faint[8, 40], (np.array(colour(1.0)) + grey[8, 40]) / 2, atol=2)
    assert tuple(opaque[8, 56]) == draw.NAN_COLOUR
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\), expected \(rows, cols\)"):
        draw.overlay(heat[None, :2, :3])


def scene(background: tuple, thing: tuple) -> Image.Image:
    """A square thing in the middle of an even background."""
    image = Image.new("RGB", (64, 64), background)
    image.paste(Image.new("RGB", (20, 20), thing), (22, 22))
    return image


def contrast(image: Image.Image) -> int:
    """The difference between thing and background, in the channel where it is largest."""
    return max(abs(a - b) for a, b in zip(image.getpixel((32, 32)), image.getpixel((5, 32)), strict=True))


@pytest.mark.parametrize(
    ("background", "thing", "least"),
    [
        ((80, 150, 80), (190, 90, 190), 100),  # green and purple of one luminance: equal greys by the usual formula
        ((150, 100, 200), (120, 130, 60), 100),
        ((160, 180, 200), (150, 40, 200), 80),
        ((128, 128, 128), (136, 132, 128), 12),  # faint: contrast is raised
        ((250, 250, 250), (240, 240, 160), 60),  # light on light
        ((10, 10, 10), (30, 10, 10), 20),  # dark on dark
    ],
)
def test_a_thing_stays_visible_in_grey_and_below_the_map(background, thing, least):
    image = scene(background, thing)
    assert contrast(to_grey(image)) >= least
    nowhere, everywhere = np.zeros((4, 4)), np.ones((4, 4))
    assert contrast(draw.overlay(nowhere, image)) >= least
    assert contrast(draw.overlay(everywhere, image)) >= least * 0.24  # at the largest value of the map, too
    # and the map stays visible over the image, on the thing and on its background
    for x in (5, 32):
        before, after = (np.array(draw.overlay(m, image).getpixel((x, 32)), float) for m in (nowhere, everywhere))
        assert np.abs(after - before).max() >= 45


def test_greys_leave_room_for_the_colours_of_a_map():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    grey = np.asarray(to_grey(image)).astype(float) / 255
    assert grey.shape == (40, 60, 3)
    assert (np.ptp(grey, axis=2) == 0).all()
    low, high = np.percentile(grey, (2, 98))
    assert DARKEST - 0.02 <= low <= DARKEST + 0.1
    assert BRIGHTEST - 0.1 <= high <= BRIGHTEST + 0.02
    even = Image.new("RGB", (8, 8), (90, 90, 90))
    assert np.ptp(np.asarray(to_grey(even))) == 0


def test_the_formula_is_what_greys_are_made_by():
    image = scene((80, 150, 80), (190, 90, 190))
    *weights, offset = grey_formula(image)
    expected = np.clip(np.asarray(image) / 255 @ np.array(weights) + offset, 0, 1)
    np.testing.assert_allclose(np.asarray(to_grey(image))[..., 0] / 255, expected, atol=1 / 255)
    assert grey_formula(image) == grey_formula(image.copy())


def test_a_sheet_is_words_by_blocks(captured):
    """One bright token in one map: its position in the sheet follows from word, block, row and column."""
    spots = {}
    for at in np.ndindex(len(WORDS), len(BLOCKS), *GRID):
        values = np.zeros_like(captured.values)
        values[0, 0, at[1], at[0], at[2], at[3]] = 1
        one = Captured(values, captured.axes, captured.coords, {})
        places = find(draw.sheet(one.sel(step=0), scale="sheet", cell=30), colour(1.0))
        spots[at] = places.mean(0)
        assert np.ptp(places, axis=0).tolist() == [9, 9]
    first = spots[0, 0, 0, 0]
    down, across = spots[1, 0, 0, 0] - first, spots[0, 1, 0, 0] - first
    assert down[0] >= 20 and down[1] == 0 and across[1] >= 30 and across[0] == 0  # noqa: PT018
    for (word, block, row, col), spot in spots.items():
        np.testing.assert_allclose(spot, first + word * down + block * across + [10 * row, 10 * col])


@pytest.mark.parametrize("scale", draw.SCALES)
def test_maps_that_share_a_scale(captured, scale):
    sheet = draw.sheet(captured.sel(step=0), scale=scale, cell=30)
    brightest = find(sheet, colour(1.0))
    tokens = {"sheet": 1, "row": len(WORDS), "cell": len(WORDS) * len(BLOCKS)}[scale]
    assert tokens * 80 <= len(brightest) <= tokens * 125  # a token is 10 pixels wide


def test_any_two_axes_and_rows_by_number(captured):
    sheet = draw.sheet(captured.sel(word="cat"), rows="step", columns="block")
    assert sheet.height > sheet.width * 0.2


def test_a_long_title_is_wrapped(captured):
    one, plain = captured.sel(step=0), draw.sheet(captured.sel(step=0))
    titled = draw.sheet(one, title="a title " * 20)
    assert titled.width == plain.width
    assert titled.height > plain.height + 40
    assert draw.sheet(one, title="x" * 100).size[1] > plain.height + 20  # a word that is too long is broken


def test_wide_and_tall_maps(captured):
    wide, tall = (
        draw.sheet(replace(captured, values=np.ones((1, 2, 3, 2, *grid))).sel(step=0), cell=96)
        for grid in ((2, 6), (6, 2))
    )
    assert find(wide, colour(1.0)).shape[0] == find(tall, colour(1.0)).shape[0] == 6 * 96 * 32
    assert wide.width > tall.width
    assert wide.height < tall.height


def test_one_image_per_column(captured):
    images = [Image.new("RGB", (9, 6), (shade, shade, shade)) for shade in (20, 120, 220)]
    empty = Captured(np.full_like(captured.values, 0), captured.axes, captured.coords, {}).sel(step=0)
    page = draw.sheet(empty, image=images, cell=30)
    each = [draw.sheet(empty, image=image, cell=30) for image in images]
    shown = [np.asarray(image).astype(int) for image in (page, *each)]
    different = np.ptp(np.stack(shown[1:]), 0).max(-1) > 0
    columns = np.flatnonzero(different.any(0))
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    assert [len(part) for part in parts] == [30] * 3
    for part, own in zip(parts, shown[1:], strict=True):
        np.testing.assert_array_equal(shown[0][:, part], own[:, part])
    with pytest.raises(ValueError, match="image: got 2 for 3 columns, expected one, or one per column"):
        draw.sheet(empty, image=images[:2])


def test_wrong_arguments_are_reported(captured):
    with pytest.raises(ValueError, match=r"step has 2 entries: select one with .sel\(step=…\) or use .mean\('step'\)"):
        draw.sheet(captured)
    with pytest.raises(ValueError, match=r"head: axis not found, expected head, block, row, col, got "):
        draw.sheet(captured.sel(step=0).mean("word"), rows="head")
    with pytest.raises(ValueError, match="scale 'cells': expected one of sheet, row, cell"):
        draw.sheet(captured.sel(step=0), scale="cells")
    with pytest.raises(ValueError, match="scale 'cell': expected sheet or row"):
        draw.frames(captured, scale="cell")
    with pytest.raises(ValueError, match="images: got 3 for 2 frames"):
        draw.frames(captured, images=[Image.new("RGB", (4, 4))] * 3)
    with pytest.raises(ValueError, match="images: got none"):
        draw.gif("x.gif", [])


def test_a_gif_over_steps(captured, tmp_path):
    frames = draw.frames(captured, cell=30, scale="sheet")
    assert len(frames) == len(STEPS)
    # one scale: the brightest of all steps is in one frame only
    assert sorted(bool(len(find(frame, colour(1.0)))) for frame in frames) == [False, True]
    draw.gif(tmp_path / "a.gif", frames, seconds=0.2)
    with Image.open(tmp_path / "a.gif") as found:
        assert found.n_frames == len(STEPS)
        assert found.info["duration"] == 200
        found.seek(1)
        shown = np.asarray(found.convert("RGB")).astype(int)
    assert np.abs(shown - np.asarray(frames[1])).max() <= 40  # of 256 colours
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"]
