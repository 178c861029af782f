"""A network's sizes: from a Diffusers config.json, from a file's metadata, or from its tensors' shapes; and back."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import quantised
from fluxlab.model import AUTOENCODERS, AutoEncoderParams, FluxParams

TRANSFORMER_CLASS, AUTOENCODER_CLASS = "FluxTransformer2DModel", "AutoencoderKL"
METADATA_KEY = "fluxlab_params"

# Diffusers' own defaults: a config.json may leave out what equals them
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
    """`FluxParams` of a Diffusers config. Raises `CheckpointError` naming the key for what FLUX.1 does not have."""
    c = _complete(config, _TRANSFORMER, where)
    _need(c, where, "FLUX.1's transformer", patch_size=1)
    with _Naming(where):
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
    """The Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers' class fixes otherwise."""
    for name, fixed in {"mlp_ratio": 4, "theta": 10000, "qkv_bias": True}.items():
        if getattr(p, name) != fixed:
            raise CheckpointError(
                f"{name} {getattr(p, name)}: Diffusers' {TRANSFORMER_CLASS} knows {fixed} only\nSave with layout='bfl'."
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
    """`AutoEncoderParams` of a Diffusers config. Raises `CheckpointError` naming the key for what FLUX.1 lacks."""
    c = _complete(config, _AUTOENCODER, where)
    widths, levels = c["block_out_channels"], len(c["block_out_channels"])
    _need(
        c,
        where,
        "FLUX.1's autoencoder",
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        act_fn="silu",
        norm_num_groups=32,
        latents_mean=None,
        latents_std=None,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    if not widths or any(width % widths[0] for width in widths):
        raise CheckpointError(f"{where}: block_out_channels {widths}: each must be a multiple of the first")
    size = c["sample_size"]
    with _Naming(where):
        return AutoEncoderParams(
            resolution=size if isinstance(size, int) else max(size),
            in_channels=c["in_channels"],
            ch=widths[0],
            out_ch=c["out_channels"],
            ch_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=c["layers_per_block"],
            z_channels=c["latent_channels"],
            scale_factor=c["scaling_factor"],
            shift_factor=c["shift_factor"] or 0.0,
        )


def autoencoder_config(p: AutoEncoderParams) -> dict[str, Any]:
    """The Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers' class does not have."""
    if p.ch_mult[0] != 1:
        raise CheckpointError(
            f"ch_mult {p.ch_mult}: Diffusers' {AUTOENCODER_CLASS} can only begin with 1\nSave with layout='bfl'."
        )
    return {
        "_class_name": AUTOENCODER_CLASS,
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
        "scaling_factor": p.scale_factor,
        "shift_factor": p.shift_factor,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }


def check_class(config: Mapping[str, Any], expected: str, where: Path) -> None:
    """Raise `CheckpointError` where a config.json belongs to another network, or to quantised weights."""
    found = config.get("_class_name")
    if found != expected:
        other = {TRANSFORMER_CLASS: "load_transformer", AUTOENCODER_CLASS: "load_autoencoder"}.get(found)
        raise CheckpointError(
            f"{where}: _class_name is {found!r}, where {expected!r} is needed\n"
            + (f"{other} reads this one." if other else "Pass a FLUX.1 checkpoint.")
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        raise quantised(where, f"quantization_config {method.get('quant_method') if isinstance(method, dict) else ''}")


def to_metadata(p: FluxParams | AutoEncoderParams) -> str:
    return json.dumps(asdict(p), sort_keys=True)


def from_metadata(cls: type, text: str, where: Path) -> Any:
    """`cls` from what `to_metadata` wrote into a file."""
    names = [f.name for f in fields(cls)]
    try:
        values = json.loads(text)
        if sorted(values) != sorted(names):
            raise ValueError(f"expected {', '.join(names)}")
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: metadata {METADATA_KEY} is no {cls.__name__}: {error}") from None


def transformer_params_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path) -> FluxParams:
    """Sizes of a BFL transformer file. Heads' axes are split as FLUX.1's (1/8, 7/16, 7/16), theta is its 10000."""
    hidden, in_channels = _shape(shapes, "img_in.weight", where, 2)
    depth, singles = _count(shapes, "double_blocks"), _count(shapes, "single_blocks")
    norm = "double_blocks.0.img_attn.norm" if depth else "single_blocks.0.norm"
    mlp = 4 * hidden
    if depth:
        mlp = _shape(shapes, "double_blocks.0.img_mlp.0.weight", where, 2)[0]
    elif singles:
        mlp = _shape(shapes, "single_blocks.0.linear1.weight", where, 2)[0] - 3 * hidden
    head = _shape(shapes, f"{norm}.query_norm.scale", where, 1)[0] if depth or singles else 0
    if not head or head % 32 or hidden % head:
        raise CheckpointError(
            f"{where}: how its heads share {hidden} channels and three id axes cannot be told from the tensors' shapes "
            f"(a head's width: {head or 'unknown'})\nPass params=FluxParams(…)."
        )
    return FluxParams(
        in_channels=in_channels,
        out_channels=_shape(shapes, "final_layer.linear.weight", where, 2)[0],
        vec_in_dim=_shape(shapes, "vector_in.in_layer.weight", where, 2)[1],
        context_in_dim=_shape(shapes, "txt_in.weight", where, 2)[1],
        hidden_size=hidden,
        mlp_ratio=_ratio(mlp, hidden),
        num_heads=hidden // head,
        depth=depth,
        depth_single_blocks=singles,
        axes_dim=(head // 8, head * 7 // 16, head * 7 // 16),
        theta=10000,
        qkv_bias=not depth or "double_blocks.0.img_attn.qkv.bias" in shapes,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def autoencoder_params_from_shapes(shapes: Mapping[str, tuple[int, ...]], where: Path) -> AutoEncoderParams:
    """Sizes of a BFL autoencoder file. The latents' scale and shift, which no tensor tells, are FLUX.1's."""
    flux1 = AUTOENCODERS["flux1"]
    ch, in_channels = _shape(shapes, "encoder.conv_in.weight", where, 4)[:2]
    levels = _count(shapes, "encoder.down")
    widths = [_shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", where, 4)[0] for i in range(levels)]
    if not widths or any(width % ch for width in widths):
        raise CheckpointError(f"{where}: levels of {widths} channels are no multiples of {ch}; pass params=")
    with _Naming(where):
        return AutoEncoderParams(
            resolution=flux1.resolution,
            in_channels=in_channels,
            ch=ch,
            out_ch=_shape(shapes, "decoder.conv_out.weight", where, 4)[0],
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=_count(shapes, "encoder.down.0.block"),
            z_channels=_shape(shapes, "decoder.conv_in.weight", where, 4)[1],
            scale_factor=flux1.scale_factor,
            shift_factor=flux1.shift_factor,
        )


class _Naming:
    """Puts the file's name before a complaint about sizes that do not fit together."""

    def __init__(self, where: Path):
        self.where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, ValueError | TypeError | ZeroDivisionError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{self.where}: {error}") from None


def _complete(config: Mapping[str, Any], defaults: Mapping[str, Any], where: Path) -> dict[str, Any]:
    unknown = sorted(key for key in config if key not in defaults and not key.startswith("_"))
    if unknown:
        raise CheckpointError(
            f"{where}: {unknown[0]!r} {config[unknown[0]]!r} is no setting of FLUX.1\nExpected: {', '.join(defaults)}"
        )
    values = dict(defaults) | {key: value for key, value in config.items() if key in defaults}
    for key, value in values.items():
        usual = defaults[key]
        numbers = isinstance(usual, int) and not isinstance(usual, bool) and key != "sample_size"
        if (numbers and (type(value) is not int or value < 0)) or (isinstance(usual, tuple) and not _is_list(value)):
            raise CheckpointError(f"{where}: {key} is {value!r}; expected something like {usual!r}")
    return values


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _need(config: Mapping[str, Any], where: Path, what: str, **needed: Any) -> None:
    for key, value in needed.items():
        found = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if found != value:
            raise CheckpointError(f"{where}: {key} is {found!r}; {what} has {value!r} and nothing else can be read")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, where: Path, dims: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{where}: tensor {name} is missing, and the sizes cannot be told without it")
    if len(shapes[name]) != dims:
        raise CheckpointError(f"{where}: tensor {name} has shape {shapes[name]}; {dims} dimensions are needed")
    return shapes[name]


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbered modules there are; a gap is found later, as missing tensors."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _ratio(mlp: int, hidden: int) -> float:
    """The ratio whose product with `hidden` truncates to `mlp`: a plain quotient can fall just short of it."""
    ratio = mlp / hidden
    return ratio if int(hidden * ratio) == mlp else math.nextafter(ratio, math.inf)
