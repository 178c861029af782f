"""The planner: exact weights, and the published sizes on cards of 24, 12 and 8 GB."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.errors import UserError
from fluxlab.memory import Memory, ModelSizes, Room, Workload, make_plan
from fluxlab.memory.costs import (
    aligned,
    block_counts,
    end_counts,
    is_modulation,
    modulation_count,
    modulation_width,
    transformer_bytes,
)
from fluxlab.memory.pages import MappedPages
from fluxlab.memory.scatter import spread
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, Flux

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DEV = ModelSizes(
    TRANSFORMERS["dev"],
    AUTOENCODERS["flux1"],
    dtype=BF16,
    stored=BF16,
    autoencoder_dtype=BF16,
    text_bytes=2 * (123_060_480 + 4_762_310_656),  # CLIP-L and T5 v1.1 XXL
    text_layer_bytes=2 * (32128 * 4096 + 64 * 32),
)
DEV_FP8 = ModelSizes(*[FP8 if name == "stored" else value for name, value in vars(DEV).items()])
WORD_MAPS = 450 * 10**6
"""More than the word maps of a prompt of 20 words at 1024², all 57 blocks and 28 steps, take with their scratch."""
LARGE = Workload(batch=1, height=1024, width=1024, text=512, steps=28, probe_bytes=WORD_MAPS)


@pytest.fixture(scope="module")
def dev():
    with torch.device("meta"):
        return Flux(TRANSFORMERS["dev"])


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_weights_are_exact(name):
    with torch.device("meta"):
        model = Flux(TRANSFORMERS[name])
    sizes = {key: weight.numel() for key, weight in model.named_parameters()}
    p = model.params
    assert transformer_bytes(p, 2) == 2 * sum(sizes.values())
    assert modulation_count(p) == sum(n for key, n in sizes.items() if is_modulation(key))
    for kind, counts in (("double_blocks", block_counts(p, True)), ("single_blocks", block_counts(p, False))):
        assert sum(counts) == sum(n for key, n in sizes.items() if key.startswith(f"{kind}.0.") and "mod" not in key)
    outside = [n for key, n in sizes.items() if "blocks" not in key and "adaLN" not in key]
    assert sum(end_counts(p)) == sum(outside)


def test_modulations_are_27_percent_of_dev(dev):
    total = sum(weight.numel() for weight in dev.parameters())
    share = modulation_count(dev.params) / total
    assert round(modulation_count(dev.params) / 1e9, 2) == 3.25
    assert share == pytest.approx(0.273, abs=5e-4)
    outputs = [m.lin.out_features for m in dev.modules() if type(m).__name__ == "Modulation"]
    assert modulation_width(dev.params) == sum(outputs) + dev.final_layer.adaLN_modulation[1].out_features


def test_24_gb_without_quantisation_leaves_a_gigabyte():
    plan = make_plan(DEV, LARGE, Memory(limit_gb=24), Room("cuda", None))
    assert len(plan.resident) == 57
    assert plan.streamed == ()
    assert plan.peak_bytes <= 23e9
    assert plan.parts["resident"] == pytest.approx(17.2e9, rel=0.005)
    assert plan.text == "first"  # the encoders and the transformer do not fit together


def test_12_gb_streams_and_8_gb_streams_float8():
    plan = make_plan(DEV, LARGE, Memory(limit_gb=12), Room("cuda", None))
    assert 20 <= len(plan.resident) < 57
    assert plan.peak_bytes <= 12e9
    assert plan.pinned_bytes == pytest.approx(1.36e9, rel=0.01)
    stored = make_plan(DEV_FP8, LARGE, Memory(limit_gb=8), Room("cuda", None))
    assert 20 <= len(stored.resident) < 57
    assert stored.peak_bytes <= 8e9
    assert stored.text == "layers"
    whole = make_plan(DEV_FP8, LARGE, Memory(limit_gb=14), Room("cuda", None))
    assert whole.streamed == ()
    assert whole.parts["resident"] == pytest.approx(8.6e9, rel=0.005)


def test_a_large_card_keeps_everything():
    plan = make_plan(DEV, LARGE, Memory(), Room("cuda", 79 * 10**9))
    assert not plan.streams
    assert plan.parts["transformer"] == pytest.approx(23.8e9, rel=0.002)
    assert not make_plan(DEV, LARGE, Memory("resident"), Room("cuda", 10**9)).streams


def test_streamed_without_a_limit_keeps_no_block():
    plan = make_plan(DEV, LARGE, Memory("streamed"), Room("cuda", 79 * 10**9))
    assert plan.resident == ()
    assert plan.step_bytes == sum(DEV.block_bytes(block, BF16) for block in range(57))


def test_6_gb_of_main_memory():
    work = Workload(batch=1, height=256, width=256, text=32, steps=1)
    plan = make_plan(DEV, work, Memory(limit_gb=6), Room("cpu", None, used=700 * 10**6))
    assert plan.resident == ()
    assert plan.text == "layers"
    assert plan.peak_bytes <= 2e9


def test_too_little_for_one_block():
    with pytest.raises(UserError, match=r"memory\.limit_gb=1\.5: one block at a time needs"):
        make_plan(DEV, LARGE, Memory(limit_gb=1.5), Room("cuda", None))


@settings(deadline=None, max_examples=60)
@given(
    limit=st.floats(4, 60),
    more=st.floats(0, 10),
    batch=st.integers(1, 4),
    side=st.sampled_from([256, 512, 1024]),
    stored=st.sampled_from([BF16, FP8]),
    device=st.sampled_from(["cuda", "mps", "cpu"]),
    batches=st.integers(1, 20),
)
def test_a_plan_stays_within_its_limit(limit, more, batch, side, stored, device, batches):
    sizes = DEV if stored == BF16 else DEV_FP8
    work = Workload(batch, side, side, 512, 28, probe_bytes=10**8, batches=batches)
    try:
        plan = make_plan(sizes, work, Memory(limit_gb=limit), Room(device, None))
    except UserError:
        assert limit < 6.5
        return
    assert plan.peak_bytes <= limit * 1e9
    assert 1 <= plan.together <= batches
    if plan.streams:
        assert sorted((*plan.resident, *plan.streamed)) == list(range(57))
        assert plan.parts["resident"] + plan.step_bytes == sum(sizes.block_bytes(b, stored) for b in range(57))
    larger = make_plan(sizes, work, Memory(limit_gb=limit + more), Room(device, None))
    if larger.decoder == plan.decoder:  # a decoder that moves to the device takes the place of blocks
        assert len(larger.resident) >= len(plan.resident)


@given(blocks=st.integers(1, 80), share=st.floats(0, 1))
def test_resident_blocks_are_scattered_evenly(blocks, share):
    count = round(share * blocks)
    chosen = spread(count, blocks)
    assert len(chosen) == len(set(chosen)) == count
    if count > 0:
        gaps = [b - a for a, b in zip((chosen[-1] - blocks, *chosen), chosen, strict=False)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("size", [1, 255, 256, 257])
def test_buffers_are_aligned(size):
    assert aligned(size) % 256 == 0
    assert 0 <= aligned(size) - size < 256


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("strem", "memory='strem': expected auto, resident or streamed; did you mean streamed"),
        ({"mode": "auto", "limit": 3}, "memory.limit: unknown key"),
        ({"limit_gb": 0}, "memory.limit_gb=0: expected a number of gigabytes above 0"),
        ({"limit_gb": True}, "memory.limit_gb=True"),
        ({"limit_gb": "a lot"}, "memory.limit_gb='a lot'"),
        ({"mode": "resident", "limit_gb": 12}, "has no effect with memory=resident"),
        (3, "memory=3"),
    ],
)
def test_wrong_requests(value, message):
    with pytest.raises(UserError) as error:
        Memory.from_config(value)
    assert message in str(error.value)


def test_requests():
    assert Memory.from_config(None) == Memory.from_config({"mode": "auto", "limit_gb": None}) == Memory()
    assert Memory.from_config("streamed") == Memory("streamed")
    assert Memory.from_config({"mode": "streamed", "limit_gb": 12}).limit_bytes == 12 * 10**9


def test_only_pages_of_files_are_let_go(tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.arange(100_000.0), "b": torch.ones(5)}, tmp_path / "x.safetensors")
    mapped, owned = load_file(tmp_path / "x.safetensors"), torch.arange(100_000.0)
    assert MappedPages([owned]).size == 0
    pages = MappedPages([*mapped.values(), owned])
    assert 400_000 <= pages.size <= 400_000 + 3 * 4096
    mapped["a"].sum()
    pages.let_go()
    assert torch.equal(mapped["a"], owned)
    assert torch.equal(owned, torch.arange(100_000.0))
