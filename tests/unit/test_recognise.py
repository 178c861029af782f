"""What a file is, from the names, shapes and dtypes of its tensors: FLUX.1's networks, and everything else."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxlab.checkpoints import (
    CheckpointError,
    find,
    load_autoencoder,
    load_text_encoders,
    load_transformer,
    save_autoencoder,
    save_transformer,
)
from fluxlab.checkpoints.files import open_tensors
from fluxlab.checkpoints.random import random_text_encoders
from fluxlab.checkpoints.recognise import recognise
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams

PARAMS = FluxParams(8, 8, 8, 8, 64, 4.0, 2, 1, 2, (4, 14, 14), 10000, True, True)
SIZES = AutoEncoderParams(32, 3, 32, 3, (1, 2), 1, 4, 0.3611, 0.1159)


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    return Flux(PARAMS).requires_grad_(False)


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(1)
    return AutoEncoder(SIZES).requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(2)
    return random_text_encoders(32, 24)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory, flux, autoencoder):
    """Both networks with Diffusers' names, as state dicts."""
    folder = tmp_path_factory.mktemp("diffusers")
    save_transformer(flux, folder / "transformer", layout="diffusers")
    save_autoencoder(autoencoder, folder / "vae", layout="diffusers")
    return {part: load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("transformer", "vae")}


def write(file, state, prefix=""):
    save_file({prefix + name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
    return file


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


# --- names and prefixes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.diffusion_model.",
        "diffusion_model.",
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "model.",
        "net.a.",
    ],
)
def test_a_prefix_does_not_matter(tmp_path, flux, autoencoder, diffusers, prefix):
    assert equal(load_transformer(write(tmp_path / "a.safetensors", flux.state_dict(), prefix)), flux)
    assert equal(load_transformer(write(tmp_path / "b.safetensors", diffusers["transformer"], prefix)), flux)
    assert equal(load_autoencoder(write(tmp_path / "c.safetensors", autoencoder.state_dict(), prefix)), autoencoder)
    loaded = load_autoencoder(write(tmp_path / "d.safetensors", diffusers["vae"], prefix))
    assert equal(loaded, autoencoder)


def test_wrappers_inside_a_name_do_not_matter(tmp_path, flux):
    names = {name: name.replace("_blocks.0.", "_blocks.0._orig_mod.") for name in flux.state_dict()}
    names |= {
        name: name.replace("_blocks.1.", "_blocks.1._checkpoint_wrapped_module.") for name in names if ".1." in name
    }
    state = {names[name]: tensor for name, tensor in flux.state_dict().items()}
    assert equal(load_transformer(write(tmp_path / "a.safetensors", state)), flux)


def test_sizes_of_a_single_file_with_diffusers_names(tmp_path, flux, autoencoder, diffusers):
    assert load_transformer(write(tmp_path / "a.safetensors", diffusers["transformer"])).params == flux.params
    params = load_autoencoder(write(tmp_path / "b.safetensors", diffusers["vae"])).params
    assert params == replace(SIZES, resolution=256)  # FLUX.1's: no tensor depends on it


def test_a_weight_file_in_a_diffusers_folder_uses_the_config_next_to_it(tmp_path, flux):
    save_transformer(flux, tmp_path / "transformer", layout="diffusers")
    assert equal(load_transformer(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"), flux)


def test_sft_is_a_name_of_safetensors(tmp_path, flux, autoencoder):
    save_transformer(flux, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "flux1-dev.SFT")
    save_autoencoder(autoencoder, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "ae.sft")
    assert equal(load_transformer(tmp_path / "flux1-dev.SFT"), flux)
    assert find(tmp_path).parts == {"transformer", "autoencoder"}
    assert equal(load_autoencoder(tmp_path), autoencoder)


# --- several networks in one file -----------------------------------------------------------------


def all_in_one(flux, autoencoder, text, **more):
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in flux.state_dict().items()}
    state |= {f"vae.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    state |= {f"text_encoders.clip_l.transformer.{name}": t for name, t in clip_state(text).items()}
    state |= {f"text_encoders.t5xxl.transformer.{name}": t for name, t in t5_state(text).items()}
    return state | more


def clip_state(text):
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.clip.state_dict().items()}


def t5_state(text):
    return {name: t for name, t in text.t5.state_dict().items() if name != "encoder.embed_tokens.weight"}


def test_an_all_in_one_file_serves_every_loader(tmp_path, flux, autoencoder, text):
    file = write(tmp_path / "one.safetensors", all_in_one(flux, autoencoder, text))
    assert find(file).kind == "transformer"
    assert find(file).parts == {"transformer", "autoencoder", "clip", "t5"}
    assert equal(load_transformer(file), flux)
    assert equal(load_autoencoder(file), autoencoder)
    _, clip, _, t5 = load_text_encoders(file)
    assert equal(clip, text.clip)
    assert equal(t5, text.t5)


def test_what_inference_does_not_use_is_skipped(tmp_path, flux, autoencoder, text):
    clip, t5 = "text_encoders.clip_l.", "text_encoders.t5xxl."
    unused = {
        f"{clip}logit_scale": torch.zeros(()),
        f"{clip}transformer.text_projection.weight": torch.zeros(2, 2),
        f"{clip}transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{clip}transformer.vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2),
        f"{clip}transformer.visual_projection.weight": torch.zeros(2, 2),
        f"{t5}logit_scale": torch.zeros(()),
        f"{t5}transformer.encoder.embed_tokens.weight": text.t5.shared.weight,
        f"{t5}transformer.lm_head.weight": torch.zeros(2, 2),
        f"{t5}transformer.decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2),
        f"{t5}transformer.decoder.final_layer_norm.weight": torch.zeros(2),
        f"{t5}transformer.spiece_model": torch.zeros(5, dtype=torch.uint8),
    }
    file = write(tmp_path / "one.safetensors", all_in_one(flux, autoencoder, text, **unused))
    assert recognise(open_tensors([file])[0], file).unknown == ()
    assert equal(load_transformer(file), flux)
    _, clip, _, t5 = load_text_encoders(file)
    assert equal(clip, text.clip)
    assert equal(t5, text.t5)


@pytest.mark.parametrize("name", ["extra.weight", "model.diffusion_model.double_blocks.0.extra.weight", "vae.extra"])
def test_everything_else_is_fatal(tmp_path, flux, autoencoder, text, name):
    state = all_in_one(flux, autoencoder, text, **{name: torch.zeros(2)})
    message = complaint(load_transformer, write(tmp_path / "one.safetensors", state))
    assert "1 unexpected (" in message
    assert name.removeprefix("model.diffusion_model.") in message
    assert "download it again" not in message


def test_position_ids_belong_to_a_text_encoder(tmp_path, flux):
    state = {**flux.state_dict(), "position_ids": torch.arange(77)[None]}
    assert "1 tensors of I64" in complaint(load_transformer, write(tmp_path / "a.safetensors", state))


def test_two_copies_of_a_network_are_refused(tmp_path, flux):
    state = {f"{prefix}{name}": t for prefix in ("", "ema.") for name, t in flux.state_dict().items()}
    message = complaint(load_transformer, write(tmp_path / "a.safetensors", state))
    assert "holds 2 of FLUX.1's transformer: ema. (bfl), no prefix (bfl)" in message


# --- what is not FLUX.1 ---------------------------------------------------------------------------

FOREIGN = {
    "Chroma": ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "img_in.weight"],
    "a ControlNet": ["double_blocks.0.img_attn.qkv.weight", "controlnet_blocks.0.weight"],
    "Redux": ["redux_up.weight", "redux_down.weight"],
    "a LoRA": ["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"],
    "a LoRA, not": ["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"],
    "a LoRA, not a": ["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"],
    "IP-Adapter": ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"],
    "scaled float8": ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.scale_weight"],
    "scaled float8:": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "scaled_fp8"],
    "nf4": ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"],
    "SVDQuant": ["transformer_blocks.0.mlp_fc1.qweight", "transformer_blocks.0.mlp_fc1.wscales"],
    "Stable Diffusion U-Net": ["model.diffusion_model.input_blocks.0.0.weight"],
    "Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "HunyuanVideo": ["double_blocks.0.img_attn_qkv.weight", "txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight"],
    "Wan": ["blocks.0.self_attn.q.weight", "patch_embedding.weight"],
    "quant_conv": ["encoder.down.0.block.0.conv1.weight", "quant_conv.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight"],
    "OpenCLIP": ["transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"],
    "UMT5": [f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in (0, 1)],
    "an image encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_flux1_is_named_in_one_line(tmp_path, what):
    file = write(tmp_path / "a.safetensors", {name: torch.zeros(2, 2) for name in FOREIGN[what]})
    for call in (find, load_transformer, load_autoencoder, load_text_encoders):
        message = complaint(call, file)
        assert message.startswith(f"{file}: ")
        assert what in message
        assert len(message.splitlines()) == 1
        assert "incomplete" not in message
        assert "again" not in message


def test_names_of_flux1_itself_are_not_foreign(tmp_path, flux, autoencoder, text, diffusers):
    states = [flux.state_dict(), autoencoder.state_dict(), *diffusers.values(), clip_state(text), t5_state(text)]
    for i, state in enumerate(states):
        file = write(tmp_path / f"{i}.safetensors", state)
        assert recognise(open_tensors([file])[0], file).unknown == ()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_integers_are_quantised(tmp_path, flux, dtype):
    state = {**flux.state_dict(), "img_in.weight": torch.zeros(64, 8).to(dtype)}
    message = complaint(load_transformer, write(tmp_path / "a.safetensors", state))
    assert "quantised weights" in message
    assert "img_in.weight" in message


def test_foreign_files_next_to_the_right_one_do_not_matter(tmp_path, flux):
    save_transformer(flux, tmp_path / "flux1-dev.safetensors")
    write(tmp_path / "lora.safetensors", {"lora_down.weight": torch.zeros(3)})
    assert equal(load_transformer(tmp_path), flux)
    (tmp_path / "flux1-dev.safetensors").unlink()
    assert "a LoRA" in complaint(load_transformer, tmp_path)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_is_read_exactly(tmp_path, flux, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in flux.state_dict().items()}
    file = write(tmp_path / "a.safetensors", stored)
    for asked, got in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)):
        loaded = load_transformer(file, dtype=asked).state_dict()
        assert {tensor.dtype for tensor in loaded.values()} == {got}
        assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("wide", "expected"),
    [
        (lambda name: "norm" in name or name.endswith("bias"), torch.bfloat16),
        (lambda name: "_blocks" in name, torch.float32),
    ],
)
def test_mixed_dtypes_are_loaded_in_that_of_most_parameters(tmp_path, flux, wide, expected):
    state = {name: t if wide(name) else t.bfloat16() for name, t in flux.state_dict().items()}
    loaded = load_transformer(write(tmp_path / "a.safetensors", state)).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {expected}


def test_float8_with_a_few_wide_tensors_is_loaded_as_bfloat16(tmp_path, flux):
    state = {n: t if n.endswith("bias") else t.to(torch.float8_e4m3fn) for n, t in flux.state_dict().items()}
    loaded = load_transformer(write(tmp_path / "a.safetensors", state)).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}


def test_the_default_dtype_does_not_matter(tmp_path, flux, text, autoencoder):
    file = write(tmp_path / "one.safetensors", all_in_one(flux, autoencoder, text))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert equal(load_transformer(file), flux)
        assert equal(load_autoencoder(file), autoencoder)
        _, clip, _, t5 = load_text_encoders(file)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(clip, text.clip)
    assert equal(t5, text.t5)


def test_float64_on_mps_is_refused_before_the_device_is_asked(tmp_path, flux, monkeypatch):
    monkeypatch.setattr("fluxlab.checkpoints.read.check_device", torch.device)
    file = write(tmp_path / "a.safetensors", {name: t.double() for name, t in flux.state_dict().items()})
    message = complaint(load_transformer, file, device="mps", check_memory=False)
    assert "float64 weights, which device mps does not have; pass dtype=torch.float32" in message


# --- values that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_cast_that_makes_a_weight_infinite_is_refused(tmp_path, flux, diffusers, layout):
    state = dict(flux.state_dict() if layout == "bfl" else diffusers["transformer"])
    name = "single_blocks.1.linear1.weight" if layout == "bfl" else "single_transformer_blocks.1.attn.to_k.weight"
    state[name] = state[name].clone()
    state[name][3, 5] = -70000.0
    file = write(tmp_path / "a.safetensors", state)
    message = complaint(load_transformer, file, dtype=torch.float16)
    assert f"{file}: tensor {name} holds -70000, which becomes infinite in float16 (at most 65504)" in message
    assert "dtype=bfloat16 or float32" in message
    assert load_transformer(file, dtype=torch.bfloat16).img_in.weight.dtype == torch.bfloat16


def test_the_largest_float16_is_not_refused(tmp_path, flux):
    state = dict(flux.state_dict())
    state["img_in.bias"] = torch.full_like(state["img_in.bias"], 65519.0)  # rounds to 65504
    loaded = load_transformer(write(tmp_path / "a.safetensors", state), dtype=torch.float16)
    assert loaded.img_in.bias.max() == 65504


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, autoencoder, dtype, value):
    state = dict(autoencoder.state_dict())
    state["decoder.conv_out.bias"] = torch.tensor([0.0, value, value])
    file = write(tmp_path / "ae.safetensors", state)
    message = complaint(load_autoencoder, file, dtype=dtype)
    assert f"tensor decoder.conv_out.bias holds 2 values that are not finite (the first is {value})" in message


def test_text_encoders_are_checked_too(tmp_path, flux, autoencoder, text):
    name = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    state = all_in_one(flux, autoencoder, text)
    state[name] = state[name] + torch.tensor(1e5)
    file = write(tmp_path / "one.safetensors", state)
    assert "becomes infinite in float16" in complaint(load_text_encoders, file, dtype=torch.float16)
    state[name][0, 0] = float("nan")
    assert f"tensor {name} holds 1 values that are not finite" in complaint(
        load_text_encoders, write(tmp_path / "two.safetensors", state)
    )


def test_unread_weights_are_not_checked(tmp_path, flux):
    state = {**flux.state_dict(), "img_in.bias": torch.full((64,), float("nan"))}
    file = write(tmp_path / "a.safetensors", state)
    assert load_transformer(file, check_memory=False).img_in.bias.isnan().all()
    assert "not finite" in complaint(load_transformer, file, dtype=torch.bfloat16, check_memory=False)


# --- variants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ],
)
def test_every_name_of_a_variant_s_index(tmp_path, flux, autoencoder, index):
    folder = tmp_path / "transformer"
    save_transformer(flux, folder, layout="diffusers", max_shard_size=100_000)
    plain = folder / "diffusion_pytorch_model.safetensors.index.json"
    weights = json.loads(plain.read_text())
    plain.unlink()
    for shard in folder.glob("*.safetensors"):
        shard.rename(shard.with_name(shard.name.replace("model-", "model.fp16-")))
    renamed = {name: file.replace("model-", "model.fp16-") for name, file in weights["weight_map"].items()}
    (folder / index).write_text(json.dumps({**weights, "weight_map": renamed}))
    save_autoencoder(autoencoder, tmp_path / "vae", layout="diffusers")
    assert equal(load_transformer(tmp_path, variant="fp16"), flux)
    assert equal(load_autoencoder(tmp_path, variant="fp16"), autoencoder)  # has plain files only
    assert "Pass variant='fp16'" in complaint(load_transformer, tmp_path)
    assert "Pass variant='fp16'" in complaint(load_transformer, tmp_path, variant="fp32")
