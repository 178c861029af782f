"""The grid image: positions and sizes of its cells, its bytes, and its text."""

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont, features
from scipy.ndimage import find_objects

from fluxlab.drawing import grid, lettering
from fluxlab.drawing.grid import draw_grid, write_grid

CAT, FOX = "A cat holding a sign that says hello world", "a red fox on the left"
ROWS = [("baseline", "identity"), ("half", "scale factor 0.5 on image"), ("zero", "zero on image")]
COLUMNS = [(CAT, 0), (CAT, 7), (FOX, 0), (FOX, 7)]


def colour(i: int, j: int) -> tuple[int, int, int]:
    return 4 * i + 1, 5 * j + 3, 200


@pytest.fixture
def painted(tmp_path):
    """Return a factory of `images` for the grid: one plain colour per cell, in any size."""

    def images(size=(64, 64)):
        def image(i, j):
            file = tmp_path / f"{i}-{j}-{size[0]}.png"
            if not file.exists():
                Image.new("RGB", size, colour(i, j)).save(file)
            return file

        return image

    return images


def boxes(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    """Return top, left, bottom and right of every cell's colour, `(rows, columns, 4)`."""
    red, green, blue = np.moveaxis(np.asarray(picture), -1, 0)
    painted = (blue == 200) & (red % 4 == 1) & (green % 5 == 3)
    numbers = np.where(painted, red.astype(np.int32) // 4 * columns + green // 5 + 1, 0)
    cells = find_objects(numbers)
    assert len(cells) == rows * columns
    assert None not in cells
    for number, (y, x) in enumerate(cells, 1):
        assert (numbers[y, x] == number).all(), "a cell is a rectangle that nothing covers"
    return np.array([(y.start, x.start, y.stop, x.stop) for y, x in cells]).reshape(rows, columns, 4)


def test_cells_are_in_order(painted):
    picture, _ = draw_grid(ROWS, COLUMNS, painted())
    cells = boxes(picture, 3, 4)
    assert (cells[..., 2:] - cells[..., :2] == 128).all()  # 64 px twice as large
    top, left, bottom, right = np.moveaxis(cells, -1, 0)
    assert (top == top[:, :1]).all()
    assert (left == left[:1]).all()
    assert (top[1:] > bottom[:-1]).all()
    within, between = (left[0, 1:] - right[0, :-1])[[0, 2]], (left[0, 1:] - right[0, :-1])[1]
    assert (within > 0).all()
    assert between > 2 * within.max()  # room and a rule between prompts
    gap = np.asarray(picture)[top.min() : bottom.max(), right[0, 1] : left[0, 2]]
    assert (gap == 0xBB).all((0, 2)).sum() == 1  # a rule of 1 px from the first row to the last
    assert (np.asarray(picture)[:, :3] == 255).all()


def test_a_list_of_lists_is_accepted(painted, tmp_path):
    image = painted()
    paths = [[image(i, j) for j in range(4)] for i in range(3)]
    assert draw_grid(ROWS, COLUMNS, paths)[0] == draw_grid(ROWS, COLUMNS, image)[0]


def test_small_images_keep_their_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    picture = np.asarray(draw_grid(ROWS[:1], COLUMNS[:1], lambda i, j: tmp_path / "a.png")[0])
    margin = len(picture) - 128 - np.argmax((picture[::-1, -20:] < 255).any((1, 2)))
    right = picture.shape[1] - np.argmax((picture[margin + 5, ::-1] < 255).any(-1))
    assert np.array_equal(picture[margin : margin + 128, right - 128 : right], noise.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    ("size", "cell"),
    [
        ((16, 16), (128, 128)),
        ((48, 80), (96, 160)),
        ((100, 100), (100, 100)),
        ((300, 200), (300, 200)),
        ((1024, 1024), (512, 512)),
        ((768, 1344), (293, 512)),
        ((2000, 10), (512, 3)),
    ],
)
def test_size_of_a_cell(painted, size, cell):
    cells = boxes(draw_grid(ROWS[:1], COLUMNS[:2], painted(size))[0], 1, 2)
    assert (cells[..., 2:] - cells[..., :2] == cell[::-1]).all()


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(25, 40, (64, 64)), (60, 4, (64, 64)), (60, 2, (512, 512)), (2, 40, (512, 512))]
)
def test_many_cells(painted, rows, columns, size):
    names = [(f"block_{i}", f"zero on image, blocks {i}, keys") for i in range(rows)]
    places = [(f"{FOX} and {j // 4}", j % 4) for j in range(columns)]
    picture, dpi = draw_grid(names, places, painted(size))
    assert picture.width <= 1.03 * grid.MAX_WIDTH
    assert picture.height <= 1.03 * grid.MAX_HEIGHT
    assert picture.width / dpi <= grid.PAGE * 1.01
    cells = boxes(picture, rows, columns)
    sides = cells[..., 2:] - cells[..., :2]
    assert len(np.unique(sides)) == 1
    assert sides.min() >= 64
    assert size[0] > 64 or sides.min() % 64 == 0


def test_images_are_opened_one_at_a_time(painted, monkeypatch):
    alive, load = [], grid._load

    def watched(path):
        assert sum(ref() is not None for ref in alive) <= 1  # the previous image
        image = load(path)
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(grid, "_load", watched)
    draw_grid(ROWS, COLUMNS, painted((300, 300)))
    assert len(alive) == 1 + 3 * 4


def test_missing_cells(painted, tmp_path):
    image = painted()
    none, _ = draw_grid(ROWS, COLUMNS, lambda i, j: None if (i, j) == (1, 2) else image(i, j))
    deleted, _ = draw_grid(ROWS, COLUMNS, lambda i, j: tmp_path / "deleted.png" if (i, j) == (1, 2) else image(i, j))
    assert none == deleted
    whole, _ = draw_grid(ROWS, COLUMNS, image)
    top, left, bottom, right = boxes(whole, 3, 4)[1, 2]
    box = np.asarray(none)[top:bottom, left:right]
    share = {shade: (box == shade).all(-1).mean() for shade in (0xF0, 0xD8)}
    assert share[0xF0] > 0.5
    assert share[0xD8] > 0.05  # hatching
    assert box.min() < 0x90  # the word "missing"
    changed = (np.asarray(none) != np.asarray(whole)).any(-1)
    changed[top:bottom, left:right] = False
    assert not changed.any()
    assert draw_grid(ROWS, COLUMNS, lambda i, j: None)[0].size == whole.size


def test_other_shapes_and_modes(tmp_path, painted):
    image = painted()
    wide, clear = tmp_path / "wide.png", tmp_path / "clear.png"
    Image.new("RGB", (640, 320), "black").save(wide)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(clear)
    picture, _ = draw_grid(ROWS[:1], COLUMNS, [[image(0, 0), wide, clear, image(0, 3)]])
    whole, _ = draw_grid(ROWS[:1], COLUMNS, image)
    cells = boxes(whole, 1, 4)[0]
    pixels = np.asarray(picture)

    def cell(j):
        return pixels[cells[j, 0] : cells[j, 2], cells[j, 1] : cells[j, 3]]

    assert (cell(1)[32:96] == 0).all()  # twice as wide as high, centred in the square cell
    assert (cell(1)[:31] == 255).all()
    assert (cell(1)[97:] == 255).all()
    assert (cell(2) == 255).all()


def test_the_same_images_give_the_same_bytes(painted, tmp_path):
    one = write_grid(tmp_path / "one.png", ROWS, COLUMNS, painted(), title="A title")
    two = write_grid(str(tmp_path / "two.png"), ROWS, COLUMNS, painted(), title="A title")
    assert one.read_bytes() == two.read_bytes()
    with Image.open(one) as picture:
        assert picture.mode == "RGB"
        assert picture.info["dpi"][0] == pytest.approx(draw_grid(ROWS, COLUMNS, painted())[1], rel=1e-3)
    os.utime(one, (1, 1))
    write_grid(one, ROWS, COLUMNS, painted(), title="A title")
    assert one.stat().st_mtime == 1  # unchanged, so not written
    write_grid(one, ROWS, COLUMNS, painted(), title="Another")
    assert one.read_bytes() != two.read_bytes()


def test_a_failure_leaves_the_old_file(painted, tmp_path):
    file, image = tmp_path / "out" / "grid.png", painted()
    file.parent.mkdir()
    write_grid(file, ROWS, COLUMNS, image)
    before = file.read_bytes()
    (tmp_path / "bad.png").write_bytes(image(0, 0).read_bytes()[:90])
    with pytest.raises(ValueError, match=r"bad\.png: not a readable image .*; remove it"):
        write_grid(file, ROWS, COLUMNS, lambda i, j: tmp_path / "bad.png" if i == 2 else image(i, j))
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["grid.png"]


def test_errors(painted, tmp_path):
    with pytest.raises(ValueError, match="0 variants and 4 columns"):
        draw_grid([], COLUMNS, painted())
    with pytest.raises(ValueError, match="3 variants and 0 columns"):
        draw_grid(ROWS, [], painted())
    with pytest.raises(ValueError, match="images: rows of 4, 3 paths, expected 3 rows of 4"):
        draw_grid(ROWS, COLUMNS, [[None] * 4, [None] * 3])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        draw_grid(ROWS, COLUMNS, lambda i, j: tmp_path / "text.png")


LONG = "An oil painting of a landscape with mountains and a river, " * 20


TEXTS = {
    "empty": "",
    "blank": " ",
    "control": "a\0b\ud800c\r\nd\u2028e",
    "arabic": "قطة تحمل لافتة مكتوب عليها مرحبا",
    "hebrew": "חתול מחזיק שלט",
    "chinese": "一只猫",
    "emoji": "🐱\U0001f468\u200d\U0001f469 e\u0301",
    "a word": "x" * 3000,
    "long": LONG,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text(painted, text):
    picture, _ = draw_grid([(text, text), *ROWS[1:]], [(text, 0), (text, 2**62), (FOX, 0), (FOX, 7)], painted(), text)
    boxes(picture, 3, 4)  # no cell is covered
    assert picture.height < 3 * 128 + 300


def test_a_long_prompt_ends_in_an_ellipsis(painted):
    columns = [(LONG, 0), (LONG, 1), (FOX, 0)]
    frame = grid._frame((64, 64), 3, columns)
    size, lines, numbered = grid._set_prompts(frame, [LONG, FOX])
    assert not numbered
    assert len(lines[0]) == 3
    assert lines[0][-1].endswith("…")
    assert " ".join(lines[1]) == FOX
    assert max(lettering.length(line, size) for line in lines[0]) <= 2 * 128 + frame.gap


def test_narrow_columns_are_numbered_and_listed(painted):
    columns = [(f"{FOX} holding a sign that says {j}", 0) for j in range(30)]
    frame = grid._frame((64, 64), 3, columns)
    _, lines, numbered = grid._set_prompts(frame, [prompt for prompt, _ in columns])
    assert numbered
    assert lines == [[str(j + 1)] for j in range(30)]
    picture, _ = draw_grid(ROWS, columns, painted())
    end = boxes(picture, 3, 30)[-1, -1, 2]
    foot = (np.asarray(picture)[end:] < 128).any((1, 2))
    assert np.count_nonzero(foot[1:] & ~foot[:-1]) >= 30  # lines of text under the grid


@pytest.mark.parametrize(
    ("seeds", "word", "upright"), [((0, 3), False, False), ((12, 10**17), True, False), ((12, 2**62), True, True)]
)
def test_seeds_fit_their_columns(seeds, word, upright):
    frame = grid._frame((64, 64), 3, [(CAT, seed) for seed in seeds])
    labels, aside = grid._seeds(frame, seeds)
    assert (aside is not None) == word  # "seed" once, next to the numbers
    assert all(label.width <= frame.cell[0] for label in labels)
    assert (labels[1].height > labels[1].width) == upright


def test_shortened_names_keep_both_ends():
    lines = lettering.shorten("zero_of_all_rows_in_every_block_keys_x0_125", 1, 20, 200)
    assert len(lines) == 1
    assert lines[0].startswith("zero_")
    assert lines[0].endswith("_125")
    assert 150 < lettering.length(lines[0], 20) <= 200
    assert lettering.shorten("half", 1, 20, 200) == ["half"]
    assert lettering.shorten("zero_of_all_rows_in_keys", 2, 20, 200) == ["zero_of_all_rows_", "in_keys"]


def test_right_to_left_text_is_shaped_if_pillow_can():
    engine = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    assert lettering._font("שלט", 20, False).layout_engine == engine
    assert lettering._font("sign", 20, False).layout_engine == ImageFont.Layout.BASIC


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(6, 40), st.integers(30, 400), st.integers(1, 4))
def test_lines_fit_and_lose_no_characters(text, size, width, most):
    text = lettering.one_line(text)
    lines, split = lettering.wrap(text, size, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(lettering.length(line, size) <= width or len(line) == 1 for line in lines)
    words = [word for line in lines for word in line.split()]
    assert split or "_" in text or words == text.split()
    for fewer in (lettering.truncate(lines, most, size, width), lettering.shorten(text, most, size, width)):
        assert len(fewer) <= max(most, 1)
        assert (fewer == lines) == (len(lines) <= most)
        assert fewer == lines or "…" in "".join(fewer)


def test_the_grid_loads_neither_pyplot_nor_torch(tmp_path):
    code = f"""
import sys
from fluxlab.drawing.grid import write_grid
assert "matplotlib" not in sys.modules
write_grid({str(tmp_path / "grid.png")!r}, [("a", "b")], [("c", 0)], lambda i, j: None)
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
