"""FLUX.1 at real size on a pretended card: right devices, no fp64, nothing read back but results, and memory.

See `fake_device`. Values are not computed, so these tests run in seconds on any machine. Numbers are compared with
those of the CPU in the other files of this folder, on a real GPU.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlab.memory import Memory, ModelSizes, Room, Workload, make_plan
from fluxlab.memory.costs import decode_bytes
from fluxlab.model import AUTOENCODERS, TRANSFORMERS
from fluxlab.positions import OPS, Program
from fluxlab.probes import PROBES, Probe
from fluxlab.probes import memory as probe_memory
from fluxlab.probes import resolve as resolve_probes
from tests.gpu.fake_device import FLAGS, IMAGE, UNAVAILABLE, available, captured, pretend
from tests.gpu.real_size import on_meta, pipeline

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)

PROMPT = "a red cat holding a sign that says hello world"

ARGUMENTS = {
    "ablate": {"what": "mlp", "to": "mean", "over": "image"},
    "band": {"pairs": [1, 4]},
    "restart": {"parts": [2, 2]},
    "distance": {"factor": 0.9, "beyond": [8, 8]},
    "gain": {"factor": 2},
    "inject": {"source": 0, "what": ["keys", "values"], "tokens": "image"},
    "jitter": {"std": 1},
    "layout": {"like": "qwen"},
    "mask": {"from": "image", "to": {"words": "cat"}},
    "offset": {"by": 1},
    "quantize": {"to": "bfloat16"},
    "regions": {"prompts": ["a fox"], "where": [{"box": [0, 0, 8, 8]}]},
    "relocate": {"to": {"box": [0, 0, 8, 8]}, "tokens": {"words": "cat"}},
    "rotate": {"degrees": 30},
    "scale": {"factor": 1.2},
    "set": {"value": 1},
    "temperature": {"factor": 1.2},
    "text_line": {"axis": "index"},
    "theta": {"value": 5000},
    "warp": {"field": [[[0, 0], [1, 2]]]},
    "windows": {"size": 2},
}
"""The arguments of ops that need some, and more where another path is taken."""

SELECTED = {
    "words": {"tokens": {"words": ["cat", "hello world"]}},
    "box": {"tokens": {"box": [0, 0, 16, 32]}, "axes": "row"},
    "mask": {"tokens": {"mask": ["#.", ".#"]}, "steps": [1]},
    "indices": {"tokens": [{"indices": [0, 5, -1]}, "text"], "blocks": [0, 30]},
    "heads": {"heads": "0-3", "blocks": "single"},
    "keys": {"side": "keys", "seen_by": "text", "blocks": [1]},
    "two groups": {"side": "keys", "seen_by": {"box": [0, 0, 32, 16]}, "heads": 1, "blocks": "double"},
    "fading": {"strength": {"from": 1, "to": 0}},
}

REQUESTS = {
    "activation": {"site": "mlp", "tokens": {"box": [0, 0, 2, 2]}},
    "concepts": {"words": ["cat", "sign"]},
    "logits": {"from": {"words": "cat"}, "to": {"box": [0, 0, 8, 8]}, "against": "image"},
    "map": {"from": {"indices": [0, 7, 2]}, "to": "all"},
    "peak": {"tokens": {"box": [0, 0, 8, 8]}},
    "regions": {"regions": {"cat": {"words": "cat"}, "left": {"box": [0, 0, 16, 8]}}},
    "similarity": {"tokens": {"indices": [3, 9, 10]}, "to": 0},
}


@pytest.fixture(scope="module")
def cuda():
    on_meta()
    with pretend("cuda") as device:
        yield device


@pytest.fixture(scope="module")
def pipes(cuda):
    return {name: pipeline(name, "cuda") for name in ("dev", "schnell")}


@pytest.fixture(params=["dev", "schnell"])
def pipe(request, pipes, cuda):
    cuda.read_back.clear()
    cuda.moved.clear()
    return pipes[request.param]


def programs() -> list[dict]:
    """Return a program for each op except `resample`, which changes the size of the image."""
    return [{"a": {"op": name, **ARGUMENTS.get(name, {})}} for name, op in OPS.items() if op.acts_on != "size"]


def test_an_image(pipe, cuda):
    (image,) = pipe.generate(PROMPT, steps=2)
    assert image.size == (1024, 1024)
    assert captured(cuda) == []


def test_every_op(pipe, cuda):
    elsewhere = ("mask", "place", "regions")  # a mask at full size, reference images, longer text
    every = [program for program in programs() if program["a"]["op"] not in elsewhere]
    assert len(pipe.generate(PROMPT, programs=[None, *every], steps=1, height=256, width=256)) == len(every) + 1
    assert captured(cuda) == [(len(every) + 1, 256, 64)]  # the latents of a step, once, for ops that see them


def test_regions(pipe, cuda):
    pipe.generate(PROMPT, programs={"a": {"op": "regions", **ARGUMENTS["regions"]}}, steps=1, height=256, width=256)
    assert captured(cuda) == []


def test_a_mask_and_a_resampled_image_at_full_size(pipe, cuda):
    pipe.generate(PROMPT, programs={"a": {"op": "mask", **ARGUMENTS["mask"]}}, steps=1)
    assert captured(cuda) == []
    cuda.read_back.clear()
    small = {"a": {"op": "resample"}}
    pipe.generate(PROMPT, programs=small, steps=1, height=512, width=512)
    assert captured(cuda) == []


def test_every_selection(pipe, cuda):
    every = [{"a": {"op": "offset", "by": 3, **where}} for where in SELECTED.values()]
    pipe.generate(PROMPT, programs=every, steps=2, true_cfg=2.0, height=512, width=512)
    assert captured(cuda) == []


@pytest.mark.parametrize(
    "given",
    [
        {"what": "residual", "map": "match"},
        {"what": "keys", "rotation": "before", "heads": [1]},
        {"what": ["keys", "values"], "mode": "append", "tokens": {"box": [0, 0, 4, 4]}, "strength": 0.5},
        {"what": ["keys", "values"], "seen_by": {"box": [0, 0, 8, 8]}},
        {"what": "velocity", "tokens": "image"},
    ],
    ids=lambda given: "-".join(map(str, given)),
)
def test_injected_activations(pipes, cuda, given):
    cuda.read_back.clear()
    program = {"a": {"op": "inject", "source": 0, "tokens": "image", **given}, "b": {"op": "zero", "blocks": [3]}}
    pipes["schnell"].generate(PROMPT, programs=[None, program], steps=1, height=256, width=256)
    assert captured(cuda) == []


def test_reference_images(pipe, cuda):
    image = Image.fromarray(np.zeros((256, 512, 3), np.uint8))
    program = {"a": {"op": "place", "tokens": "reference"}}
    pipe.generate(PROMPT, programs=program, references=[[image]], steps=1, height=512, width=512)
    # references are encoded first, and checked
    assert [dtype for _, dtype in cuda.read_back].count(IMAGE) == 1
    assert {dtype for _, dtype in cuda.read_back} <= {IMAGE, FLAGS}


def test_tables_are_moved_once(pipes, cuda):
    """A table of a program that does not change is moved before the first step, one that fades at each of them."""

    def tables(program: dict) -> int:
        cuda.moved.clear()
        pipes["schnell"].generate(PROMPT, programs=program, steps=2, height=256, width=256)
        return sum(shape[-2:] == (256 + 256, 64) for shape, _ in cuda.moved)

    assert tables({"a": {"op": "zero", "blocks": [3]}}) == 4  # cos and sin, of this block and of the others
    assert tables({"a": {"op": "zero", "strength": {"from": 1, "to": 0.5}}}) == 4  # cos and sin, of both steps


def test_every_probe(pipe, cuda):
    capture = {name: {"kind": name, "blocks": [0, 40], **REQUESTS.get(name, {})} for name in PROBES}
    capture["activation"]["blocks"], capture["concepts"]["blocks"] = [40], [1]
    for averaged in ("entropy", "quadrants"):
        capture[averaged]["average"] = ["heads"]
    groups = {"a": {"op": "zero", "side": "keys", "seen_by": "text"}}
    probe = Probe({"max_mb": 4000, **capture})
    pipe.generate(PROMPT, programs=[None, groups], steps=1, height=256, width=256, probe=probe)
    read = captured(cuda)
    assert {name.split(".")[0] for name in probe.arrays} == set(PROBES)
    assert sum(map(np.prod, read)) >= sum(array.values.size for array in probe.arrays.values()) / 2


def test_word_maps_read_back_once_what_they_hold(pipe, cuda):
    probe = Probe("words")
    pipe.generate(PROMPT, steps=1, probe=probe)
    assert sum(map(np.prod, captured(cuda))) == probe.arrays["words"].values.size
    assert probe.arrays["words"].values.shape[-2:] == (64, 64)


def test_dev_with_word_maps_fits_its_plan(pipes, cuda):
    """Of everything resident, as the plan counts it; the plan may promise more than is used, by at most a tenth."""
    pipe, probe = pipes["dev"], Probe("words")
    others = cuda.live - sum(
        weight.nbytes
        for part in (pipe.transformer, pipe.autoencoder, pipe.text.clip, pipe.text.t5)
        for weight in part.parameters()
    )
    pipe._encoded.clear()
    context = pipe.context([PROMPT], 512, (64, 64), pipe.schedule.times(1, 4096))
    needed = probe_memory(resolve_probes(probe.capture, context, 1), context)
    meta = on_meta()
    text = sum(weight.nbytes for part in ("clip", "t5") for weight in meta[part].parameters())
    sizes = ModelSizes(
        transformer=TRANSFORMERS["dev"],
        autoencoder=AUTOENCODERS["flux1"],
        dtype=torch.bfloat16,
        stored=torch.bfloat16,
        autoencoder_dtype=torch.bfloat16,
        text_bytes=text,
        text_layer_bytes=0,
    )
    work = Workload(batch=1, height=1024, width=1024, text=512, steps=1, probe_bytes=sum(needed.values()))
    plan = make_plan(sizes, work, Memory("resident"), Room("cuda", None))
    cuda.peak = cuda.live
    pipe.generate(PROMPT, steps=1, probe=probe)
    traced = cuda.peak - others - text  # the plan encodes text first, this pipeline keeps its encoders
    assert traced <= plan.peak_bytes
    assert plan.peak_bytes <= 1.1 * traced


def test_programs_that_are_tested_cover_all_ops():
    assert {edit.op for program in programs() for edit in Program.from_config(program).edits} == {
        name for name, op in OPS.items() if op.acts_on != "size"
    }


@pytest.mark.parametrize(("side", "count"), [(1024, 1), (512, 8), (2048, 1), (3072, 2)])
def test_memory_of_the_decoder(side, count):
    """Above 2048 it works in stripes, which need at most 16 bytes per pixel and channel of the widest map."""
    with pretend("cuda") as device, torch.inference_mode():
        decoder = pipeline("schnell", "cuda").autoencoder
        z = torch.zeros(count, 16, side // 8, side // 8, dtype=torch.bfloat16, device="cuda")
        before = device.peak = device.live
        decoder.decode(z)
        used, planned = device.peak - before, decode_bytes(AUTOENCODERS["flux1"], count, side, side, 2)
    assert used <= planned <= 1.3 * used
