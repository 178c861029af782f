"""The pretended device itself, mps, and models that are loaded to a device and moved (see `fake_device`)."""

import pytest
import torch

import fluxlab
from fluxlab.attribution import with_gains
from fluxlab.learning.objectives import Place, make_objective
from fluxlab.positions import Program
from fluxlab.probes import Probe
from fluxlab.settings import Sampling
from tests import tiny
from tests.gpu.fake_device import UNAVAILABLE, available, captured, pretend
from tests.gpu.real_size import on_meta, pipeline

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)


def test_the_pretended_device_sees_faults():
    """What the other tests rely on."""
    with pretend("mps") as device, torch.inference_mode():
        x = torch.ones(4).to("mps")
        assert (device.live, device.peak) == (16, 16)
        with pytest.raises(TypeError, match="no fp64"):
            x.double()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(x.isfinite().all())
        with pytest.raises(Exception, match="device"):
            x + torch.ones(4)
        assert x.cpu().device.type == "cpu"
        assert device.read_back == [((4,), torch.float32)]
        del x
        assert device.live == 0


def test_mps_gets_no_fp64():
    """Up to the image: fp64 on the device raises."""
    on_meta()
    with pretend("mps") as device:
        pipe = pipeline("schnell", "mps")
        program = [{"a": {"op": "rotate", "degrees": 30}}, {"a": {"op": "yarn"}}, {"a": {"op": "shuffle"}}]
        probe = Probe({"q": {"kind": "quadrants", "blocks": [0]}})
        pipe.generate("a cat", programs=program, steps=1, height=256, width=256, probe=probe)
        assert captured(device)


@pytest.mark.parametrize("name", ["place", "denoising", "attention"])
def test_scores_of_gradients_need_no_fp64(name):
    """Their velocity, with frequencies that an edit changes. The backward pass runs on real devices only."""
    on_meta()
    config = {"name": name, "images": "sampled", "word": {"words": "cat"}, "box": {"box": [0, 0, 8, 8]}}
    program, place = Program.from_config({"a": {"op": "yarn"}}), Place("a red cat on the left", 0)
    with pretend("mps"), torch.inference_mode():
        pipe = pipeline("schnell", "mps")
        settings = pipe.resolve(Sampling(steps=1, height=256, width=256))
        objective = make_objective(config, pipe, [place.prompt], [place], settings, program)
        gains, how = [torch.ones(1, 57, 24, 64)] * 2, {"program": program, "settings": settings}
        found = with_gains(pipe, [place.prompt], [place.seed], objective.score([place]), gains, **how)
        assert found.shape == (2, 1)
        assert found.device.type == "mps"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_folder_is_loaded(device, tmp_path, monkeypatch):
    """Whether weights are finite is read from the device, before anything is sampled."""
    monkeypatch.setattr("fluxlab.checkpoints.casting._finite", lambda *_: True)
    folder = tiny.save(tmp_path, guidance=True)
    with pretend(device) as pretended:
        pipe = fluxlab.load_pipeline(folder, device=device, cache="none")
        pipe.encode_prompt("a cat", 24)  # encoded text is kept in main memory
        pretended.read_back.clear()
        pipe.generate("a cat", height=32, width=32, steps=2, max_sequence_length=24)
        assert captured(pretended) == []
        assert pipe.device.type == device
