"""Image files are opened in one place, which refuses what is not an image."""

import numpy as np
import pytest
from PIL import Image

from fluxlab.errors import UserError
from fluxlab.images import open_image, read_pixels


def test_transparent_pixels_are_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    image.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", mode=None).mode == "RGBA"
    assert open_image(tmp_path / "a.png").getpixel((1, 0)) == (255, 255, 255)
    pixels = read_pixels(tmp_path / "a.png")
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_files_that_are_not_images_are_refused(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    files = {"text.png": b"text", "empty.png": b"", "cut.png": whole.read_bytes()[:400]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: not a readable image"):
            open_image(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.png: image not found; name another"):
        open_image(tmp_path / "none.png", remedy="name another")
    with pytest.raises(UserError, match="not a readable image"):
        open_image(tmp_path)
