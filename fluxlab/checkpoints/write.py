"""Write checkpoints, one tensor at a time. An interrupted write never leaves a partial file."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import COMPUTE_DTYPES
from fluxlab.checkpoints.finding import STEM
from fluxlab.checkpoints.formats import format_of
from fluxlab.checkpoints.keys import Piece, their_shapes, to_theirs
from fluxlab.checkpoints.memory import ALIGN, as_bytes
from fluxlab.checkpoints.params import METADATA_KEY, to_metadata
from fluxlab.files import sync
from fluxlab.model import AutoEncoder
from fluxlab.model.protocols import Transformer

MAX_SHARD_SIZE = 10 * 10**9
_NAMES = {dtype: name for name, dtype in COMPUTE_DTYPES.items()} | {torch.int64: "I64"}  # of a batch norm's counter
_Tensors = dict[str, tuple[torch.dtype, tuple[int, ...], list[Tensor]]]
"""For each tensor to write: its dtype, its shape, and the blocks of rows that form it."""


def save_transformer(
    model: Transformer, path: "str | PathLike[str]", layout: str = "bfl", *, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Write a transformer as one file of the original layout ("bfl") or as a "diffusers" folder.

    path: a `.safetensors` file, or the folder for config.json and weights (for a pipeline: its `transformer/`). Dtypes
    are kept. A bfl file has the sizes in its metadata. max_shard_size: bytes per file of a folder. An interrupted write
    leaves what was there before. Raises `CheckpointError` for a path of the other layout, sizes that Diffusers does not
    have, and a full disk.
    """
    _save(model, path, layout, max_shard_size)


def save_autoencoder(
    model: AutoEncoder,
    path: "str | PathLike[str]",
    layout: str = "bfl",
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write an autoencoder, as `save_transformer` does. A pipeline has it in `vae/`."""
    _save(model, path, layout, max_shard_size)


def _save(model: nn.Module, path: "str | PathLike[str]", layout: str, max_shard_size: int) -> None:
    path = Path(path).expanduser()
    if layout not in ("bfl", "diffusers"):
        raise CheckpointError(f"layout {layout!r}: expected 'bfl' (one file) or 'diffusers' (a folder)")
    if max_shard_size <= 0:
        raise CheckpointError(f"max_shard_size {max_shard_size}: expected a positive number of bytes")
    _check_target(path, layout)
    state = model.state_dict()
    unsupported = [
        f"{name} is {t.dtype} on {t.device}" for name, t in state.items() if t.dtype not in _NAMES or t.is_meta
    ]
    if unsupported:
        raise CheckpointError(f"{path}: cannot write this model: {unsupported[0]}")
    try:
        if layout == "bfl":
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: (t.dtype, tuple(t.shape), [t]) for name, t in state.items()}
            with _atomic(path) as file:
                _write_tensors(file, tensors, {METADATA_KEY: to_metadata(model.params)})
        else:
            form = format_of(model.params)
            settings = form.to_config(model.params)
            path.mkdir(parents=True, exist_ok=True)
            _write_folder(path, _their_tensors(state, form.pieces(model.params)), settings, max_shard_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); nothing was replaced") from error


def _check_target(path: Path, layout: str) -> None:
    if layout == "bfl" and (path.suffix != ".safetensors" or path.is_dir()):
        raise CheckpointError(f"{path}: layout 'bfl' is one file; pass a path that ends in .safetensors")
    if layout == "diffusers" and (path.suffix == ".safetensors" or path.is_file()):
        raise CheckpointError(f"{path}: layout 'diffusers' is a folder; pass a path that does not end in .safetensors")


def _their_tensors(state: Mapping[str, Tensor], pieces: list[Piece]) -> _Tensors:
    shapes = their_shapes(pieces, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return {
        theirs: (
            state[parts[0][0]].dtype,
            shapes[theirs],
            [state[ours] if rows is None else state[ours][slice(*rows)] for ours, rows in parts],
        )
        for theirs, parts in to_theirs(pieces).items()
    }


def _write_folder(folder: Path, tensors: _Tensors, settings: dict[str, Any], max_shard_size: int) -> None:
    """Write the weights under temporary names, then remove the old files and rename the new ones, config.json last.

    In between, the folder has no config.json, so that a mixture of two models is never loaded.
    """
    shards = _split(tensors, max_shard_size)
    names = [f"{STEM}.safetensors"]
    if len(shards) > 1:
        names = [f"{STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    written: list[tuple[Path, Path]] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            with _temporary(folder / name) as (file, temporary):
                _write_tensors(file, shard, {})
            written.append((temporary, folder / name))
        for name, value in _json_files(shards, names, settings).items():
            with _temporary(folder / name) as (file, temporary):
                file.write(json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")
            written.append((temporary, folder / name))
        for old in [folder / "config.json", *folder.glob(f"{STEM}*")]:
            if re.fullmatch(rf"config\.json|{STEM}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name):
                old.unlink(missing_ok=True)
        for temporary, name in written:
            os.replace(temporary, name)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
    sync(folder)


def _json_files(shards: list[_Tensors], names: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    if len(shards) > 1:
        total = sum(_size(dtype, shape) for shard in shards for dtype, shape, _ in shard.values())
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        files[f"{STEM}.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {**files, "config.json": settings}


def _split(tensors: _Tensors, max_shard_size: int) -> list[_Tensors]:
    shards: list[_Tensors] = [{}]
    size = 0
    for name, (dtype, shape, parts) in tensors.items():
        more = _size(dtype, shape)
        if shards[-1] and size + more > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape, parts)
        size += more
    return shards


def _write_tensors(file: BinaryIO, tensors: _Tensors, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Large alignments come first and the header is padded, so that tensors are aligned."""
    order = sorted(tensors, key=lambda name: (_size(*tensors[name][:2]) % ALIGN != 0, -tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        end = at + _size(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for part in tensors[name][2]:
            file.write(as_bytes(part))


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def allow_by_umask(file: Path) -> None:
    """Give a file the permissions that a new one gets."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    with _temporary(path) as (file, temporary):
        yield file
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary file next to `path`. It is on the disk when the block ends, and removed if an error ends it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
        allow_by_umask(temporary)  # mkstemp's 0600 would hide a shared checkpoint from colleagues
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
