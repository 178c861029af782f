"""A model as the headers of its files describe it: sizes, parameters, dtypes. Nothing is fetched."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxlab.cache import Cache, remembered
from fluxlab.checkpoints.casting import majority
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import Entry, read_json, weight_files
from fluxlab.checkpoints.finding import STEM, Found, find, resolve
from fluxlab.checkpoints.hub import is_hub_id
from fluxlab.checkpoints.networks import AUTOENCODER, TRANSFORMER, Params, architecture_of, family_of, open_network
from fluxlab.checkpoints.recognise import is_counter
from fluxlab.checkpoints.text import open_encoders, text_files
from fluxlab.checkpoints.text2 import open_language_model
from fluxlab.config import ModelRow, find_row, model_names
from fluxlab.errors import UserError
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, TRANSFORMERS2, Flux2Params

_PUBLISHED = {"clip": 123_060_480, "t5": 4_762_310_656}  # parameters of FLUX.1's
# parameters, and those of the largest layer: the embeddings
_QWEN3_4B = ("qwen3", 4_022_468_096, 151936 * 2560)
_QWEN3_8B = ("qwen3", 8_190_735_360, 151936 * 4096)
_PUBLISHED2 = {
    "klein4b": _QWEN3_4B,
    "klein4b_base": _QWEN3_4B,
    "klein9b": _QWEN3_8B,
    "flux2dev": ("mistral3", 24_011_361_280, 131072 * 5120),
}
_LAYERS = {"clip": 49408 * 768, "t5": 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096}  # of their largest layers
_FOLDERS = {
    "transformer": [("transformer", STEM)],
    "autoencoder": [("vae", STEM)],
    "text": [("text_encoder", "model"), ("text_encoder_2", "model")],
    "lora": [],
}


@dataclass(frozen=True)
class Stored:
    """A network as the headers of its files describe it.

    parameters: how many the files hold of each dtype. dtype: what it is loaded as unless another is asked for.
    files: empty for a network that is still to be fetched. params: None for a text encoder.
    layer: parameters of a text encoder's largest layer.
    """

    files: tuple[Path, ...]
    tensors: int
    parameters: Counter
    dtype: torch.dtype
    params: Params | None = None
    layer: int = 0

    def size(self) -> int:
        """Return the bytes of its tensors in the files. An all-in-one file holds other networks too."""
        return sum(count * dtype.itemsize for dtype, count in self.parameters.items())

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Return the size in memory once loaded as `dtype`; None means the files' own."""
        return self.parameters.total() * (dtype or self.dtype).itemsize


def is_local(row: ModelRow) -> bool:
    """Return whether all files of a row's model are on this machine, so that nothing has to be fetched."""
    return stored(row) is not None


def stored(row: ModelRow, cache: Cache | None = None) -> dict[str, Stored] | None:
    """Return the row's transformer, autoencoder and text encoders, from headers; None if some are still to be fetched.

    With a cache, files of FLUX.1's text encoders are not opened again until their size or times change. Raises
    `CheckpointError` for what is missing or damaged.
    """
    paths = {"transformer": row.path, "autoencoder": row.autoencoder or row.path, "text": row.text or row.path}
    roots = {part: local(path, part, row.variant) for part, path in paths.items()}
    loras = [local(lora.path, "lora", None) for lora in row.lora or ()]
    if None in roots.values() or None in loras:
        return None
    part_paths(row, find(roots["transformer"], row.variant))
    parts = {}
    for part in (TRANSFORMER, AUTOENCODER):
        net = open_network(part, roots[part.name], row.variant)
        parts[part.name] = _stored(net.files, net.entries.values(), net.params)
    if isinstance(parts["transformer"].params, Flux2Params):
        model = open_language_model(roots["text"], row.variant)
        parts[model.kind] = _stored(model.files, model.entries.values())
        return parts
    return parts | _stored_encoders(roots["text"], row, cache)


def _stored_encoders(root: Path, row: ModelRow, cache: Cache | None) -> dict[str, Stored]:
    def read() -> dict[str, dict[str, Any]]:
        found = {}
        for encoder in open_encoders(root, row.variant, row.tokenizers):
            part = _stored(encoder.files, encoder.entries.values())
            found[encoder.part] = {
                "files": list(map(str, part.files)),
                "tensors": part.tensors,
                "parameters": {str(dtype).removeprefix("torch."): n for dtype, n in part.parameters.items()},
                "dtype": str(part.dtype).removeprefix("torch."),
                "layer": part.layer,
            }
        return found

    known = remembered(cache, "sizes", text_files(root), read, str(root), row.variant, row.tokenizers is None)
    return {
        part: Stored(
            tuple(map(Path, facts["files"])),
            facts["tensors"],
            Counter({getattr(torch, dtype): n for dtype, n in facts["parameters"].items()}),
            getattr(torch, facts["dtype"]),
            layer=facts["layer"],
        )
        for part, facts in known.items()
    }


def part_paths(row: ModelRow, found: Found) -> dict[str, Any]:
    """Return where "autoencoder" and "text" are.

    Raises `CheckpointError` if what was found at the row's path lacks one of them and the row does not name it.
    """
    if "transformer" not in found.parts:
        parts = "text encoders" if found.kind == "text" else "an autoencoder"
        key = "text" if found.kind == "text" else "autoencoder"
        raise CheckpointError(
            f"{row.path}: {parts}, not a transformer; pass the transformer's file, and this one as {key}="
        )
    flux2 = family_of(found.path, row.variant) == "flux2"
    helps = {
        "autoencoder": "ae.safetensors or a Diffusers folder",
        "text": "a Diffusers folder or a hub id of FLUX.2"
        if flux2
        else "a folder with clip_l.safetensors and t5xxl_fp16.safetensors, a Diffusers folder or a hub id of FLUX.1",
    }
    needs = {"autoencoder": {"autoencoder"}, "text": {"clip", "t5"}}
    for part, networks in needs.items():
        if getattr(row, part) is None and not networks <= found.parts:
            name = {"autoencoder": "autoencoder", "text": "language model" if flux2 else "text encoders"}[part]
            raise CheckpointError(
                f"{row.path}: holds no {name}; pass {part}=, {helps[part]}\n(on the command line model.{part}=…)"
            )
    return {part: getattr(row, part) or found.path for part in needs}


def published(row: ModelRow) -> dict[str, Stored]:
    """Return the same for a model of `configs/model` that is still to be fetched: FLUX.1's sizes, in bf16.

    Raises `UserError` for a model whose sizes are unknown.
    """
    known = {**TRANSFORMERS, **TRANSFORMERS2}
    names = {find_row(name).path: name for name in model_names() if name in known}
    if row.path not in names:
        raise UserError(f"{row.path}: not on this machine, and its sizes are unknown; fetch it: hf download {row.path}")
    name = names[row.path]
    flux2 = name in TRANSFORMERS2
    sizes = {"transformer": known[name], "autoencoder": AUTOENCODERS["flux2" if flux2 else "flux1"]}
    text, layers = _PUBLISHED, _LAYERS
    if flux2:
        kind, count, layer = _PUBLISHED2[name]
        text, layers = {kind: count}, {kind: layer}
    shapes = {part: [weight.numel() for weight in on_meta(params).parameters()] for part, params in sizes.items()}
    counts = {**shapes, **{part: [count] for part, count in text.items()}}
    bf16 = torch.bfloat16
    return {
        part: Stored((), len(numbers), Counter({bf16: sum(numbers)}), bf16, sizes.get(part), layers.get(part, 0))
        for part, numbers in counts.items()
    }


def on_meta(params: Params) -> nn.Module:
    """Return the network of these sizes, without weights."""
    with torch.device("meta"):
        return architecture_of(params).build(params)


def local(path: str, part: str, variant: str | None) -> Path | None:
    """Return `path` on this machine; None for a hub id of which `part` is still to be fetched."""
    if Path(path).expanduser().exists() or not is_hub_id(path):
        return resolve(path, (), variant)
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = path.partition("@")
    owner, name, *file = repo.split("/", 2)
    wanted = file[0] if file else "model_index.json"
    cached = try_to_load_from_cache(f"{owner}/{name}", wanted, revision=revision or None)
    if not isinstance(cached, str) or file:
        return Path(cached) if isinstance(cached, str) else None
    try:
        index = read_json(Path(cached))
        for folder, stem in _FOLDERS[part]:
            if folder == "text_encoder_2" and folder not in index:  # FLUX.2 has one text encoder
                continue
            weight_files(Path(cached).parent / folder, stem, variant)
    except (CheckpointError, OSError):
        return None
    return Path(cached).parent


def _stored(files: Iterable[Path], entries: Iterable[Entry], params: Params | None = None) -> Stored:
    entries = list(entries)
    parameters: Counter = Counter()
    for entry in entries:
        if not is_counter(entry.name):
            parameters[entry.dtype] += math.prod(entry.shape)
    layers: Counter = Counter()
    for entry in entries if params is None else ():
        layers[re.sub(r"(\.\d+)\..*", r"\1", entry.name)] += math.prod(entry.shape)
    return Stored(tuple(files), len(entries), parameters, majority(entries), params, max(layers.values(), default=0))
