"""Experiments that load a model themselves, on a pretended card with FLUX.1 at its real size (see `fake_device`)."""

from dataclasses import replace

import pytest

from experiments import enlarge, exchange, inpaint
from fluxlab import batching
from tests.gpu.fake_device import UNAVAILABLE, available, pretend
from tests.gpu.real_size import on_meta, pipeline

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)


@pytest.fixture(autouse=True)
def latents_are_finite(monkeypatch):
    """Whether given latents are finite is read from the device, before anything is sampled."""
    start = batching.start
    monkeypatch.setattr(batching, "start", lambda seeds, x, *rest: start(seeds, x, *rest) if x is None else x.float())


def test_inpaint():
    on_meta()
    methods = ("noised, text sees", "inverted once, one-way")
    with pretend("cuda"):
        images = inpaint.images_of(pipeline("schnell", "cuda"), exchange.case(0, 16), 1, methods)
        made = {name: image.shape for name, image, _ in images}
    assert made == dict.fromkeys((inpaint.DRAWN, inpaint.FLOOR, inpaint.ALONE, *methods), (1024, 1024, 3))


def test_upscale():
    on_meta()
    methods = ({"method": "aligned", "iterations": 1}, {"method": "resized", "until": 0.8})
    setting = replace(enlarge.SETTINGS["own"], prompted={}, upscaled={one["method"]: one for one in methods})
    with pretend("cuda"):
        made = dict(enlarge.images_of(pipeline("schnell", "cuda"), setting, [enlarge.case(setting, 0, 16)], 1))
    assert {images[0].shape for images in made.values()} == {(1024, 1024, 3)}
    assert {"aligned", "resized"} < set(made)
