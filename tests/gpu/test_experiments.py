"""Tasks of experiments on a pretended card with FLUX.1 at its real size (see `fake_device`)."""

from types import SimpleNamespace

import numpy as np
import pytest

from fluxlab import batching
from fluxlab.experiment.cell import Cell
from fluxlab.experiment.inputs import read_inputs, read_scenes
from fluxlab.experiment.task_images import images_of
from fluxlab.experiment.tasks import read_task
from fluxlab.positions import Program
from fluxlab.sampling import Sampling
from tests.gpu.fake_device import UNAVAILABLE, available, pretend
from tests.gpu.real_size import on_meta, pipeline

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)


@pytest.fixture(autouse=True)
def latents_are_finite(monkeypatch):
    """Whether given latents are finite is read from the device, before anything is sampled."""
    start = batching.start
    monkeypatch.setattr(batching, "start", lambda seeds, x, *rest: start(seeds, x, *rest) if x is None else x.float())


TASKS = {
    "exchange": [
        {"name": "inpaint", "attention": "image_one_way"},
        {"name": "inpaint", "path": "inverted", "iterations": 1},
        {"name": "decode", "of": "filled"},
    ],
    "halved": [
        {"name": "upscale", "method": "aligned", "iterations": 1},
        {"name": "upscale", "method": "resized"},
        {"name": "decode", "of": "enlarged"},
        "resize",
        "generate",
    ],
}


@pytest.mark.parametrize("kind", TASKS)
def test_tasks(kind):
    on_meta()
    prompts, files = read_scenes({"kind": kind, "count": 1}, (1024, 1024))
    (inputs,) = read_inputs(**{"mask": None, **files}, prompts=1)
    cells = [
        Cell(f"v{n}", prompts[0], 0, Program(), str(n), task=read_task(task, "task"), inputs=inputs)
        for n, task in enumerate(TASKS[kind])
    ]
    settings = SimpleNamespace(sampling=Sampling(steps=1, height=1024, width=1024, unknown_words="warn"))
    with pretend("cuda"):
        images = images_of(pipeline("schnell", "cuda"), cells, settings)
    assert [np.asarray(image).shape for image in images] == [(1024, 1024, 3)] * len(cells)
