"""Pictures of captured arrays: colours lie where the values are, and scales say what they say."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from fluxlab.drawing import attention as draw
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


def test_a_map_in_colour():
    heat = np.array([[0, 0.25, np.nan], [0.5, 0.1, 0]])
    picture = draw.overlay(heat)
    assert picture.size == (48, 32)
    assert picture.getpixel((8, 24)) == colour(1.0)
    assert picture.getpixel((24, 8)) == colour(0.5)
    assert picture.getpixel((40, 8)) == draw.NOTHING
    assert draw.overlay(heat, highest=1).getpixel((8, 24)) == colour(0.5)
    assert draw.overlay(np.zeros((2, 2))).getpixel((0, 0)) == colour(0.0)


def test_over_an_image():
    image = Image.new("RGB", (60, 40), (200, 0, 0))
    heat = np.array([[0, 0, 0], [1, 0, 0]])
    picture = draw.overlay(heat, image, opacity=1)
    assert picture.size == image.size
    assert picture.getpixel((10, 30)) == colour(1.0)
    grey = image.convert("L").getpixel((0, 0))
    assert 0.5 * grey < picture.getpixel((30, 10))[0] < 0.8 * grey  # of the image, and of the colormap's black
    assert draw.overlay(heat, image, opacity=0).getpixel((10, 30)) == (grey,) * 3
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\): a map \(rows, cols\)"):
        draw.overlay(heat[None])


def test_a_sheet_is_words_by_blocks(captured):
    """One bright token in one map: where it lies tells word, block, row and column."""
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
def test_what_a_scale_shares(captured, scale):
    sheet = draw.sheet(captured.sel(step=0), scale=scale, cell=30)
    brightest = find(sheet, colour(1.0))
    tokens = {"sheet": 1, "row": len(WORDS), "cell": len(WORDS) * len(BLOCKS)}[scale]
    assert tokens * 80 <= len(brightest) <= tokens * 125  # a token is 10 pixels wide


def test_any_two_axes_and_rows_by_number(captured):
    sheet = draw.sheet(captured.sel(word="cat"), rows="step", columns="block")
    assert sheet.height > sheet.width * 0.2


def test_a_title_takes_the_lines_it_needs(captured):
    one, plain = captured.sel(step=0), draw.sheet(captured.sel(step=0))
    titled = draw.sheet(one, title="a title " * 20)
    assert titled.width == plain.width
    assert titled.height > plain.height + 40
    assert draw.sheet(one, title="x" * 500).size == draw.sheet(one, title="x" * 499).size  # cut


def test_an_image_a_column(captured):
    images = [Image.new("RGB", (9, 6), (shade, shade, shade)) for shade in (20, 120, 220)]
    empty = Captured(np.full_like(captured.values, 0), captured.axes, captured.coords, {}).sel(step=0)
    page = draw.sheet(empty, image=images, cell=30)
    each = [draw.sheet(empty, image=image, cell=30) for image in images]
    shown = [np.asarray(picture).astype(int) for picture in (page, *each)]
    different = np.ptp(np.stack(shown[1:]), 0).max(-1) > 0
    columns = np.flatnonzero(different.any(0))
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    assert [len(part) for part in parts] == [30] * 3
    for part, own in zip(parts, shown[1:], strict=True):
        np.testing.assert_array_equal(shown[0][:, part], own[:, part])
    with pytest.raises(ValueError, match="image: 2 for 3 columns, expected one, or one a column"):
        draw.sheet(empty, image=images[:2])


def test_what_does_not_fit_is_named(captured):
    with pytest.raises(ValueError, match=r"step has 2 entries: choose one with .sel\(step=…\), or .mean\('step'\)"):
        draw.sheet(captured)
    with pytest.raises(ValueError, match=r"head: there is no such axis, expected head, block, row, col"):
        draw.sheet(captured.sel(step=0).mean("word"), rows="head")
    with pytest.raises(ValueError, match="scale 'cells': expected one of sheet, row, cell"):
        draw.sheet(captured.sel(step=0), scale="cells")
    with pytest.raises(ValueError, match="scale 'cell': expected sheet or row"):
        draw.frames(captured, scale="cell")
    with pytest.raises(ValueError, match="images: 3 for 2 frames"):
        draw.frames(captured, images=[Image.new("RGB", (4, 4))] * 3)
    with pytest.raises(ValueError, match="pictures: there are none"):
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
