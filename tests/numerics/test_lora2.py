"""LoRAs of FLUX.2 in every naming, merged by us and by Diffusers' own loading and fusing, on a tiny random model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import fluxlab
from fluxlab import checkpoints
from fluxlab.errors import UserError
from tests import families
from tests.numerics.test_lora import KOHYA, PEFT, SCALE, made, pairs

D, MLP = 64, 192  # widths of the tiny model
BLOCKS = {
    **{f"double_blocks.{i}.{stream}_{name}": size
       for i in range(2) for stream in ("img", "txt") for name, size in {
           "attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.0": (2 * MLP, D), "mlp.2": (D, MLP)}.items()},
    **{f"single_blocks.{i}.{name}": size
       for i in range(3) for name, size in {"linear1": (3 * D + 2 * MLP, D), "linear2": (D, D + MLP)}.items()},
}  # fmt: skip
OUTER = {
    "img_in": (D, 16),
    "txt_in": (D, 48),
    "time_in.in_layer": (D, 256),
    "time_in.out_layer": (D, D),
    "final_layer.linear": (16, D),
    "single_stream_modulation.lin": (3 * D, D),
    "double_stream_modulation_img.lin": (6 * D, D),
    "double_stream_modulation_txt.lin": (6 * D, D),
}
DIFFUSERS = {
    **{f"transformer_blocks.{i}.attn.{x}": (D, D) for i in range(2) for x in ("to_q", "to_v", "add_k_proj")},
    **{f"transformer_blocks.{i}.{x}.linear_in": (2 * MLP, D) for i in range(2) for x in ("ff", "ff_context")},
    "transformer_blocks.1.ff.linear_out": (D, MLP),
    "transformer_blocks.1.attn.to_out.0": (D, D),
    "transformer_blocks.0.attn.to_add_out": (D, D),
    "single_transformer_blocks.2.attn.to_qkv_mlp_proj": (3 * D + 2 * MLP, D),
    "single_transformer_blocks.0.attn.to_out": (D, D + MLP),
    "single_stream_modulation.linear": (3 * D, D),
    "norm_out.linear": (2 * D, D),
    "proj_out": (16, D),
    "x_embedder": (D, 16),
}
CUT_OFF = {name.removeprefix("tran"): size for name, size in DIFFUSERS.items() if name.startswith("transformer_blocks")}
NAMINGS = {
    "diffusers": lambda: pairs(DIFFUSERS, *PEFT, prefix="transformer.", rank=(4, 2, 8)),
    "diffusers in comfyui": lambda: pairs(
        {name: size for name, size in DIFFUSERS.items() if "_blocks." in name}, *PEFT, prefix="diffusion_model."
    ),
    "cut off": lambda: pairs(CUT_OFF, *PEFT, prefix="diffusion_model."),
    "bfl": lambda: pairs({**BLOCKS, **OUTER}, *PEFT, prefix="diffusion_model.", rank=(4, 2)),
    "kohya": lambda: pairs(BLOCKS, *KOHYA, prefix="lora_unet_", flat=True, alpha=(2, 4, 1), rank=(4, 2)),
}
OPTIONS = {"height": 16, "width": 24, "steps": 1, "max_sequence_length": 16, "output": "latent"}


@pytest.fixture(scope="module")
def plain():
    import diffusers

    return diffusers.Flux2KleinPipeline.from_pretrained(families.folder("flux2"))


@pytest.mark.parametrize("naming", NAMINGS)
def test_naming(naming, plain, tmp_path):
    import copy

    file = tmp_path / "lora.safetensors"
    save_file(NAMINGS[naming](), file)
    ours = families.load("flux2", lora={"path": file, "scale": SCALE})
    kept = plain.transformer
    plain.transformer = copy.deepcopy(kept)
    try:
        plain.load_lora_weights(str(file), adapter_name="a")
        plain.fuse_lora(lora_scale=SCALE, adapter_names=["a"])
        plain.unload_lora_weights()
        theirs = plain.transformer.state_dict()
    finally:
        plain.transformer = kept
    checkpoints.save_transformer(ours.transformer, tmp_path / "saved", layout="diffusers")
    saved = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    assert saved.keys() == theirs.keys()
    assert max(float((saved[name] - theirs[name]).abs().max()) for name in theirs) < 2e-6
    changed = sum(not torch.equal(saved[name], weight) for name, weight in kept.state_dict().items())
    assert changed >= 4


def test_comfyui_names(tmp_path):
    """Files with lora_down and lora_up, of which Diffusers reads kohya's only. The weights are those of BFL's names."""
    made.clear()  # so that both have the same numbers
    save_file(NAMINGS["bfl"](), tmp_path / "bfl.safetensors")
    made.clear()
    renamed = pairs({**BLOCKS, **OUTER}, *KOHYA, prefix="diffusion_model.", rank=(4, 2))
    save_file(renamed, tmp_path / "comfyui.safetensors")
    first, second = (
        families.load("flux2", lora=tmp_path / f"{name}.safetensors").transformer.state_dict()
        for name in ("bfl", "comfyui")
    )
    plain = families.load("flux2").transformer.state_dict()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    changed = {name for name, weight in first.items() if not torch.equal(weight, plain[name])}
    assert changed == {f"{name}.weight" for name in (*BLOCKS, *OUTER)}


def test_fused_names_and_the_final_modulation(tmp_path):
    """By their formula. Diffusers reads the first for other adapters only, and leaves the second's rows as BFL's."""
    layers = {"transformer_blocks.1.attn.to_added_qkv": (3 * D, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    tensors = pairs(layers, *PEFT, prefix="diffusion_model.")
    save_file(tensors, tmp_path / "lora.safetensors")
    state = families.load("flux2", lora=tmp_path / "lora.safetensors").transformer.state_dict()
    before = families.load("flux2").transformer.state_dict()
    ours = {"transformer_blocks.1.attn.to_added_qkv": "double_blocks.1.txt_attn.qkv"}
    for layer in layers:
        down, up = (tensors[f"diffusion_model.{layer}{part}"] for part in PEFT)
        name = f"{ours.get(layer, layer)}.weight"
        assert (state.pop(name) - before[name] - up @ down).abs().max() < 2e-6
    assert all(torch.equal(weight, before[name]) for name, weight in state.items())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_generate_with_a_lora(tmp_path, memory):
    """`generate(lora=…)` and streamed blocks give the latents of `load_pipeline(lora=…)`."""
    file = tmp_path / "lora.safetensors"
    save_file(NAMINGS["bfl"](), file)
    expected = families.load("flux2", lora=file, memory="resident").generate("a red cat", **OPTIONS)
    if memory == "streamed":
        streamed = families.load("flux2", lora=file, memory="streamed")
        assert torch.equal(streamed.generate("a red cat", **OPTIONS), expected)
        return
    pipe = families.load("flux2", memory="resident")
    without = pipe.generate("a red cat", **OPTIONS)
    assert torch.equal(pipe.generate("a red cat", lora=file, **OPTIONS), expected)
    assert torch.equal(pipe.generate("a red cat", **OPTIONS), without)
    assert not torch.equal(without, expected)


def test_a_lora_of_flux1(tmp_path):
    save_file(pairs({"double_blocks.0.img_mod.lin": (6 * D, D)}, *PEFT), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="trained for another model") as error:
        families.load("flux2", lora=tmp_path / "lora.safetensors")
    assert len(str(error.value).splitlines()) == 1
    biased = pairs({"img_in": (D, 16)}, *PEFT) | {"img_in.lora_B.bias": torch.zeros(D)}
    save_file(biased, tmp_path / "biased.safetensors")
    with pytest.raises(UserError, match="has no bias there"):
        fluxlab.load_pipeline(families.folder("flux2"), lora=tmp_path / "biased.safetensors")
