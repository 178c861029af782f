"""The sizes of a network, from a Diffusers config.json or a file's metadata, and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError, quantised
from fluxlab.errors import UserError
from fluxlab.families import FAMILIES
from fluxlab.model.protocols import AutoEncoderSizes, TransformerSizes

METADATA_KEY = "fluxlab_params"


def level_sizes(c: Mapping[str, Any], where: Path, what: str, **fixed: Any) -> dict[str, Any]:
    """Return the sizes that the autoencoders of all families have. fixed: settings that can have one value only."""
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


def level_config(p: AutoEncoderSizes, class_name: str) -> dict[str, Any]:
    """Return the settings that the autoencoders of all families have."""
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


def class_of(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the family and the part that a config.json belongs to, by its class; None for another model's."""
    name = config.get("_class_name")
    every = ((family.name, part, network) for family in FAMILIES.values() for part, network in family.networks.items())
    return next(((family, part) for family, part, network in every if network.diffusers == name), None)


def check_class(config: Mapping[str, Any], part: str, where: Path) -> str:
    """Return the family of a config.json of `part`.

    Raises `CheckpointError` if it belongs to another network, or to quantised weights.
    """
    found = class_of(config)
    if found is None or found[1] != part:
        expected = " or ".join(repr(family.networks[part].diffusers) for family in FAMILIES.values())
        titles = " or ".join(family.title for family in FAMILIES.values())
        raise CheckpointError(
            f"{where}: _class_name is {config.get('_class_name')!r}, expected {expected}\n"
            + (f"load_{found[1]} reads this one." if found else f"Pass a {titles} checkpoint.")
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        raise quantised(where, f"quantization_config {method.get('quant_method') if isinstance(method, dict) else ''}")
    return found[0]


def to_metadata(p: TransformerSizes | AutoEncoderSizes) -> str:
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


def complete(config: Mapping[str, Any], defaults: Mapping[str, Any], where: Path, family: str) -> dict[str, Any]:
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
