"""Checkpoints against Diffusers: what it writes we compute alike, what we write it loads, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxlab.checkpoints import load_autoencoder, load_transformer, save_autoencoder, save_transformer
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "pooled_projection_dim": 24,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
}
TRANSFORMERS = {
    "dev": {},
    "schnell": {"guidance_embeds": False},
    "no double blocks": {"num_layers": 0, "num_single_layers": 3},
    "no single blocks": {"num_layers": 3, "num_single_layers": 0},
    "no blocks": {"num_layers": 0, "num_single_layers": 0},
    "fill": {"in_channels": 96, "out_channels": 16},
    "three heads of 64": {"num_attention_heads": 3, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)},
    "one head of 12": {"num_attention_heads": 1, "attention_head_dim": 12, "axes_dims_rope": (2, 4, 6)},
    "eleven blocks": {"num_layers": 1, "num_single_layers": 11},
}
AUTOENCODERS = {
    "flux1": {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 2, "latent_channels": 16},
    "one level": {"block_out_channels": (32,), "layers_per_block": 1, "latent_channels": 4},
    "two levels": {"block_out_channels": (32, 64), "layers_per_block": 3, "latent_channels": 4},
    "five levels": {"block_out_channels": (32, 32, 64, 32, 64), "layers_per_block": 1, "latent_channels": 8},
    "grey images": {"block_out_channels": (32, 32), "layers_per_block": 1, "in_channels": 1, "out_channels": 1},
}


def randomize(module):
    """Norms and biases begin as ones and zeros: a swapped pair would go unseen."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            scale = "norm" in name and "weight" in name
            torch.nn.init.normal_(parameter.data, 1.0 if scale else 0.0, 0.2 if scale else 0.02)
    return module.eval().requires_grad_(False)


def their_transformer(seed=0, **changes):
    torch.manual_seed(seed)
    return randomize(diffusers.FluxTransformer2DModel(**(SMALL | changes)))


def their_autoencoder(**changes):
    torch.manual_seed(0)
    levels = len(changes["block_out_channels"])
    return randomize(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.7,
            shift_factor=-0.2,
            **changes,
        )
    )


def inputs(config):
    generator = torch.Generator().manual_seed(1)
    axes = len(config["axes_dims_rope"])
    values = {
        "img": torch.randn(2, 12, config["in_channels"], generator=generator),
        "img_ids": torch.randn(1, 12, axes, generator=generator) * 9,
        "txt": torch.randn(2, 5, config["joint_attention_dim"], generator=generator),
        "txt_ids": torch.randn(1, 5, axes, generator=generator) * 9,
        "timesteps": torch.tensor([0.3, 0.9]),
        "y": torch.randn(2, config["pooled_projection_dim"], generator=generator),
    }
    return values | ({"guidance": torch.tensor([3.5, 1.0])} if config["guidance_embeds"] else {})


@torch.no_grad()
def theirs_of(model, values):
    return model(
        hidden_states=values["img"],
        encoder_hidden_states=values["txt"],
        pooled_projections=values["y"],
        timestep=values["timesteps"],
        guidance=values.get("guidance"),
        img_ids=values["img_ids"][0],
        txt_ids=values["txt_ids"][0],
        return_dict=False,
    )[0]


def distance(found, expected):
    return ((found - expected).abs().max() / expected.std()).item()


def tensors(folder):
    state = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(file)
    return state


def assert_bit_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_computes_what_diffusers_computes(tmp_path, name):
    model = their_transformer(**TRANSFORMERS[name])
    model.save_pretrained(tmp_path)
    values = inputs(SMALL | TRANSFORMERS[name])
    with torch.no_grad():
        found = load_transformer(tmp_path)(**values)
    assert distance(found, theirs_of(model, values)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_round_trip_is_bit_equal(tmp_path, name, dtype):
    their_transformer(**TRANSFORMERS[name]).to(dtype).save_pretrained(tmp_path / "0", max_shard_size="150KB")
    save_transformer(load_transformer(tmp_path / "0"), tmp_path / "1.safetensors")
    again = load_transformer(tmp_path / "1.safetensors")
    assert again.params == load_transformer(tmp_path / "0").params
    save_transformer(again, tmp_path / "2", layout="diffusers", max_shard_size=100_000)
    expected = tensors(tmp_path / "0")
    assert_bit_equal(tensors(tmp_path / "2"), expected)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "2", torch_dtype=dtype)
    assert_bit_equal(loaded.state_dict(), expected)
    assert dict(loaded.config)["axes_dims_rope"] == [*again.params.axes_dim]


@pytest.mark.parametrize("guidance", [True, False])
def test_the_published_transformers_have_these_names_and_shapes(guidance):
    from fluxlab.checkpoints.flux1 import transformer_pieces
    from fluxlab.checkpoints.keys import their_shapes, to_ours, to_theirs
    from fluxlab.model import TRANSFORMERS as PUBLISHED

    params = PUBLISHED["dev" if guidance else "schnell"]
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in Flux(params).state_dict().items()}
        theirs = diffusers.FluxTransformer2DModel(guidance_embeds=guidance).state_dict()
    pieces = transformer_pieces(params)
    assert their_shapes(pieces, ours) == {name: tuple(t.shape) for name, t in theirs.items()}
    assert to_ours(pieces).keys() == ours.keys()
    assert to_theirs(pieces).keys() == theirs.keys()
    assert len(ours) == (780 if guidance else 776)


def test_the_published_autoencoder_has_these_names_and_shapes():
    from fluxlab.checkpoints.flux1 import autoencoder_config, autoencoder_pieces
    from fluxlab.checkpoints.keys import their_shapes
    from fluxlab.model import AUTOENCODERS as PUBLISHED

    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in AutoEncoder(PUBLISHED["flux1"]).state_dict().items()}
        theirs = diffusers.AutoencoderKL.from_config(autoencoder_config(PUBLISHED["flux1"])).state_dict()
    shapes = their_shapes(autoencoder_pieces(PUBLISHED["flux1"]), ours)
    assert shapes == {name: tuple(t.shape) for name, t in theirs.items()}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_computes_what_diffusers_computes(tmp_path, name):
    model = their_autoencoder(**AUTOENCODERS[name])
    model.save_pretrained(tmp_path)
    model.double()
    channels = model.config.in_channels
    image = torch.randn(1, channels, 32, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # norms over groups of one channel amplify rounding: in fp32 Diffusers itself is up to 1e-4 away from its fp64
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        ours = load_autoencoder(tmp_path, dtype=dtype)
        with torch.no_grad():
            latent = (model.encode(image).latent_dist.mean + 0.2) * 0.7
            assert distance(ours.encode(image.to(dtype)), latent) <= bound
            assert distance(ours.decode(latent.to(dtype)), model.decode(latent / 0.7 - 0.2).sample) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_round_trip_is_bit_equal(tmp_path, name, dtype):
    their_autoencoder(**AUTOENCODERS[name]).to(dtype).save_pretrained(tmp_path / "0", max_shard_size="150KB")
    save_autoencoder(load_autoencoder(tmp_path / "0"), tmp_path / "1.safetensors")
    again = load_autoencoder(tmp_path / "1.safetensors")
    assert again.params == load_autoencoder(tmp_path / "0").params
    save_autoencoder(again, tmp_path / "2", layout="diffusers")
    expected = tensors(tmp_path / "0")
    assert_bit_equal(tensors(tmp_path / "2"), expected)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "2", torch_dtype=dtype)
    assert_bit_equal(loaded.state_dict(), expected)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (0.7, -0.2)


@pytest.mark.parametrize("shards", ["5GB", "200KB"])
def test_variants_are_told_apart(tmp_path, shards):
    """Two models in one folder: fp16 files hold the second."""
    other = their_transformer(seed=1).half()
    their_transformer().save_pretrained(tmp_path, max_shard_size=shards)
    other.save_pretrained(tmp_path, max_shard_size=shards, variant="fp16")
    plain, half = load_transformer(tmp_path), load_transformer(tmp_path, variant="fp16")
    assert plain.img_in.weight.dtype == torch.float32
    assert torch.equal(plain.img_in.weight, their_transformer().x_embedder.weight)
    assert half.img_in.weight.dtype == torch.float16
    assert torch.equal(half.img_in.weight, other.x_embedder.weight)


@pytest.mark.parametrize("name", ["dev_like", "schnell_like"])
def test_sizes_of_the_original_file_come_from_its_shapes(name):
    params = json.loads((GOLDEN / name / "params.json").read_text())
    model = load_transformer(GOLDEN / name / "flux.safetensors")
    assert model.params == FluxParams(**params)
    values = load_file(GOLDEN / name / "io.safetensors")
    expected = values.pop("output")
    with torch.no_grad():
        assert distance(model(**values), expected) <= 1e-5


def test_sizes_of_the_original_autoencoder_come_from_its_shapes():
    params = json.loads((GOLDEN / "ae_params.json").read_text())
    model = load_autoencoder(GOLDEN / "ae.safetensors")
    assert model.params == AutoEncoderParams(**params | {"resolution": 256})
    values = load_file(GOLDEN / "ae_io.safetensors")
    with torch.no_grad():
        assert distance(model.encode(values["image"]), values["latent_mean"]) <= 1e-5
        assert distance(model.decode(values["latent_mean"]), values["decoded"]) <= 1e-5


UNUSUAL = FluxParams(
    in_channels=4,
    out_channels=6,
    vec_in_dim=8,
    context_in_dim=10,
    hidden_size=192,
    mlp_ratio=3.3,
    num_heads=3,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(8, 28, 28),
    theta=10000,
    qkv_bias=False,
    guidance_embed=False,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "guidance_embed": True},
        {"depth": 0, "qkv_bias": True, "mlp_ratio": 3.3},
        {"depth_single_blocks": 0},
        {"depth": 3, "depth_single_blocks": 12, "num_heads": 6, "axes_dim": (4, 14, 14)},
    ],
)
def test_unusual_sizes_are_told_by_shapes_alone(tmp_path, changes):
    params = replace(UNUSUAL, **changes)
    save_file(Flux(params).state_dict(), tmp_path / "a.safetensors")
    found = load_transformer(tmp_path / "a.safetensors").params
    hidden = params.hidden_size
    assert int(found.mlp_ratio * hidden) == int(params.mlp_ratio * hidden)
    assert replace(found, mlp_ratio=params.mlp_ratio) == params


def test_the_ratio_gives_back_the_width():
    from fluxlab.checkpoints.shapes import ratio

    assert all(int(d * ratio(mlp, d)) == mlp for d in (96, 192, 3072) for mlp in range(1, 15000))


def test_metadata_wins_over_shapes(tmp_path):
    params = replace(UNUSUAL, axes_dim=(20, 22, 22), theta=777)
    save_transformer(Flux(params), tmp_path / "a.safetensors")
    assert load_transformer(tmp_path / "a.safetensors").params == params
    sizes = AutoEncoderParams(48, 3, 32, 3, (2, 1), 1, 4, 1.5, 0.25)
    save_autoencoder(AutoEncoder(sizes), tmp_path / "ae.safetensors")
    assert load_autoencoder(tmp_path / "ae.safetensors").params == sizes


def test_params_can_be_given_where_nothing_tells_them(tmp_path):
    params = replace(UNUSUAL, num_heads=12, axes_dim=(4, 6, 6))
    save_file(Flux(params).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"(?s)width: 16.*Pass params="):
        load_transformer(tmp_path / "a.safetensors")
    assert load_transformer(tmp_path / "a.safetensors", params=params).params == params


def test_all_in_one_files_hold_prefixed_networks(tmp_path):
    both = {f"model.diffusion_model.{k}": v for k, v in load_file(GOLDEN / "dev_like/flux.safetensors").items()}
    both |= {f"vae.{k}": v for k, v in load_file(GOLDEN / "ae.safetensors").items()}
    both["text_encoders.clip_l.logit_scale"] = torch.zeros(1)
    save_file(both, tmp_path / "all.safetensors")
    assert_bit_equal(
        load_transformer(tmp_path / "all.safetensors").state_dict(), load_file(GOLDEN / "dev_like/flux.safetensors")
    )
    assert_bit_equal(load_autoencoder(tmp_path / "all.safetensors").state_dict(), load_file(GOLDEN / "ae.safetensors"))


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_autoencoder_folders_name_their_attention_otherwise(tmp_path, convolutions):
    model = their_autoencoder(**AUTOENCODERS["two levels"])
    model.save_pretrained(tmp_path)
    expected = load_autoencoder(tmp_path).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(tmp_path / "diffusion_pytorch_model.safetensors").items():
        for new, was in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, was)
                tensor = tensor[..., None, None].clone() if convolutions and tensor.ndim == 2 else tensor
        state[name] = tensor
    assert any("proj_attn" in name for name in state)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_bit_equal(load_autoencoder(tmp_path).state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_is_the_cast(tmp_path, dtype):
    model = their_transformer()
    model.save_pretrained(tmp_path / "a")
    expected = load_transformer(tmp_path / "a").to(dtype)
    save_transformer(load_transformer(tmp_path / "a"), tmp_path / "a.safetensors")
    assert_bit_equal(load_transformer(tmp_path / "a", dtype=dtype).state_dict(), expected.state_dict())
    assert_bit_equal(load_transformer(tmp_path / "a.safetensors", dtype=dtype).state_dict(), expected.state_dict())


def test_scratch_pages_hold_the_same_as_memory(tmp_path, monkeypatch):
    their_transformer().save_pretrained(tmp_path / "a")
    expected = load_transformer(tmp_path / "a").state_dict()
    monkeypatch.setattr("fluxlab.checkpoints.read.JOIN_IN_MEMORY", 0)
    model = load_transformer(tmp_path / "a")
    assert_bit_equal(model.state_dict(), expected)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (model.single_blocks[0].linear1.weight,))
