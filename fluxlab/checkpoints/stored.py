"""A model as the headers of its files tell it: sizes, parameters, dtypes. No weights are read, nothing is fetched."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import Entry, open_tensors, read_json, weight_files
from fluxlab.checkpoints.finding import STEM, find_network, networks, no_network, resolve
from fluxlab.checkpoints.hub import is_hub_id
from fluxlab.checkpoints.params import METADATA_KEY, autoencoder_params, from_metadata, transformer_params
from fluxlab.checkpoints.shapes import autoencoder_params_from_shapes, transformer_params_from_shapes
from fluxlab.config import ModelRow, find_row, model_names
from fluxlab.errors import UserError
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, AutoEncoder, AutoEncoderParams, Flux, FluxParams

ENCODERS = {"clip": ("text_encoder", "tokenizer"), "t5": ("text_encoder_2", "tokenizer_2")}
"""Folders of a text encoder and of its tokenizer."""

_PUBLISHED = {"clip": 123_060_480, "t5": 4_762_310_656}  # parameters of FLUX.1's
_FIRST = ("img_in.weight", "x_embedder.weight", "encoder.conv_in.weight")
_NETWORKS = {  # class, sizes from a config.json, sizes from tensors' shapes
    "transformer": (FluxParams, transformer_params, transformer_params_from_shapes),
    "autoencoder": (AutoEncoderParams, autoencoder_params, autoencoder_params_from_shapes),
}
_FOLDERS = {
    "transformer": [("transformer", STEM)],
    "autoencoder": [("vae", STEM)],
    "text": [("text_encoder", "model"), ("text_encoder_2", "model")],
}


@dataclass(frozen=True)
class Stored:
    """A network as the headers of its files tell it. parameters: how many of each dtype. dtype: the first layer's.
    files: none for a network that is still to be fetched. params: None for a text encoder.
    """

    files: tuple[Path, ...]
    tensors: int
    parameters: Counter
    dtype: torch.dtype
    params: FluxParams | AutoEncoderParams | None = None

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Once loaded as `dtype`; None: as stored."""
        return sum(n * (dtype or own).itemsize for own, n in self.parameters.items())


def here(row: ModelRow) -> bool:
    """Whether all files of a row's model are on this machine, so that nothing has to be fetched."""
    return stored(row) is not None


def stored(row: ModelRow) -> dict[str, Stored] | None:
    """The row's transformer, autoencoder, clip and t5, from headers; None if some are still to be fetched.

    Raises `CheckpointError` for what is missing or damaged.
    """
    paths = {"transformer": row.path, "autoencoder": row.autoencoder or row.path, "text": row.text or row.path}
    at = {part: local(path, part, row.variant) for part, path in paths.items()}
    if None in at.values():
        return None
    found = {part: _network(part, at[part], row.variant) for part in _NETWORKS}
    if not (at["text"] / "text_encoder_2").is_dir():
        raise CheckpointError(f"{paths['text']}: holds no text encoders; pass text=, a Diffusers folder or hub id")
    return found | {name: _encoder(at["text"] / folder, row.variant) for name, (folder, _) in ENCODERS.items()}


def published(row: ModelRow) -> dict[str, Stored]:
    """The same of a model of `configs/model` that is still to be fetched: FLUX.1's sizes, in bf16.

    Raises `UserError` for a model of which no sizes are known.
    """
    names = {find_row(name).path: name for name in model_names() if name in TRANSFORMERS}
    if row.path not in names:
        raise UserError(f"{row.path}: not on this machine, and its sizes are unknown; fetch it: hf download {row.path}")
    sizes = {"transformer": TRANSFORMERS[names[row.path]], "autoencoder": AUTOENCODERS["flux1"]}
    shapes = {part: [weight.numel() for weight in on_meta(params).parameters()] for part, params in sizes.items()}
    counts = {**shapes, **{part: [count] for part, count in _PUBLISHED.items()}}
    bf16 = torch.bfloat16
    return {
        part: Stored((), len(found), Counter({bf16: sum(found)}), bf16, sizes.get(part))
        for part, found in counts.items()
    }


def on_meta(params: FluxParams | AutoEncoderParams) -> nn.Module:
    """The network of these sizes, without weights."""
    with torch.device("meta"):
        return Flux(params) if isinstance(params, FluxParams) else AutoEncoder(params)


def local(path: str, part: str, variant: str | None) -> Path | None:
    """`path` on this machine; None for a hub id of which `part` is still to be fetched."""
    if Path(path).expanduser().exists() or not is_hub_id(path):
        return resolve(path, (), variant)
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = path.partition("@")
    owner, name, *file = repo.split("/", 2)
    wanted = file[0] if file else "model_index.json"
    found = try_to_load_from_cache(f"{owner}/{name}", wanted, revision=revision or None)
    if not isinstance(found, str) or file:
        return Path(found) if isinstance(found, str) else None
    try:
        for folder, stem in _FOLDERS[part]:
            weight_files(Path(found).parent / folder, stem, variant)
    except (CheckpointError, OSError):
        return None
    return Path(found).parent


def _network(part: str, path: Path, variant: str | None) -> Stored:
    cls, from_config, from_shapes = _NETWORKS[part]
    net = find_network(path, part, variant)
    entries, metadata = open_tensors(net.files)
    if net.layout == "diffusers":
        params = from_config(read_json(net.path / "config.json"), net.path / "config.json")
    else:
        if part not in networks(entries):
            raise no_network(net.path, part, entries)
        prefix = networks(entries)[part]
        entries = {name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}
        shapes = {name: entry.shape for name, entry in entries.items()}
        known = METADATA_KEY in metadata
        params = from_metadata(cls, metadata[METADATA_KEY], net.path) if known else from_shapes(shapes, net.path)
    if getattr(params, "depth", 0) + getattr(params, "depth_single_blocks", 0) > len(entries):
        raise CheckpointError(f"{net.path}: more blocks by its sizes than the {len(entries)} tensors it holds")
    first = next((entries[name].dtype for name in _FIRST if name in entries), next(iter(entries.values())).dtype)
    return Stored(tuple(net.files), len(entries), _counted(entries), first, params)


def _encoder(folder: Path, variant: str | None) -> Stored:
    files, config = weight_files(folder, "model", variant), read_json(folder / "config.json")
    entries, _ = open_tensors(files)
    told = config.get("dtype") or config.get("torch_dtype")  # transformers goes by it, then by the first tensor
    first = getattr(torch, told) if told else next(iter(entries.values())).dtype
    return Stored(tuple(files), len(entries), _counted(entries), first)


def _counted(entries: dict[str, Entry]) -> Counter:
    counted: Counter = Counter()
    for entry in entries.values():
        counted[entry.dtype] += math.prod(entry.shape)
    return counted
