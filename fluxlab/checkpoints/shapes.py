"""A network's sizes, told by the shapes of its tensors: a file of the original release has nothing else."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.params import Naming
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, AutoEncoderParams, FluxParams

Shapes = Mapping[str, tuple[int, ...]]


def transformer_params_from_shapes(shapes: Shapes, where: Path) -> FluxParams:
    """Sizes of a BFL transformer file. Heads' axes are split as FLUX.1's (1/8, 7/16, 7/16), theta is its 10000.

    A size that only one tensor tells is FLUX.1's where that is missing: all that is missing is then counted together.
    """
    flux1, depth, singles = TRANSFORMERS["dev"], _count(shapes, "double_blocks"), _count(shapes, "single_blocks")
    streams = ("img_in", "txt_in", "time_in.out_layer", "vector_in.out_layer")
    hidden = _size(shapes, *((f"{name}.{kind}", 0) for name in streams for kind in ("weight", "bias")))
    norms = (name for name in shapes if name.endswith(("query_norm.scale", "key_norm.scale")))
    head = _size(shapes, *((name, 0) for name in norms))
    if not hidden or not head or head % 32 or hidden % head:
        raise CheckpointError(
            f"{where}: how its heads share {hidden or 'its'} channels and three id axes cannot be told from the "
            f"tensors' shapes (a head's width: {head or 'unknown'})\nPass params=FluxParams(…)."
        )
    doubles = [f"double_blocks.{i}.{stream}_mlp.0" for i in range(depth) for stream in ("img", "txt")]
    mlp = _size(shapes, *((f"{name}.{kind}", 0) for name in doubles for kind in ("weight", "bias")))
    if not mlp:
        places = ((f"single_blocks.{i}.linear1.{kind}", 0) for i in range(singles) for kind in ("weight", "bias"))
        mlp = (_size(shapes, *places) or 7 * hidden) - 3 * hidden
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


def autoencoder_params_from_shapes(shapes: Shapes, where: Path) -> AutoEncoderParams:
    """Sizes of a BFL autoencoder file. The latents' scale and shift, which no tensor tells, are FLUX.1's."""
    flux1, levels = AUTOENCODERS["flux1"], range(_count(shapes, "encoder.down"))
    both = ("weight", "bias")
    ch = _size(shapes, *((f"encoder.conv_in.{kind}", 0) for kind in both))
    layers = [f"block.0.{layer}.{kind}" for layer in ("conv1", "norm2", "conv2") for kind in both]
    widths = [_size(shapes, *((f"encoder.down.{i}.{layer}", 0) for layer in layers)) for i in levels]
    if not ch or not widths or any(not width or width % ch for width in widths):
        raise CheckpointError(
            f"{where}: the autoencoder's levels cannot be told from the tensors' shapes (channels: {ch or 'unknown'}, "
            f"then {', '.join(str(width or 'unknown') for width in widths) or 'none'})\n"
            "Pass params=AutoEncoderParams(…)."
        )
    with Naming(where):
        return AutoEncoderParams(
            resolution=flux1.resolution,
            in_channels=_size(shapes, ("encoder.conv_in.weight", 1)) or flux1.in_channels,
            ch=ch,
            out_ch=_size(shapes, *((f"decoder.conv_out.{kind}", 0) for kind in both)) or flux1.out_ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=max(_count(shapes, f"encoder.down.{i}.block") for i in levels),
            z_channels=_size(shapes, ("decoder.conv_in.weight", 1))
            or (_size(shapes, *((f"encoder.conv_out.{kind}", 0) for kind in both)) or 2 * flux1.z_channels) // 2,
            scale_factor=flux1.scale_factor,
            shift_factor=flux1.shift_factor,
        )


def _size(shapes: Shapes, *places: tuple[str, int]) -> int | None:
    """The size of the first (tensor, dimension) that is there."""
    return next((shapes[name][dim] for name, dim in places if len(shapes.get(name, ())) > dim), None)


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are; a gap is found later, as missing tensors."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _ratio(mlp: int, hidden: int) -> float:
    """The ratio whose product with `hidden` truncates to `mlp`: a plain quotient can fall just short of it."""
    ratio = mlp / hidden
    return ratio if int(hidden * ratio) == mlp else math.nextafter(ratio, math.inf)
