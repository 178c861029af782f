"""LoRAs: what is merged, what stays mapped, what is refused, and how a LoRA changes a model's fingerprint."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fluxlab
from fluxlab import checkpoints
from fluxlab.checkpoints import merge
from fluxlab.checkpoints.identity import fingerprint
from fluxlab.config import find_row, read_loras
from fluxlab.errors import UserError
from fluxlab.files import sha256_of

LAYER = "double_blocks.0.img_attn.qkv"
TINY = Path(fluxlab.__file__).parent / "assets/tiny"


def load():
    return checkpoints.load_transformer(TINY)


@cache
def shapes():
    return {name: weight.shape for name, weight in load().named_parameters()}


def tensors(layer=LAYER, rank=4, seed=0, dtype=torch.float32):
    rows, cols = shapes()[f"{layer}.weight"]
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(size, generator=generator).mul(0.1).to(dtype) for size in ((rank, cols), (rows, rank)))
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def product(parts, layer=LAYER):
    return parts[f"{layer}.lora_B.weight"].float() @ parts[f"{layer}.lora_A.weight"].float()


@pytest.fixture
def file(tmp_path):
    save_file(tensors(), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_nothing_else_is_touched(file):
    model, weights = load(), TINY / "transformer/diffusion_pytorch_model.safetensors"
    before = {name: (w.data_ptr(), w.clone()) for name, w in model.named_parameters()}
    on_disk = sha256_of(weights)
    merge.merge_loras(model, read_loras(file))
    after = dict(model.named_parameters())
    assert [name for name, w in after.items() if w.data_ptr() != before[name][0]] == [f"{LAYER}.weight"]
    assert all(torch.equal(after[name], kept) == (name != f"{LAYER}.weight") for name, (_, kept) in before.items())
    assert sha256_of(weights) == on_disk


def test_rounded_once(tmp_path):
    """In bf16 the sum of two LoRAs is rounded once. Rounding after each of them gives other weights."""
    first, second = tensors(seed=1), tensors(seed=2, dtype=torch.bfloat16)
    for name, parts in (("a", first), ("b", second)):
        save_file(parts, tmp_path / f"{name}.safetensors")
    model = load()
    weight = model.double_blocks[0].img_attn.qkv.weight.detach().clone()
    assert weight.dtype == torch.bfloat16
    merge.merge_loras(model, read_loras([tmp_path / "a.safetensors", {"path": tmp_path / "b.safetensors", "scale": 2}]))
    merged = model.double_blocks[0].img_attn.qkv.weight
    once = (weight.float() + product(first) + 2 * product(second)).bfloat16()
    twice = ((weight.float() + product(first)).bfloat16().float() + 2 * product(second)).bfloat16()
    assert merged.dtype == torch.bfloat16
    assert (merged != once).float().mean() < 0.001  # another order of the fp32 sum may round one of them otherwise
    assert (merged != twice).float().mean() > 0.05


def test_scratch_file(file, monkeypatch):
    """Large results lie on the pages of a file; they are the same."""
    in_memory, on_disk = load(), load()
    merge.merge_loras(in_memory, read_loras(file))
    monkeypatch.setattr(merge, "JOIN_IN_MEMORY", 0)
    merge.merge_loras(on_disk, read_loras(file))
    for name, weight in in_memory.named_parameters():
        assert torch.equal(weight, dict(on_disk.named_parameters())[name])


def test_whole_differences_and_biases(tmp_path):
    """`diff` and `diff_b`, as ComfyUI writes them, are added times the scale."""
    model, plain = load(), load()
    weight, bias = plain.img_in.weight.float(), plain.img_in.bias.float()
    parts = {"diffusion_model.img_in.diff": torch.randn_like(weight), "diffusion_model.img_in.diff_b": bias + 1}
    save_file(parts, tmp_path / "x.safetensors")
    merge.merge_loras(model, read_loras({"path": tmp_path / "x.safetensors", "scale": -0.5}))
    assert torch.equal(model.img_in.weight, (weight - 0.5 * parts["diffusion_model.img_in.diff"]).bfloat16())
    assert torch.equal(model.img_in.bias, (bias - 0.5 * (bias + 1)).bfloat16())


def test_pipeline_and_text_encoders(file, tmp_path):
    parts = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8), **tensors()}
    save_file(parts, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match=r"1 of 3 tensors are for the text encoders.*text_encoders: ignore"):
        fluxlab.load_pipeline("tiny", lora=tmp_path / "both.safetensors")
    pipe = fluxlab.load_pipeline("tiny", lora={"path": tmp_path / "both.safetensors", "text_encoders": "ignore"})
    other = fluxlab.load_pipeline("tiny", lora=str(file))
    options = {"steps": 1, "output": "latent"}
    latents = [p.generate("a red fox", **options) for p in (pipe, other, fluxlab.load_pipeline("tiny"))]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


def test_for_one_call(file, tmp_path):
    """`generate(lora=…)` gives the images of `load_pipeline(lora=…)`, and leaves the weights as they were."""
    pipe, options = fluxlab.load_pipeline("tiny"), {"steps": 1, "output": "latent"}
    before = {name: (w.data_ptr(), w.clone()) for name, w in pipe.transformer.named_parameters()}
    loras = [{"path": file, "scale": 0.5}, str(file)]
    merged, plain = (pipe.generate("a red fox", lora=lora, **options) for lora in (loras, None))
    loaded = fluxlab.load_pipeline("tiny", lora=loras).generate("a red fox", **options)
    assert torch.equal(merged, loaded)
    assert not torch.equal(merged, plain)
    with pytest.raises(UserError, match="steps=0"):
        pipe.generate("a red fox", lora=file, steps=0)
    save_file({f"{LAYER}.lora_A.weight": torch.ones(4, 8)}, tmp_path / "half.safetensors")
    for wrong, message in ((tmp_path / "half.safetensors", "one matrix of a pair is missing"), (3, "lora=3: expected")):
        with pytest.raises(UserError, match=message):
            pipe.generate("a red fox", lora=wrong, **options)
    for name, weight in pipe.transformer.named_parameters():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])


def test_a_streamed_model_is_not_merged_for_one_call(file):
    model = load()
    model.double_blocks[1].to("meta")
    with (
        pytest.raises(UserError, match=r"not on cpu; merge it when the model is loaded: load_pipeline\(lora=…\)"),
        checkpoints.merged(model, read_loras(file)),
    ):
        pass


def changed(**parts):
    """Return the LoRA with tensors replaced by their names' last part, or added; None leaves one out."""
    base = tensors()
    for key, value in parts.items():
        name = key if "." in key else next(k for k in base if key in k)
        base[name] = value
    return {name: value for name, value in base.items() if value is not None}


REFUSED = {
    "wrong width": (
        changed(lora_A=torch.zeros(4, 8)),
        rf"1 tensors do not fit.*{LAYER}.lora_A.weight \(4, 8\) instead",
    ),
    "wrong rows": (changed(lora_B=torch.zeros(8, 4)), rf"{LAYER}.lora_B.weight \(8, 4\) instead of \(\d+, 4\)"),
    "other rank": (changed(lora_A=torch.zeros(2, 32)), "do not fit"),
    "half": (changed(lora_A=None), "one matrix of a pair is missing"),
    "alpha only": ({f"{LAYER}.alpha": torch.ones(())}, "one matrix of a pair is missing"),
    "no matrix": (changed(lora_A=torch.zeros(())), "no matrix"),
    "another model": (changed(**{"layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 8)}), "belong to no layer"),
    "more blocks": (changed(**{"double_blocks.99.img_mlp.0.lora_A.weight": torch.zeros(4, 8)}), "trained for another"),
    "dora": (changed(**{f"{LAYER}.dora_scale": torch.ones(3)}), "a DoRA"),
    "lokr": ({"lycoris_x.lokr_w1": torch.ones(3, 3)}, "a LoKr"),
    "loha": ({"lora_unet_img_in.hada_w1_a": torch.ones(3, 3)}, "a LoHa"),
    "middle": (changed(**{f"{LAYER}.lora_mid.weight": torch.ones(4, 4)}), "middle matrix"),
    "integers": (changed(lora_A=torch.zeros(4, 8, dtype=torch.int8)), "1 tensors of I8, expected floating point"),
    "nan": (changed(lora_A=torch.full_like(tensors()[f"{LAYER}.lora_A.weight"], torch.nan)), "not finite"),
    "two alphas": (changed(**{f"{LAYER}.alpha": torch.ones(2)}), "alpha of .* is nan"),
    "twice": ({**tensors(), **{f"diffusion_model.{k}": v for k, v in tensors(seed=1).items()}}, "twice, by"),
    "text only": ({"lora_te1_x.lora_up.weight": torch.ones(2, 2)}, "for the text encoders"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    parts, message = REFUSED[case]
    save_file(parts, tmp_path / "bad.safetensors")
    model = load()
    before = {name: w.data_ptr() for name, w in model.named_parameters()}
    with pytest.raises(checkpoints.CheckpointError, match=message) as error:
        merge.merge_loras(model, read_loras(tmp_path / "bad.safetensors"))
    assert "\n" not in str(error.value)
    assert "bad.safetensors" in str(error.value)
    assert before == {name: w.data_ptr() for name, w in model.named_parameters()}


def test_refused_paths(tmp_path, file):
    for path, message in (
        (tmp_path / "nothing.safetensors", "no such path"),
        (tmp_path / "a.ckpt", "no such path"),
        ("owner/name", "name the file of this hub id"),
    ):
        with pytest.raises(UserError, match=message):
            merge.check_loras(load(), read_loras(path))
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        merge.check_loras(load(), read_loras(tmp_path / "x.pt"))
    merge.check_loras(load(), read_loras(tmp_path))  # the only file of a folder
    save_file(tensors(), tmp_path / "second.safetensors")
    with pytest.raises(UserError, match=r"holds lora.safetensors, second.safetensors; pass lora="):
        merge.check_loras(load(), read_loras(tmp_path))
    with pytest.raises(UserError, match=r"a LoRA, not a whole model; .* as lora"):
        fluxlab.load_pipeline(file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "lora=3: expected a list such as"),
        ([{"pth": "x"}], r"lora\[0\]: unknown key 'pth', expected path, scale, text_encoders; did you mean path?"),
        ({"scale": 1}, "lora.path=None"),
        ([{"path": "x", "scale": "a"}], r"lora\[0\].scale='a': expected a finite number"),
        ({"path": "x", "scale": float("inf")}, "finite"),
        ({"path": "x", "scale": True}, "finite"),
        ({"path": "x", "text_encoders": "merge"}, "expected error or ignore"),
    ],
)
def test_refused_keys(value, message):
    with pytest.raises(UserError, match=re.escape(message) if "[" not in message else message):
        read_loras(value)


def test_models_with_loras_are_told_apart(tmp_path, file):
    row = find_row("tiny")

    def with_lora(*values, **options):
        return fingerprint(replace(row, lora=read_loras([{"path": value, **options} for value in values])))

    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved/renamed.safetensors"
    moved.write_bytes(file.read_bytes())
    other = tmp_path / "other.safetensors"
    save_file(tensors(seed=5), other)
    digests = [fingerprint(row), with_lora(file), with_lora(file, scale=0.5), with_lora(other), with_lora(file, other)]
    assert len(set(digests)) == len(digests)
    assert with_lora(moved) == with_lora(file) == with_lora(file, text_encoders="ignore")
    assert fingerprint(replace(row, lora=None)) == fingerprint(row)

    def experiment(lora):
        return fluxlab.make_experiment("a red fox", lora=lora)

    assert experiment(file).digest == experiment(moved).digest != experiment(None).digest
    assert experiment(file).request()["model"]["lora"] == [{"path": str(file), "scale": 1.0, "text_encoders": "error"}]
    assert "lora" not in experiment(None).request()["model"]
