"""The sizes of FLUX.2's networks from a Diffusers config.json, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.params import CLASSES, Naming, complete, level_config, level_sizes, require
from fluxlab.model import AutoEncoder2Params, Flux2Params
from fluxlab.model.autoencoder2 import BN_EPS

# Diffusers' defaults: a config.json may omit values that equal them
_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000.0,
    "eps": 1e-6,
    "guidance_embeds": True,
}
_AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": BN_EPS,
    "batch_norm_momentum": 0.1,
    "patch_size": (2, 2),
}


def transformer2_params(config: Mapping[str, Any], where: Path) -> Flux2Params:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.2 does not have."""
    c = complete(config, _TRANSFORMER, where, "FLUX.2")
    require(c, where, "FLUX.2's transformer", patch_size=1, timestep_guidance_channels=256, eps=1e-6)
    with Naming(where):
        return Flux2Params(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"] or c["in_channels"],
            context_in_dim=c["joint_attention_dim"],
            hidden_size=c["num_attention_heads"] * c["attention_head_dim"],
            mlp_ratio=c["mlp_ratio"],
            num_heads=c["num_attention_heads"],
            depth=c["num_layers"],
            depth_single_blocks=c["num_single_layers"],
            axes_dim=tuple(c["axes_dims_rope"]),
            theta=c["rope_theta"],
            guidance_embed=c["guidance_embeds"],
        )


def transformer2_config(p: Flux2Params) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`."""
    return {
        "_class_name": CLASSES["transformer"]["flux2"],
        "patch_size": 1,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "num_layers": p.depth,
        "num_single_layers": p.depth_single_blocks,
        "attention_head_dim": p.hidden_size // p.num_heads,
        "num_attention_heads": p.num_heads,
        "joint_attention_dim": p.context_in_dim,
        "timestep_guidance_channels": 256,
        "mlp_ratio": p.mlp_ratio,
        "axes_dims_rope": list(p.axes_dim),
        "rope_theta": p.theta,
        "eps": 1e-6,
        "guidance_embeds": p.guidance_embed,
    }


def autoencoder2_params(config: Mapping[str, Any], where: Path) -> AutoEncoder2Params:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.2 does not have."""
    c = complete(config, _AUTOENCODER, where, "FLUX.2")
    fixed = {"batch_norm_eps": BN_EPS, "patch_size": [2, 2], "use_quant_conv": True, "use_post_quant_conv": True}
    if c["decoder_block_out_channels"] not in (None, c["block_out_channels"], list(c["block_out_channels"])):
        raise CheckpointError(
            f"{where}: decoder_block_out_channels is {c['decoder_block_out_channels']!r}; FLUX.2's autoencoder has "
            "those of the encoder and nothing else can be read"
        )
    with Naming(where):
        return AutoEncoder2Params(**level_sizes(c, where, "FLUX.2's autoencoder", **fixed))


def autoencoder2_config(p: AutoEncoder2Params) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers does not have."""
    return {
        **level_config(p, CLASSES["autoencoder"]["flux2"]),
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "batch_norm_eps": BN_EPS,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
    }
