"""FLUX.2 at real size on a pretended card, as `test_fake_cuda` for FLUX.1."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlab.memory import Memory, ModelSizes, Room, Workload, make_plan
from fluxlab.probes import PROBES, Probe
from tests.gpu.fake_device import FLAGS, IMAGE, UNAVAILABLE, available, captured, pretend
from tests.gpu.real_size import pipeline2
from tests.gpu.test_fake_cuda import PROMPT, REQUESTS, SELECTED, programs

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)

WEIGHTS_GB = {"klein4b": 7.75, "klein9b": 18.2, "flux2dev": 64.5}
"""Of the transformers in bf16, as published."""

SHAPES = pytest.mark.parametrize("each", ["klein4b"], indirect=True, scope="module")
"""The shapes of klein 4B stand for all models: only depth and width differ."""


@pytest.fixture(scope="module")
def cuda():
    with pretend("cuda") as device:
        yield device


@pytest.fixture(scope="module", params=list(WEIGHTS_GB))
def each(request, cuda):
    return pipeline2(request.param, "cuda")


@pytest.fixture
def pipe(each, cuda):
    cuda.read_back.clear()
    return each


def test_an_image(pipe, cuda):
    weights = sum(weight.nbytes for weight in pipe.transformer.parameters())
    assert weights / 1e9 == pytest.approx(WEIGHTS_GB[pipe.name], rel=0.01)
    (image,) = pipe.generate(PROMPT, steps=1)
    assert image.size == (1024, 1024)
    assert captured(cuda) == []


@SHAPES
def test_every_op_and_every_selection(pipe, cuda):
    every = [program for program in programs() if program["a"]["op"] not in ("mask", "place", "regions")]
    every += [{"a": {"op": "shuffle", "tokens": "text"}}, {"a": {"op": "mirror", "axis": "l", "tokens": "text"}}]
    images = pipe.generate(PROMPT, programs=[None, *every], steps=1, height=256, width=256)
    assert len(images) == len(every) + 1
    assert captured(cuda) == [(len(every) + 1, 256, 128)]  # the latents of a step, once, for ops that see them
    (regions,) = [program for program in programs() if program["a"]["op"] == "regions"]  # another length of text
    pipe.generate(PROMPT, programs=regions, steps=1, height=256, width=256)
    cuda.read_back.clear()
    where = [given for given in SELECTED.values() if given.get("blocks") != [0, 30]]  # klein 4B has 25
    every = [{"a": {"op": "offset", "by": 3, **given}} for given in where]
    pipe.generate(PROMPT, programs=every, steps=2, height=512, width=512)
    assert captured(cuda) == []


@SHAPES
def test_reference_images_and_every_probe(pipe, cuda):
    image = Image.fromarray(np.zeros((256, 512, 3), np.uint8))
    capture = {name: {"kind": name, "blocks": [0, 20], **REQUESTS.get(name, {})} for name in PROBES}
    capture["activation"]["blocks"], capture["concepts"]["blocks"] = [20], [1]
    probe = Probe({"max_mb": 4000, **capture})
    pipe.generate(PROMPT, references=[[image]], steps=1, height=256, width=256, probe=probe)
    assert {name.split(".")[0] for name in probe.arrays} == set(PROBES)
    assert {dtype for _, dtype in cuda.read_back} >= {IMAGE, FLAGS}


@SHAPES
def test_an_image_fits_its_plan(pipe, cuda):
    """Of everything resident; the plan may promise more than is used, by at most a tenth."""
    encoder = sum(weight.nbytes for weight in pipe.text.encoder.parameters())
    weights = sum(weight.nbytes for part in (pipe.transformer, pipe.autoencoder) for weight in part.parameters())
    others = cuda.live - encoder - weights
    pipe._encoded.clear()
    sizes = ModelSizes(
        pipe.transformer.params,
        pipe.autoencoder.params,
        dtype=torch.bfloat16,
        stored=torch.bfloat16,
        autoencoder_dtype=torch.bfloat16,
        text_bytes=encoder,
        text_layer_bytes=0,
    )
    work = Workload(batch=1, height=1024, width=1024, text=512, steps=1)
    plan = make_plan(sizes, work, Memory("resident"), Room("cuda", None))
    assert plan.parts["transformer"] + plan.parts["autoencoder"] == weights
    cuda.peak = cuda.live
    pipe.generate(PROMPT, steps=1)
    traced = cuda.peak - others - encoder  # the plan encodes text first, this pipeline keeps its encoder
    assert traced <= plan.peak_bytes
    assert plan.peak_bytes <= 1.1 * traced
