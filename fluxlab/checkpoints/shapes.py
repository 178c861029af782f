"""A network's sizes from the shapes of its tensors: a single file has nothing else."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.model.protocols import AutoEncoderSizes

Shapes = Mapping[str, tuple[int, ...]]

LEVELS = {r"^encoder\.down_blocks\.(\d+)\.resnets\.": r"encoder.down.\1.block."}
"""Our names of the tensors from which `levels` reads sizes, by patterns of Diffusers' names."""


def renamed_shapes(shapes: Shapes, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Diffusers' tensors under our names, where sizes are read from them. names: of a `Format`."""
    renamed = {}
    for name, shape in shapes.items():
        for pattern, new in names.items():
            changed, found = re.subn(pattern, new, name)
            if found:
                name = changed
                break
        renamed[name] = shape
    return renamed


def levels(shapes: Shapes, where: Path, usual: AutoEncoderSizes) -> dict[str, Any]:
    """Return the sizes that the tensors of an encoder and a decoder give. usual: for what they do not give."""
    every = range(count(shapes, "encoder.down"))
    both = ("weight", "bias")
    ch = size(shapes, *((f"encoder.conv_in.{kind}", 0) for kind in both))
    layers = [f"block.0.{layer}.{kind}" for layer in ("conv1", "norm2", "conv2") for kind in both]
    widths = [size(shapes, *((f"encoder.down.{i}.{layer}", 0) for layer in layers)) for i in every]
    if not ch or not widths or any(not width or width % ch for width in widths):
        raise CheckpointError(
            f"{where}: the tensors' shapes do not give the autoencoder's levels (channels: {ch or 'unknown'}, "
            f"then {', '.join(str(width or 'unknown') for width in widths) or 'none'})\n"
            f"Pass params={type(usual).__name__}(…)."
        )
    return {
        "resolution": usual.resolution,
        "in_channels": size(shapes, ("encoder.conv_in.weight", 1)) or usual.in_channels,
        "ch": ch,
        "out_ch": size(shapes, *((f"decoder.conv_out.{kind}", 0) for kind in both)) or usual.out_ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": max(count(shapes, f"encoder.down.{i}.block") for i in every),
        "z_channels": size(shapes, ("decoder.conv_in.weight", 1))
        or (size(shapes, *((f"encoder.conv_out.{kind}", 0) for kind in both)) or 2 * usual.z_channels) // 2,
    }


def size(shapes: Shapes, *dimensions: tuple[str, int]) -> int | None:
    """The size of the first (tensor, dimension) that exists."""
    return next((shapes[name][dim] for name, dim in dimensions if len(shapes.get(name, ())) > dim), None)


def count(shapes: Shapes, prefix: str) -> int:
    """The number of numbered modules. A gap is found later, as missing tensors."""
    numbers = [int(m[1]) for name in shapes if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def ratio(mlp: int, hidden: int) -> float:
    """The ratio whose product with `hidden` truncates to `mlp`: a plain quotient can fall just short of it."""
    ratio = mlp / hidden
    return ratio if int(hidden * ratio) == mlp else math.nextafter(ratio, math.inf)
