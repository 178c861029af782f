"""A model as the headers of its files describe it: sizes, parameters, dtypes. Nothing is fetched."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxlab.cache import Cache
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import read_json, weight_files
from fluxlab.checkpoints.finding import STEM, Found, find, resolve
from fluxlab.checkpoints.headers import Stored, described
from fluxlab.checkpoints.hub import is_hub_id
from fluxlab.checkpoints.networks import AUTOENCODER, TRANSFORMER, Params, family_at, open_network
from fluxlab.config import ModelRow, find_row, model_names
from fluxlab.errors import UserError
from fluxlab.families import FAMILIES, architecture_of, family_of

_FOLDERS = {
    "transformer": [("transformer", STEM)],
    "autoencoder": [("vae", STEM)],
    "text": [("text_encoder", "model"), ("text_encoder_2", "model")],
    "lora": [],
}


def is_local(row: ModelRow) -> bool:
    """Return whether all files of a row's model are on this machine, so that nothing has to be fetched."""
    return stored(row) is not None


def stored(row: ModelRow, cache: Cache | None = None) -> dict[str, Stored] | None:
    """Return the row's transformer, autoencoder and text encoders, from headers; None if some are still to be fetched.

    With a cache, files of text encoders in single files are not opened again until their size or times change. Raises
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
        net = open_network(part, roots[part], row.variant)
        parts[part] = described(net.files, net.entries.values(), net.params)
    text = family_of(parts[TRANSFORMER].params).text_files()
    return parts | text.stored(roots["text"], row, cache)


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
    family = family_at(found.path, row.variant)
    text = family.text_files()
    needs = {
        "autoencoder": ({"autoencoder"}, "autoencoder", "ae.safetensors or a Diffusers folder"),
        "text": ({"clip", "t5"}, text.TITLE, f"{text.PLACES} of {family.title}"),
    }
    for part, (networks, title, places) in needs.items():
        if getattr(row, part) is None and not networks <= found.parts:
            raise CheckpointError(
                f"{row.path}: holds no {title}; pass {part}=, {places}\n(on the command line model.{part}=…)"
            )
    return {part: getattr(row, part) or found.path for part in needs}


def published(row: ModelRow) -> dict[str, Stored]:
    """Return the same for a model of `configs/model` that is still to be fetched: its published sizes, in bf16.

    Raises `UserError` for a model whose sizes are unknown.
    """
    known = {name: family for family in FAMILIES.values() for name in family.transformer.published}
    names = {find_row(name).path: name for name in model_names() if name in known}
    if row.path not in names:
        raise UserError(f"{row.path}: not on this machine, and its sizes are unknown; fetch it: hf download {row.path}")
    name = names[row.path]
    family = known[name]
    (autoencoder,) = family.autoencoder.published.values()
    sizes = {"transformer": family.transformer.published[name], "autoencoder": autoencoder}
    text = {kind: count for kind, (count, _) in family.published_text(name).items()}
    layers = {kind: layer for kind, (_, layer) in family.published_text(name).items()}
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
            if folder == "text_encoder_2" and folder not in index:  # some models have one text encoder
                continue
            weight_files(Path(cached).parent / folder, stem, variant)
    except (CheckpointError, OSError):
        return None
    return Path(cached).parent
