"""One step: the bits of whole forwards, fewer block evaluations, and scores that follow from their definition."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab import UserError, roles
from fluxlab.one_step import one_step, replayed
from fluxlab.positions import Program
from fluxlab.sampling import Sampling
from tests import families
from tests.stores import make_store

PROMPTS = ["a red fox on the left", "a blue star"]


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny", dtype=torch.float32)


@pytest.fixture(params=["tiny", "flux2"])
def each(request, pipe):
    return pipe if request.param == "tiny" else replace(families.load("flux2"), max_sequence_length=16)


@pytest.fixture(scope="module")
def images(pipe):
    rng = np.random.default_rng(0)
    return [rng.random((32, 48, 3), dtype=np.float32) for _ in PROMPTS]


def edits(op: dict) -> list[dict]:
    return [{"a": {**op, "side": "keys", "blocks": block}} for block in range(6)]


FREEFLUX = [
    program
    for op in (
        {"op": "drop", "tokens": "all"},
        *({"op": "offset", "by": by} for by in ([10, 10], [0, 20], [64, 0])),
    )
    for program in edits(op)
]


def test_scores_are_those_of_whole_forwards_to_the_bit(each, images):
    """Against velocities that are computed without sharing, from x built by hand."""
    pipe = each
    programs, sigma = [FREEFLUX[4], FREEFLUX[2], FREEFLUX[7], FREEFLUX[12]], 0.6
    found = one_step(pipe, images, PROMPTS, [3, 4], programs, sigma)
    clean, rows, cols = pipe.encode(images)
    noise = pipe.family.noise([3, 4], clean.shape[-1] // 4, rows, cols, torch.float32)
    x, settings = (1 - sigma) * clean + sigma * noise, pipe.resolve(Sampling(height=32, width=48))

    def velocity(program):
        with torch.inference_mode():
            field = pipe._velocity(PROMPTS, None, [Program.from_config(program)], settings, (8, 12), (sigma, 0))
            return field(x, sigma).double()

    plain = velocity({})
    for i, program in enumerate(programs):
        change = ((velocity(program) - plain) ** 2).sum((1, 2)) / (plain**2).sum((1, 2))
        assert torch.equal(found.change[:, i], 10 * change.log10())
        assert change.min() > 0


def test_a_probe_of_every_block_needs_at_most_six_tenths_of_the_evaluations(pipe, images):
    """Counted by hooks, which a skipped block does not reach."""
    calls, blocks = [], [*pipe.transformer.double_blocks, *pipe.transformer.single_blocks]
    norm = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in blocks]
    try:
        found = one_step(pipe, images[:1], PROMPTS[:1], 0, FREEFLUX)
    finally:
        for hook in norm:
            hook.remove()
    assert len(calls) == found.naive == 6 * 25  # a skipped block is called, and returns what it returned before
    assert found.evaluations == 6 + 4 * sum(6 - block for block in range(6))
    assert found.evaluations <= 0.6 * found.naive


def test_skipped_blocks_are_not_computed(pipe, images):
    inner, blocks = [], [*pipe.transformer.double_blocks, *pipe.transformer.single_blocks]
    hooks = [
        next(m for m in block.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
            lambda *_, n=n: inner.append(n)
        )
        for n, block in enumerate(blocks)
    ]
    try:
        one_step(pipe, images[:1], PROMPTS[:1], 0, [FREEFLUX[4]])
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(set(inner)) == list(range(6))
    assert [inner.count(n) for n in range(6)] == [inner.count(0)] * 4 + [2 * inner.count(0)] * 2


def test_the_model_is_as_before(pipe, images):
    blocks = [*pipe.transformer.double_blocks, *pipe.transformer.single_blocks]
    with pytest.raises(RuntimeError, match="mine"), replayed(blocks):
        raise RuntimeError("mine")
    assert not any("forward" in vars(block) for block in blocks)


def test_a_program_without_effect(pipe, images):
    found = one_step(pipe, images[:1], PROMPTS[:1], 0, [{}, {"a": {"op": "scale", "factor": 1}}])
    assert found.change.tolist() == [[-math.inf, -math.inf]]
    assert found.evaluations == 6 + 0 + 6


@pytest.mark.parametrize(
    ("programs", "sigma", "message"),
    [
        ([{}], 0, "sigma=0: expected a noise level"),
        (
            [{"a": {"op": "regions", "prompts": ["a fox"], "where": [{"box": [0, 0, 2, 2]}], "blocks": [3]}}],
            0.5,
            "acts on activations, sizes or the text",
        ),
        ([{"a": {"op": "resample"}}], 0.5, "acts on activations, sizes or the text"),
        ([{"a": {"op": "ablate", "what": "mlp", "blocks": 0}}], 0.5, "acts on activations, sizes or the text"),
    ],
)
def test_what_one_step_refuses(pipe, images, programs, sigma, message):
    with pytest.raises(UserError, match=message):
        one_step(pipe, images, PROMPTS, 0, programs, sigma)


def test_the_command(tmp_path):
    variants = {f"none_{b}": {"a": {"op": "drop", "side": "keys", "tokens": "all", "blocks": b}} for b in (0, 5)}
    store = make_store(tmp_path / "run", variants, seeds=(0, 1))
    row = {"name": "tiny", "path": "fluxlab/assets/tiny"}
    assert roles.load({**row, "size": [64, 64]}, {"dtype": "float32"}).dtype == torch.float32
    assert roles.main([str(store), "-o", str(tmp_path / "scores.json"), "--sigma", "0.5"]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    assert (found["evaluations"], found["naive"]) == (4 * (6 + 6 + 1), 4 * 18)
    assert list(found["change"]) == ["none_0", "none_5"]
    assert all(-60 < value < 20 for values in found["change"].values() for value in values)
    assert roles.main([str(store), "-o", str(tmp_path / "no" / "x.json")]) == 2
    assert roles.main([str(store)]) == 2
