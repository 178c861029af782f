"""Samples that are equal up to some step are computed once until then, with the same bits."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fluxlab
from fluxlab.compose.yaml_source import read_yaml
from fluxlab.config import ModelRow
from fluxlab.experiment.cells import at_once, batches, cells, references, step_rows
from fluxlab.experiment.spec import Experiment, checked, read_variants
from fluxlab.model.attention import BF16_TILES
from fluxlab.positions import Program, actions, compile_programs
from fluxlab.probes import Probe
from fluxlab.sampling import Sampling, Schedule, schedule, shared_rows
from tests import families
from tests.stores import ARTICLE
from tests.stores import settings as settings_of

PROMPTS = ("a red cat", "a blue fox")
VARIANTS = read_yaml(Path("configs/exp/step_window.yaml"))["variants"]
WINDOWS = [Program(), *(Program.from_config(program) for program in VARIANTS.values())]


def load(name: str, dtype: torch.dtype = torch.float32) -> fluxlab.Pipeline:
    """Return the embedded FLUX.1, or a random FLUX.2 that draws images of the same size."""
    if name == "tiny":
        return fluxlab.load_pipeline("tiny", dtype=dtype, device="cpu")
    return replace(families.load("flux2", dtype=dtype), size=(32, 32), max_sequence_length=16)


@pytest.fixture(scope="module", params=["tiny", "flux2"])
def float_pipe(request):
    return load(request.param)


@pytest.fixture(scope="module", params=[("tiny", torch.float32), ("tiny", torch.bfloat16), ("flux2", torch.float32)])
def pipe(request):
    return load(*request.param)


def same(pipe, x: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the bits are equal, or in bf16 with AMX the values up to its rounding: docs/numerics.md."""
    rounded = pipe.dtype == torch.bfloat16 and BF16_TILES
    return bool((x - expected).abs().max() < 0.1) if rounded else torch.equal(x, expected)


def blocks_of(pipe) -> int:
    return pipe.transformer.params.depth + pipe.transformer.params.depth_single_blocks


class Count:
    """Counts evaluations of blocks: one per block and row."""

    def __init__(self, pipe):
        self.rows: list[int] = []
        blocks = [*pipe.transformer.double_blocks, *pipe.transformer.single_blocks]
        self.hooks = [block.register_forward_pre_hook(lambda _, x: self.rows.append(len(x[0]))) for block in blocks]

    def __enter__(self) -> "Count":
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def distinct_pasts(programs, sigmas) -> int:
    """Return how many (step, what was done until then) there are: no exact way of sampling can do with less."""
    acting = [actions(program, sigmas) for program in programs]
    return len({(step, tuple(one[: step + 1])) for one in acting for step in range(len(sigmas) - 1)})


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=8), st.data())
def test_rows_are_the_distinct_pasts(acting, data):
    starts = data.draw(st.lists(st.integers(0, 1), min_size=len(acting), max_size=len(acting)))
    for step, (samples, of) in enumerate(shared_rows(starts, acting)):
        past = [(start, *each[: step + 1]) for start, each in zip(starts, acting, strict=True)]
        assert len(samples) == len(set(past))
        assert [past[samples[row]] for row in of] == past
        assert list(samples) == sorted(samples)


def test_what_programs_do_at_each_step():
    sigmas = schedule(4, 256)
    zero, late = WINDOWS[1], Program.from_config({"x": {"op": "zero", "steps": "2-3"}})
    fading = Program.from_config({"a": {"op": "zero", "strength": {"from": 1, "to": 0}}})
    other = Program.from_config({"a": {"op": "zero", "axes": "row"}})
    always, never = actions(zero, sigmas), actions(Program(), sigmas)
    assert never == [()] * 4
    assert actions(late, sigmas) == never[:2] + always[2:]
    assert actions(fading, sigmas)[0] == always[0] != actions(fading, sigmas)[1]
    assert not set(actions(other, sigmas)) & set(always)
    both = Program.from_config({"a": {"op": "scale", "factor": 2}, "b": {"op": "offset", "by": [1, 1]}})
    swapped = Program(both.edits[::-1])
    assert not set(actions(both, sigmas)) & set(actions(swapped, sigmas))


def test_step_window_has_the_bits_of_unshared_steps(pipe):
    """In bf16 with enough tokens for `dense_attention`. In parts of three, too."""
    side = 64 if pipe.dtype == torch.bfloat16 else 32
    arguments = ([PROMPTS[0]] * 11, [3] * 11, WINDOWS, Sampling(steps=4, height=side, width=side))
    with Count(pipe) as naive:
        expected = pipe.sample(*arguments, output="latent", share=False)
    blocks = blocks_of(pipe)
    sigmas = pipe.schedule.times(4, side**2 // 16)
    assert sum(naive.rows) == 11 * 4 * blocks
    for together in (None, 3):
        with Count(pipe) as shared:
            images = pipe.sample(*arguments, output="latent", at_once=together)
        assert same(pipe, images, expected)
        assert sum(shared.rows) == distinct_pasts(WINDOWS, sigmas) * blocks == 24 * blocks
        assert max(shared.rows) <= (together or 11)


STEPS = st.sampled_from(["all", [0], [1], [2], "1-2", {"fraction": [0, 0.5]}, {"sigma": [0.4, 1]}])
STRENGTHS = st.sampled_from([1, 0.5, {"from": 1, "to": 0}, {"from": 0, "to": 1}, [[0.7, 1], [0.3, 0]]])
OPS = st.sampled_from(
    [
        {"op": "zero"},
        {"op": "scale", "factor": 1.5, "tokens": {"words": ["cat"]}},
        {"op": "jitter", "std": 1, "axes": "row"},
        {"op": "dype", "factor": 2},
        {"op": "gain", "factor": 2, "blocks": [1, 3]},
        {"op": "theta", "value": 5000, "side": "keys", "seen_by": "text"},
        {"op": "temperature", "factor": 2, "heads": [1]},
        {"op": "mask", "from": "image", "to": {"words": ["red"]}},
        {"op": "windows", "size": 4},
        {"op": "concentrate", "group": 16},
        {"op": "distance", "factor": 0.9, "beyond": [1, 1]},
        {"op": "ablate", "what": "mlp", "to": "mean", "over": "image", "blocks": [2]},
    ]
)


@st.composite
def windowed(draw):
    """Programs of few ops, windows and strengths, so that several are equal up to some step."""
    edits = draw(st.lists(st.tuples(OPS, STEPS, STRENGTHS), max_size=2, unique_by=lambda x: x[0]["op"]))
    return {
        str(i): {**op, "steps": steps, **({"strength": strength} if op["op"] not in WHOLE else {})}
        for i, (op, steps, strength) in enumerate(edits)
    }


WHOLE = ("mask",)
"""Ops that take no strength."""


@settings(deadline=None, max_examples=8)
@given(st.lists(windowed(), min_size=2, max_size=4), st.sampled_from([None, 1, 3]))
@example([{}, {"a": {"op": "theta", "value": 5000, "side": "keys", "seen_by": "text"}}], 1)
def test_any_programs_have_the_bits_of_unshared_steps(float_pipe, programs, together):
    sampling = Sampling(steps=3, height=32, width=32)
    arguments = ([PROMPTS[0]] * len(programs), [1] * len(programs), programs, sampling)
    expected = float_pipe.sample(*arguments, output="latent", share=False)
    assert torch.equal(float_pipe.sample(*arguments, output="latent", at_once=together), expected)


@settings(deadline=None, max_examples=25)
@given(st.lists(windowed(), min_size=2, max_size=4))
def test_equal_actions_have_equal_tables_and_masks(float_pipe, programs):
    """Against the tables themselves: two programs that do the same at a step are handed the same values."""
    read = [Program.from_config(program) for program in programs]
    sigmas = float_pipe.schedule.times(3, 64)
    acting = [actions(program, sigmas) for program in read]
    plain = [Program(tuple(e for e in program.edits if e.acts_on != "activations")) for program in read]
    prompts = [PROMPTS[0]] * len(read)
    compiled = compile_programs(plain, float_pipe.context(prompts, 24, (8, 8), sigmas))
    for step, t in enumerate(sigmas[:-1]):
        tables = [
            [compiled.side_table(t, side, block, head, b, query) for side, block, head, query in SEEN]
            for b in range(len(read))
        ]
        for a, b in itertools.combinations(range(len(read)), 2):
            if acting[a][step] == acting[b][step]:
                assert all(
                    torch.equal(x, y)
                    for mine, other in zip(tables[a], tables[b], strict=True)
                    for x, y in zip(mine, other, strict=True)
                )


SEEN = tuple(itertools.product(("queries", "keys"), (0, 1, 3), (0, 1), (0, 30)))
"""Side, block, head and query."""


MIXED = (
    {},
    {"a": {"op": "mask", "from": "image", "to": {"words": ["red"]}, "steps": "1"}},
    {"a": {"op": "zero", "side": "keys", "seen_by": {"words": ["cat"]}, "steps": "2"}},
    {"a": {"op": "temperature", "factor": 2, "heads": [1], "blocks": "double", "steps": "1-2"}},
    {"a": {"op": "temperature", "factor": 2, "heads": [1], "blocks": "double", "steps": "1"}},
    {"a": {"op": "yarn", "factor": 2, "steps": "2"}},
)


@pytest.mark.parametrize("more", [{}, {"true_cfg": 2.0}], ids=["plain", "cfg"])
def test_masks_groups_heads_and_probes(float_pipe, more):
    capture = {
        "words": {"kind": "words", "words": ["cat"]},
        "logits": {"kind": "logits", "from": "image", "to": {"words": ["red"]}},
        "compared": {"kind": "similarity", "to": 2, "blocks": [3]},
    }
    del capture["compared" if more else "logits"]
    prompts = ["a red cat"] * len(MIXED) + ["a red cat on the left"]
    results = {}
    for share in (True, False):
        probe = Probe(capture)
        arguments = (prompts, [0] * len(prompts), [*MIXED, {}], Sampling(steps=3, height=32, width=32, **more))
        with Count(float_pipe) as count:
            latents = float_pipe.sample(*arguments, output="latent", probe=probe, share=share)
        results[share] = latents, {name: array.values for name, array in probe.arrays.items()}, sum(count.rows)
    (latents, arrays, rows), (expected, others, naive) = results[True], results[False]
    assert torch.equal(latents, expected)
    assert rows * 21 == naive * (2 + 4 + 7)
    for name, values in arrays.items():
        assert np.array_equal(values, others[name]), name


def test_a_probe_in_several_forwards_of_a_step(pipe):
    results = []
    for together in (None, 2):
        probe = Probe({"words": {"kind": "words", "words": ["cat"]}})
        pipe.sample(
            ["a red cat"] * 4,
            [0] * 4,
            WINDOWS[:4],
            Sampling(steps=4, height=32, width=32),
            probe=probe,
            at_once=together,
        )
        results.append(probe.arrays["words"].values)
    assert same(pipe, *map(torch.from_numpy, results))


def test_a_callback_sees_every_sample_and_may_change_it(pipe):
    """What `on_step` changes is not known, so nothing is shared then."""
    programs = [None, {"a": {"op": "zero", "steps": "1"}}]

    def change(i, t, x):
        x[1] += 0.5

    both = pipe.generate("a red cat", 0, programs, steps=2, output="latent", on_step=change)
    one = pipe.generate("a red cat", 0, programs[1], steps=2, output="latent", on_step=lambda i, t, x: x.add_(0.5))
    assert same(pipe, both[1:], one)


def experiment_of(variants):
    values = {"model": ModelRow("tiny", "fluxlab/assets/tiny"), "model_digest": "0" * 16}
    variants = read_variants({"baseline": {}, **variants})
    return checked(Experiment(name="test", variants=variants, prompts=PROMPTS, seeds=(0, 1), **values))


@given(st.lists(st.sampled_from(sorted(VARIANTS)), unique=True, max_size=6), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_batches_keep_cells_together_that_share_steps(names, size):
    experiment = experiment_of({name: VARIANTS[name] for name in names})
    base = settings_of(batch_tokens=size * 280, steps=8)
    every = cells(experiment, base)
    grouped = batches(every, base)
    assert Counter(cell.key for batch in grouped for cell in batch) == Counter({cell.key for cell in every})
    sigmas = Schedule(use_dynamic_shifting=False).times(8, 256)
    total = 4 * distinct_pasts(experiment.variants.values(), sigmas)
    assert sum(sum(step_rows(batch, base)) for batch in grouped) == total
    for a, b in itertools.pairwise(grouped):
        assert len(a) + len(b) > size or len(a) > size
    assert at_once(base, every) == size


def test_step_window_costs_the_least_that_is_possible():
    """Counted by hand. Two images that were treated differently so far are different, so each needs its own forward.

    They are less than 0.6 of all.
    """
    windows = [(start, end) for start in range(4) for end in range(start + 1, 5)]
    treated = ["".join(str(int(start <= i // 5 < end)) for i in range(20)) for start, end in windows]
    least = len({one[: step + 1] for one in ["0" * 20, *treated] for step in range(20)})
    assert (len(treated), least) == (10, 120)
    file = read_yaml(Path("configs/exp/step_window.yaml"))
    row = {"model": ModelRow("tiny", "fluxlab/assets/tiny"), "model_digest": "0" * 16}
    variants = read_variants({"baseline": {}, **file["variants"]})
    seeds = tuple(range(file["seeds"]))
    experiment = checked(Experiment(name="test", variants=variants, prompts=tuple(file["prompts"]), seeds=seeds, **row))
    base = settings_of(batch_tokens=4480, steps=20)
    counted = [
        sum(sum(step_rows(batch, base)) for batch in batches(part, base))
        for part in (cells(experiment, base), references(experiment, base))
    ]
    assert counted == [8 * least, 2 * 20]
    assert sum(counted) / (88 * 20 + 2 * 20) == pytest.approx(0.556, abs=0.001)


def test_batches_without_shared_steps_are_those_of_earlier_releases():
    experiment = experiment_of(ARTICLE)
    base = settings_of(batch_tokens=5 * 280)
    every = cells(experiment, base)
    assert batches(every, base) == [every[i : i + 5] for i in range(0, len(every), 5)]
