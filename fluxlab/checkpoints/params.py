"""The sizes of a network, from a Diffusers config.json or a file's metadata, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError, quantised
from fluxlab.errors import UserError
from fluxlab.model import AutoEncoder2Params, AutoEncoderParams, Flux2Params, FluxParams

CLASSES = {
    "transformer": {"flux1": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel"},
    "autoencoder": {"flux1": "AutoencoderKL", "flux2": "AutoencoderKLFlux2"},
}
"""Diffusers' classes of a network, by family."""

TRANSFORMER_CLASS, AUTOENCODER_CLASS = CLASSES["transformer"]["flux1"], CLASSES["autoencoder"]["flux1"]
METADATA_KEY = "fluxlab_params"

# Diffusers' defaults: a config.json may omit values that equal them
_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
_AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def transformer_params(config: Mapping[str, Any], where: Path) -> FluxParams:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.1 does not have."""
    c = complete(config, _TRANSFORMER, where)
    require(c, where, "FLUX.1's transformer", patch_size=1)
    with Naming(where):
        return FluxParams(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"] or c["in_channels"],
            vec_in_dim=c["pooled_projection_dim"],
            context_in_dim=c["joint_attention_dim"],
            hidden_size=c["num_attention_heads"] * c["attention_head_dim"],
            mlp_ratio=4.0,
            num_heads=c["num_attention_heads"],
            depth=c["num_layers"],
            depth_single_blocks=c["num_single_layers"],
            axes_dim=tuple(c["axes_dims_rope"]),
            theta=10000,
            qkv_bias=True,
            guidance_embed=c["guidance_embeds"],
        )


def transformer_config(p: FluxParams) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers does not have."""
    for name, fixed in {"mlp_ratio": 4, "theta": 10000, "qkv_bias": True}.items():
        if getattr(p, name) != fixed:
            raise CheckpointError(
                f"{name} {getattr(p, name)}: Diffusers' {TRANSFORMER_CLASS} only has {fixed}\nSave with layout='bfl'."
            )
    return {
        "_class_name": TRANSFORMER_CLASS,
        "patch_size": 1,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "num_layers": p.depth,
        "num_single_layers": p.depth_single_blocks,
        "attention_head_dim": p.hidden_size // p.num_heads,
        "num_attention_heads": p.num_heads,
        "joint_attention_dim": p.context_in_dim,
        "pooled_projection_dim": p.vec_in_dim,
        "guidance_embeds": p.guidance_embed,
        "axes_dims_rope": list(p.axes_dim),
    }


def autoencoder_params(config: Mapping[str, Any], where: Path) -> AutoEncoderParams:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.1 does not have."""
    c = complete(config, _AUTOENCODER, where)
    fixed = {"latents_mean": None, "latents_std": None, "use_quant_conv": False, "use_post_quant_conv": False}
    with Naming(where):
        return AutoEncoderParams(
            **level_sizes(c, where, "FLUX.1's autoencoder", **fixed),
            scale_factor=c["scaling_factor"],
            shift_factor=c["shift_factor"] or 0.0,
        )


def level_sizes(c: Mapping[str, Any], where: Path, what: str, **fixed: Any) -> dict[str, Any]:
    """Return the sizes that both autoencoders have. fixed: settings that can have one value only."""
    widths, levels = c["block_out_channels"], len(c["block_out_channels"])
    if not widths or any(width < 1 or width % widths[0] for width in widths):
        raise CheckpointError(f"{where}: block_out_channels {widths}: each must be a multiple of the first")
    require(
        c,
        where,
        what,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        act_fn="silu",
        norm_num_groups=32,
        mid_block_add_attention=True,
        **fixed,
    )
    size = c["sample_size"]
    return {
        "resolution": size if isinstance(size, int) else max(size),
        "in_channels": c["in_channels"],
        "ch": widths[0],
        "out_ch": c["out_channels"],
        "ch_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": c["layers_per_block"],
        "z_channels": c["latent_channels"],
    }


def autoencoder_config(p: AutoEncoderParams) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers does not have."""
    return {
        **level_config(p, AUTOENCODER_CLASS),
        "scaling_factor": p.scale_factor,
        "shift_factor": p.shift_factor,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def level_config(p: AutoEncoderParams | AutoEncoder2Params, class_name: str) -> dict[str, Any]:
    """Return the settings that both autoencoders have."""
    if p.ch_mult[0] != 1:
        raise CheckpointError(
            f"ch_mult {p.ch_mult}: Diffusers' {class_name} must begin with 1\nSave with layout='bfl'."
        )
    return {
        "_class_name": class_name,
        "in_channels": p.in_channels,
        "out_channels": p.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(p.ch_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(p.ch_mult),
        "block_out_channels": [p.ch * mult for mult in p.ch_mult],
        "layers_per_block": p.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": p.z_channels,
        "norm_num_groups": 32,
        "sample_size": p.resolution,
        "mid_block_add_attention": True,
    }


def check_class(config: Mapping[str, Any], part: str, where: Path) -> str:
    """Return the family of a config.json of `part`.

    Raises `CheckpointError` if it belongs to another network, or to quantised weights.
    """
    name = config.get("_class_name")
    families = {class_name: family for family, class_name in CLASSES[part].items()}
    if name not in families:
        other = next((f"load_{known}" for known, classes in CLASSES.items() if name in classes.values()), None)
        raise CheckpointError(
            f"{where}: _class_name is {name!r}, expected {' or '.join(map(repr, families))}\n"
            + (f"{other} reads this one." if other else "Pass a FLUX.1 or FLUX.2 checkpoint.")
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        raise quantised(where, f"quantization_config {method.get('quant_method') if isinstance(method, dict) else ''}")
    return families[name]


def to_metadata(p: FluxParams | Flux2Params | AutoEncoderParams | AutoEncoder2Params) -> str:
    """Return sizes as text for a file's metadata."""
    return json.dumps(asdict(p), sort_keys=True)


def from_metadata(cls: type, text: str, where: Path) -> Any:
    """Return the `cls` that `to_metadata` wrote into a file."""
    names = [f.name for f in fields(cls)]
    try:
        values = json.loads(text)
        if sorted(values) != sorted(names):
            raise UserError(f"expected {', '.join(names)}")
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: metadata {METADATA_KEY} is not a {cls.__name__}: {error}") from None


class Naming:
    """Adds the file's name to an error about sizes that do not fit together."""

    def __init__(self, where: Path):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ValueError | TypeError | ZeroDivisionError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.where}: {error}") from None


def complete(
    config: Mapping[str, Any], defaults: Mapping[str, Any], where: Path, family: str = "FLUX.1"
) -> dict[str, Any]:
    """Return a config with defaults for what it leaves out. Raises `CheckpointError` for another or a wrong setting."""
    unknown = sorted(key for key in config if key not in defaults and not key.startswith("_"))
    if unknown:
        raise CheckpointError(
            f"{where}: {unknown[0]!r} {config[unknown[0]]!r} is not a setting of {family}\n"
            f"Expected: {', '.join(defaults)}"
        )
    values = dict(defaults) | {key: value for key, value in config.items() if key in defaults}
    for key, value in values.items():
        if not _matches_default(value, defaults[key]) and key != "sample_size":
            raise CheckpointError(f"{where}: {key} is {value!r}; expected something like {defaults[key]!r}")
    return values


def _matches_default(value: Any, usual: Any) -> bool:
    """Whether a setting has the type of its default (lists stand for tuples) and is not negative."""
    if isinstance(usual, tuple):
        return isinstance(value, list | tuple) and all(_matches_default(item, usual[0]) for item in value)
    if isinstance(usual, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return usual is None or (type(value) is type(usual) and (not isinstance(value, int) or value >= 0))


def require(config: Mapping[str, Any], where: Path, what: str, **required: Any) -> None:
    """Raise `CheckpointError` unless the settings have these values."""
    for key, value in required.items():
        actual = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if actual != value:
            raise CheckpointError(f"{where}: {key} is {actual!r}; {what} has {value!r} and nothing else can be read")
