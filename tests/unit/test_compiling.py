"""Blocks that run compiled: once for each kind, whatever is edited or observed."""

import pytest
import torch

import fluxlab
from fluxlab.errors import UserError
from fluxlab.model import compiling
from fluxlab.model.compiling import compile_blocks
from fluxlab.probes import Probe
from fluxlab.sampling import Sampling
from tests import families

PROGRAMS = [
    None,
    {"a": {"op": "zero", "blocks": [1]}},
    {"a": {"op": "temperature", "factor": 2, "heads": [1]}},
    {"a": {"op": "theta", "value": 5000, "side": "keys", "seen_by": "text"}},
    {"a": {"op": "mask", "from": "image", "to": {"words": ["cat"]}}},
    {"a": {"op": "windows", "size": 4}},
    {"a": {"op": "ablate", "what": "mlp", "to": "zero", "blocks": [2]}},
]


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    yield pipe
    torch._dynamo.reset()


def latents(pipe, programs, side=32, **more):
    prompts = ["a red cat"] * len(programs)
    return pipe.sample(prompts, 0, programs, Sampling(steps=1, height=side, width=side), output="latent", **more)


def test_each_kind_of_block_is_compiled_once(monkeypatch):
    """A batch of one is another compilation. Programs, sizes, probes and text lengths are none. In fp64 both call the
    same operators, so that the bits are equal."""
    graphs = []
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float64, device="cpu")

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def both(programs, **more):
        monkeypatch.setattr("fluxlab.pipeline.compile_blocks", lambda model, on: compile_blocks(model, False))
        expected = latents(pipe, programs, **more)
        monkeypatch.setattr("fluxlab.pipeline.compile_blocks", lambda model, on: compile_blocks(model, True, backend))
        assert torch.equal(latents(pipe, programs, **more), expected)

    both(PROGRAMS[:3])
    assert len(graphs) == 2 * len(compiling.REGIONS)
    both(PROGRAMS)
    both(PROGRAMS[:2], side=48)
    latents(pipe, PROGRAMS[:2], probe=Probe({"words": {"kind": "words", "words": ["cat"]}}))
    assert len(graphs) == 2 * len(compiling.REGIONS)
    both(PROGRAMS[:1])
    both(PROGRAMS[1:2], side=48)
    assert len(graphs) == 4 * len(compiling.REGIONS)


def test_a_setting_of_a_run(pipe, monkeypatch):
    """It reaches the model, is undone, and is part of what determines an image."""
    asked = []
    monkeypatch.setattr("fluxlab.pipeline.compile_blocks", lambda model, on: asked.append(on))
    for compile in (True, False):
        pipe.generate("a red cat", steps=1, height=32, width=32, output="latent", compile=compile)
    assert asked == [True, False]
    assert "compile" not in Sampling().changed()
    assert Sampling(compile=True).changed() == {"compile": True}


def test_blocks_are_restored(pipe):
    before = [set(vars(block)) for block in pipe.transformer.double_blocks]
    compile_blocks(pipe.transformer, True, "eager")
    assert [set(vars(block)) - old for block, old in zip(pipe.transformer.double_blocks, before, strict=True)] == [
        set(compiling.REGIONS)
    ] * len(before)
    compile_blocks(pipe.transformer, False)
    assert [set(vars(block)) for block in pipe.transformer.double_blocks] == before


def test_no_compiler(pipe, monkeypatch):
    monkeypatch.setattr(compiling, "which", lambda name: None)
    with pytest.raises(UserError, match="install g"):
        compile_blocks(pipe.transformer)


def test_not_a_boolean():
    with pytest.raises(UserError, match="compile='yes': expected true or false"):
        Sampling(compile="yes").check()


@pytest.mark.soak
def test_blocks_of_flux2(monkeypatch):
    """Equal bits in fp64, where both call the same operators, for a batch with several programs."""
    torch._dynamo.reset()
    graphs, pipe = [], families.load("flux2", dtype=torch.float64, device="cpu")
    options = {"height": 32, "width": 32, "steps": 1, "max_sequence_length": 16, "output": "latent"}
    expected = pipe.generate("a red cat", 0, PROGRAMS[:3], **options)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("fluxlab.pipeline.compile_blocks", lambda model, on: compile_blocks(model, True, backend))
    assert torch.equal(pipe.generate("a red cat", 0, PROGRAMS[:3], **options), expected)
    assert len(graphs) >= 2 * len(compiling.REGIONS)  # the checks of shapes under pytest compile some twice
    torch._dynamo.reset()
