"""A pipeline whose blocks are streamed computes what one that is in memory computes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fluxlab
from fluxlab import gradients
from fluxlab.checkpoints import save_transformer
from fluxlab.checkpoints.stored import stored
from fluxlab.errors import UserError
from fluxlab.experiment.spec import Experiment
from fluxlab.memory.costs import gb
from fluxlab.positions import Program
from fluxlab.probes import Probe

PROMPTS = ["a red fox on the left", "a blue cat holding a sign that says hello"]
OPTIONS = {"seeds": [0, 1], "steps": 2, "output": "latent"}


@pytest.fixture(scope="module")
def whole():
    return fluxlab.load_pipeline("tiny", device="cpu", memory="resident")


@pytest.fixture(scope="module")
def streamed():
    pipe = fluxlab.load_pipeline("tiny", device="cpu", memory="streamed")
    assert pipe.streaming is not None
    return pipe


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"true_cfg": 3.0},
        {"timestep_rounding": "bfl", "programs": {"a": {"op": "scale", "factor": 0.5, "axes": ["row"]}}},
        {"height": 64, "width": 128},
        {"references": [[np.zeros((64, 64, 3), np.uint8)]]},
        {"output": "pt"},
    ],
)
def test_equal_bits(whole, streamed, more):
    expected = whole.generate(PROMPTS, **{**OPTIONS, **more})
    for _ in range(2):
        assert torch.equal(streamed.generate(PROMPTS, **{**OPTIONS, **more}), expected)


def test_probes_and_inversion(whole, streamed):
    probes = [Probe("words"), Probe("words")]
    images = [
        pipe.generate(PROMPTS, seeds=1, steps=2, output="pt", probe=probe)
        for pipe, probe in zip((whole, streamed), probes, strict=True)
    ]
    assert torch.equal(*images)
    first, second = (probe.arrays for probe in probes)
    assert first.keys() == second.keys() != set()
    for name, captured in first.items():
        assert np.array_equal(captured.values, second[name].values, equal_nan=True)
    noise = [pipe.invert(images[0], PROMPTS, steps=2, iterations=2) for pipe in (whole, streamed)]
    assert torch.equal(*noise)


def test_a_streamed_model_stays_where_it_is(streamed, tmp_path):
    assert streamed.to("cpu") is streamed
    with pytest.raises(UserError, match="load the model with memory='resident'"):
        streamed.save(tmp_path / "copy")


def test_what_fits_is_not_streamed():
    assert fluxlab.load_pipeline("tiny", device="cpu").streaming is None
    assert fluxlab.load_pipeline("tiny", device="cpu", memory={"limit_gb": 60}).streaming is None
    with pytest.raises(UserError, match=r"memory\.limit_gb=0.01: one block at a time needs"):
        fluxlab.load_pipeline("tiny", device="cpu", memory={"limit_gb": 0.01})
    with pytest.raises(UserError, match="memory='strem'"):
        fluxlab.load_pipeline("tiny", device="cpu", memory="strem")


def test_float8_files_are_kept_as_they_are(whole, tmp_path):
    save_transformer(whole.transformer, tmp_path / "bf16.safetensors")
    weights = load_file(tmp_path / "bf16.safetensors")
    save_file({name: w.to(torch.float8_e4m3fn) for name, w in weights.items()}, tmp_path / "fp8.safetensors")
    tiny = fluxlab.config.find_row("tiny").path
    parts = {"autoencoder": tiny, "text": tiny, "tokenizers": tiny, "like": "schnell", "device": "cpu"}
    kept = fluxlab.load_pipeline(tmp_path / "fp8.safetensors", **parts)
    cast = fluxlab.load_pipeline(tmp_path / "fp8.safetensors", **parts, memory="resident")
    sizes = kept.streaming.sizes
    assert (sizes.stored, sizes.dtype, kept.dtype) == (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16)
    bf16 = sum(sizes.block_bytes(block, torch.bfloat16) for block in range(sizes.blocks))
    assert sum(sizes.stored_blocks) == pytest.approx(bf16 / 2, rel=0.01)
    options = {**OPTIONS, "max_sequence_length": 24, "height": 64, "width": 64}
    assert torch.equal(kept.generate(PROMPTS, **options), cast.generate(PROMPTS, **options))


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_loras_are_added_to_streamed_blocks(whole, tmp_path, layout):
    """Rank 2, on a layer of every kind. One of two layouts is mapped from its file, the other is copied."""
    p = whole.transformer.params
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.2 * torch.randn(shape, generator=g)  # noqa: E731
    d, lora = p.hidden_size, {}
    for module, out in (
        ("double_blocks.0.img_attn.qkv", 3 * d),
        ("double_blocks.1.img_mod.lin", 6 * d),
        ("single_blocks.1.linear1", 7 * d),
        ("single_blocks.2.modulation.lin", 3 * d),
        ("txt_in", d),
    ):
        width = p.context_in_dim if module == "txt_in" else d
        lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"] = draw(2, width), draw(out, 2)
    save_file(lora, tmp_path / "lora.safetensors")
    row = fluxlab.config.find_row("tiny").path
    if layout == "bfl":
        save_transformer(whole.transformer, tmp_path / "one.safetensors")
        row = tmp_path / "one.safetensors"
    tiny = fluxlab.config.find_row("tiny").path
    parts = {"autoencoder": tiny, "text": tiny, "tokenizers": tiny, "like": "schnell", "device": "cpu"}
    options = {**OPTIONS, "max_sequence_length": 24, "height": 64, "width": 64}
    results = []
    for memory in ("resident", "streamed"):
        pipe = fluxlab.load_pipeline(row, **parts, lora=tmp_path / "lora.safetensors", memory=memory)
        assert (pipe.streaming is None) == (memory == "resident")
        results.append(pipe.generate(PROMPTS, **options))
        if pipe.streaming:
            assert pipe.streaming.residency.mapped == (layout == "bfl")
            pipe.generate(PROMPTS, **options)
    assert torch.equal(*results)
    assert not torch.equal(results[0], whole.generate(PROMPTS, **options))


def experiment() -> Experiment:
    half = {"half": {"a": {"op": "scale", "factor": 0.5}}}
    sampling = fluxlab.Sampling(steps=2, device="cpu")
    return fluxlab.make_experiment(PROMPTS, half, seeds=1, sampling=sampling, capture="words", cache="none")


def test_a_plan_is_printed_once_while_the_memory_in_use_changes(tmp_path, capsys, monkeypatch):
    used = iter(range(1 << 30, 1 << 40, 1 << 30))
    monkeypatch.setattr("fluxlab.placement.resident_bytes", lambda: next(used))
    fluxlab.run_experiment(experiment(), tmp_path / "run", memory="resident", batch_tokens=300, cache="none")
    assert next(used) > 2 << 30
    assert capsys.readouterr().out.count("memory: ") == 1


def test_a_run_is_the_same_run(tmp_path, capsys):
    asked = experiment()
    options = {"batch_tokens": 300, "cache": "none"}
    fluxlab.run_experiment(asked, tmp_path / "whole", memory="resident", **options)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert line.startswith("memory: resident, ")
    parts = [part for name, part in stored(asked.model).items() if name not in ("clip", "t5")]
    weights = sum(part.bytes_as(torch.float32) for part in parts)
    assert f"weights {gb(weights)}, text first, a batch " in line
    fluxlab.run_experiment(asked, tmp_path / "streamed", memory="streamed", **options)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert "all 6 blocks streamed" in line
    assert "batches at a time" in line
    names = sorted(f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole" / "cells").rglob("*") if f.is_file())
    assert len(names) >= 2 * 4
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name


def test_the_plan_of_a_run(tmp_path):
    from fluxlab.experiment.plan import plan

    asked = experiment()
    (line,) = [line for line in plan(asked, tmp_path, memory="streamed").splitlines() if line.startswith("memory ")]
    assert "streamed, " in line
    assert "all 6 blocks streamed" in line
    assert "memory     resident, " in plan(asked, tmp_path)


def velocity_and_gradient(pipe) -> list[torch.Tensor]:
    prepared = gradients.prepare(pipe, PROMPTS[:1], [0], fluxlab.Sampling(steps=2, height=64, width=64))
    step = gradients.stepping(prepared, gradients.compiled(prepared, Program.from_config({})))
    with gradients.checkpointed(pipe):
        x = prepared.noise.clone().requires_grad_(True)
        v = step(0, x)
        v.square().sum().backward()
    return [v.detach(), x.grad]


def test_gradients_through_mapped_blocks(whole, tmp_path):
    """Blocks are computed again in the backward pass, when their pages were let go."""
    save_transformer(whole.transformer, tmp_path / "one.safetensors")
    tiny = fluxlab.config.find_row("tiny").path
    parts = {"autoencoder": tiny, "text": tiny, "tokenizers": tiny, "like": "schnell", "device": "cpu"}
    pipes = [fluxlab.load_pipeline(tmp_path / "one.safetensors", **parts, memory=m) for m in ("resident", "streamed")]
    assert pipes[1].streaming.residency.mapped
    results = [velocity_and_gradient(pipe) for pipe in pipes]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0


def test_what_needs_all_weights_is_refused(streamed):
    assert not streamed.streaming.residency.mapped
    with pytest.raises(UserError, match="load the model with memory='resident'"):
        gradients.prepare(streamed, PROMPTS[:1], [0])
    with pytest.raises(UserError, match="merge it when the model is loaded"):
        streamed.generate(PROMPTS, **OPTIONS, lora="lora.safetensors")


def test_injected_activations(whole, streamed):
    programs = [{}, {"a": {"op": "inject", "source": 0, "what": "residual", "blocks": [2]}}]
    results = [pipe.generate(PROMPTS, programs=programs, **OPTIONS) for pipe in (whole, streamed)]
    assert torch.equal(*results)
