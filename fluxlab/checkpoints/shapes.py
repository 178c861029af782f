"""A network's sizes from the shapes of its tensors: a single file has nothing else."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.params import Naming
from fluxlab.model import (
    AUTOENCODERS,
    TRANSFORMERS,
    TRANSFORMERS2,
    AutoEncoder2Params,
    AutoEncoderParams,
    Flux2Params,
    FluxParams,
)

Shapes = Mapping[str, tuple[int, ...]]

# Diffusers' names of the tensors that sizes are read from, as BFL's.
_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
        (r"^time_text_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_q\.", r"double_blocks.\1.img_attn.qkv."),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"double_blocks.\1.img_mlp.0."),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.", r"double_blocks.\1.txt_mlp.0."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
        (r"^time_guidance_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
        (r"^transformer_blocks\.(\d+)\.ff\.linear_out\.", r"double_blocks.\1.img_mlp.2."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    )
]


def bfl_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Diffusers' tensors under BFL's names, where sizes are read from them."""
    renamed = {}
    for name, shape in shapes.items():
        for pattern, new in _RENAMED:
            changed, count = pattern.subn(new, name)
            if count:
                name = changed
                break
        renamed[name] = shape
    return renamed


def transformer_params_from_shapes(shapes: Shapes, where: Path) -> FluxParams:
    """Return the sizes of a transformer with BFL's names.

    The heads' axes are split as FLUX.1's (1/8, 7/16, 7/16), and theta is its 10000. A size that only missing tensors
    would give is FLUX.1's: all missing tensors are then reported together.
    """
    flux1, depth, singles = TRANSFORMERS["dev"], _count(shapes, "double_blocks"), _count(shapes, "single_blocks")
    streams = ("img_in", "txt_in", "time_in.out_layer", "vector_in.out_layer")
    hidden = _size(shapes, *((f"{name}.{kind}", 0) for name in streams for kind in ("weight", "bias")))
    norms = (name for name in shapes if name.endswith(("query_norm.scale", "key_norm.scale")))
    head = _size(shapes, *((name, 0) for name in norms))
    if not hidden or not head or head % 32 or hidden % head:
        raise CheckpointError(
            f"{where}: the tensors' shapes do not say how heads share {hidden or 'the'} channels and three id axes "
            f"(a head's width: {head or 'unknown'})\nPass params=FluxParams(…)."
        )
    doubles = [f"double_blocks.{i}.{stream}_mlp.0" for i in range(depth) for stream in ("img", "txt")]
    mlp = _size(shapes, *((f"{name}.{kind}", 0) for name in doubles for kind in ("weight", "bias")))
    if not mlp:
        fused = ((f"single_blocks.{i}.linear1.{kind}", 0) for i in range(singles) for kind in ("weight", "bias"))
        alone = ((f"single_blocks.{i}.proj_mlp.{kind}", 0) for i in range(singles) for kind in ("weight", "bias"))
        mlp = _size(shapes, *alone) or (_size(shapes, *fused) or 7 * hidden) - 3 * hidden
    qkv = [name for name in shapes if name.startswith("double_blocks.") and "_attn.qkv." in name]
    return FluxParams(
        in_channels=_size(shapes, ("img_in.weight", 1)) or flux1.in_channels,
        out_channels=_size(shapes, ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0)) or hidden,
        vec_in_dim=_size(shapes, ("vector_in.in_layer.weight", 1)) or flux1.vec_in_dim,
        context_in_dim=_size(shapes, ("txt_in.weight", 1)) or flux1.context_in_dim,
        hidden_size=hidden,
        mlp_ratio=_ratio(mlp, hidden),
        num_heads=hidden // head,
        depth=depth,
        depth_single_blocks=singles,
        axes_dim=(head // 8, head * 7 // 16, head * 7 // 16),
        theta=flux1.theta,
        qkv_bias=not qkv or any(name.endswith(".bias") for name in qkv),
        guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
    )


def transformer2_params_from_shapes(shapes: Shapes, where: Path) -> Flux2Params:
    """Return the sizes of a FLUX.2 transformer with BFL's names.

    The heads' axes are four equal parts, and theta is 2000. A size that only missing tensors would give is FLUX.2
    dev's: all missing tensors are then reported together.
    """
    dev, depth, singles = TRANSFORMERS2["flux2dev"], _count(shapes, "double_blocks"), _count(shapes, "single_blocks")
    hidden = _size(shapes, *((f"{name}.weight", 0) for name in ("img_in", "txt_in", "time_in.out_layer")))
    norms = (name for name in shapes if name.endswith(("query_norm.scale", "key_norm.scale")))
    head = _size(shapes, *((name, 0) for name in norms))
    if not hidden or not head or head % 8 or hidden % head:
        raise CheckpointError(
            f"{where}: the tensors' shapes do not say how heads share {hidden or 'the'} channels and four id axes "
            f"(a head's width: {head or 'unknown'})\nPass params=Flux2Params(…)."
        )
    mlp = _size(shapes, *((f"double_blocks.{i}.img_mlp.2.weight", 1) for i in range(depth)))
    joined = _size(shapes, *((f"single_blocks.{i}.linear2.weight", 1) for i in range(singles)))
    with Naming(where):
        return Flux2Params(
            in_channels=_size(shapes, ("img_in.weight", 1)) or dev.in_channels,
            out_channels=_size(shapes, ("final_layer.linear.weight", 0)) or dev.out_channels,
            context_in_dim=_size(shapes, ("txt_in.weight", 1)) or dev.context_in_dim,
            hidden_size=hidden,
            mlp_ratio=_ratio(mlp or (joined or 4 * hidden) - hidden, hidden),
            num_heads=hidden // head,
            depth=depth,
            depth_single_blocks=singles,
            axes_dim=(head // 4,) * 4,
            theta=dev.theta,
            guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
        )


def autoencoder_params_from_shapes(shapes: Shapes, where: Path) -> AutoEncoderParams:
    """Return the sizes of an autoencoder with BFL's names. The latents' scale and shift, which no tensor has, are
    FLUX.1's."""
    flux1 = AUTOENCODERS["flux1"]
    with Naming(where):
        return AutoEncoderParams(
            **_levels(shapes, where, flux1), scale_factor=flux1.scale_factor, shift_factor=flux1.shift_factor
        )


def autoencoder2_params_from_shapes(shapes: Shapes, where: Path) -> AutoEncoder2Params:
    """Return the sizes of a FLUX.2 autoencoder with BFL's names."""
    with Naming(where):
        return AutoEncoder2Params(**_levels(shapes, where, AUTOENCODERS["flux2"]))


def _levels(shapes: Shapes, where: Path, usual: AutoEncoderParams | AutoEncoder2Params) -> dict[str, Any]:
    """Return the sizes that the tensors of an encoder and a decoder give. usual: for what they do not give."""
    levels = range(_count(shapes, "encoder.down"))
    both = ("weight", "bias")
    ch = _size(shapes, *((f"encoder.conv_in.{kind}", 0) for kind in both))
    layers = [f"block.0.{layer}.{kind}" for layer in ("conv1", "norm2", "conv2") for kind in both]
    widths = [_size(shapes, *((f"encoder.down.{i}.{layer}", 0) for layer in layers)) for i in levels]
    if not ch or not widths or any(not width or width % ch for width in widths):
        raise CheckpointError(
            f"{where}: the tensors' shapes do not give the autoencoder's levels (channels: {ch or 'unknown'}, "
            f"then {', '.join(str(width or 'unknown') for width in widths) or 'none'})\n"
            f"Pass params={type(usual).__name__}(…)."
        )
    return {
        "resolution": usual.resolution,
        "in_channels": _size(shapes, ("encoder.conv_in.weight", 1)) or usual.in_channels,
        "ch": ch,
        "out_ch": _size(shapes, *((f"decoder.conv_out.{kind}", 0) for kind in both)) or usual.out_ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": max(_count(shapes, f"encoder.down.{i}.block") for i in levels),
        "z_channels": _size(shapes, ("decoder.conv_in.weight", 1))
        or (_size(shapes, *((f"encoder.conv_out.{kind}", 0) for kind in both)) or 2 * usual.z_channels) // 2,
    }


def _size(shapes: Shapes, *dimensions: tuple[str, int]) -> int | None:
    """The size of the first (tensor, dimension) that exists."""
    return next((shapes[name][dim] for name, dim in dimensions if len(shapes.get(name, ())) > dim), None)


def _count(shapes: Shapes, prefix: str) -> int:
    """The number of numbered modules. A gap is found later, as missing tensors."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _ratio(mlp: int, hidden: int) -> float:
    """The ratio whose product with `hidden` truncates to `mlp`: a plain quotient can fall just short of it."""
    ratio = mlp / hidden
    return ratio if int(hidden * ratio) == mlp else math.nextafter(ratio, math.inf)
