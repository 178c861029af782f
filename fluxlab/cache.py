"""The cache folder of the user: encoded prompts, and what was found in files that then need not be opened again.

All runs and sweep agents share it. Files are written atomically and checked when they are read; a damaged one counts as
missing. Beyond the size limit, those that were not used for the longest time are removed.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.errors import UserError
from fluxlab.files import PARTIAL, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

FOLDER_VARIABLE, SIZE_VARIABLE = "FLUXLAB_CACHE", "FLUXLAB_CACHE_GB"
NONE = "none"
LIMIT_GB = 4.0
"""Of the whole folder, unless `FLUXLAB_CACHE_GB` is set: about 1000 prompts of FLUX.1 at 512 tokens in bf16."""

_SETTLED = 2_000_000_000
"""Nanoseconds after its last change from which a file's times identify its content: some file systems round to 2 s."""
_ABANDONED = 3600  # seconds after which a partial file belongs to a process that was killed


@dataclass(frozen=True)
class Cache:
    """A folder and the bytes that it may hold."""

    folder: Path
    limit: int


def open_cache(setting: "str | PathLike[str] | None" = None) -> Cache | None:
    """Return the cache, or None for "none".

    setting: a folder or "none". None means `FLUXLAB_CACHE`, which holds either, and without it `fluxlab` in the cache
    folder of the platform: `XDG_CACHE_HOME`, `~/.cache`, `~/Library/Caches` or `%LOCALAPPDATA%`. If that default cannot
    be written, there is no cache.

    Raises `UserError` for a folder that was named and cannot be written, and for a size that is not a number.
    """
    named = os.environ.get(FOLDER_VARIABLE) or None if setting is None else setting
    key = "cache" if setting is not None else FOLDER_VARIABLE
    if str(named) == NONE:
        return None
    folder = _default_folder() if named is None else Path(named).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "no permission to write", str(folder))
    except (OSError, RuntimeError) as error:
        if named is None:
            return None
        raise UserError(
            f"{key}={named}: cannot be written ({getattr(error, 'strerror', None) or error}); "
            f"name another folder, or {key}=none"
        ) from None
    return Cache(folder, _limit())


def read_tensors(cache: Cache, key: str) -> "dict[str, Tensor] | None":
    """Return the tensors stored under `key`, mapped from their file; None if they are missing or damaged."""
    from safetensors import SafetensorError, safe_open

    file = _tensor_file(cache, key)
    try:
        with safe_open(file, framework="pt") as handle:
            noted = (handle.metadata() or {}).get("sha256")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError):
        return None
    if noted != _digest(tensors):
        return None
    _touch(file)
    return tensors


def write_tensors(cache: Cache, key: str, tensors: "Mapping[str, Tensor]") -> None:
    """Store tensors under `key`. If the disk is full or the folder is gone, nothing is stored."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(cache, _tensor_file(cache, key), save(tensors, {"sha256": _digest(tensors)}))


def remembered(cache: Cache | None, kind: str, files: Sequence[Path], compute: Callable[[], Any], *given: Any) -> Any:
    """Return `compute()`, a JSON value that depends on the contents of `files` and on `given` only.

    It is computed once, and again when the size, times or inode of a file change.
    """
    if cache is None:
        return compute()
    paths = sorted(str(file.resolve()) for file in files)
    name = hashlib.sha256(json.dumps([kind, paths, given], sort_keys=True).encode()).hexdigest()[:32]
    note = cache.folder / "files" / f"{kind}-{name}.json"
    state = _state(paths)
    try:
        noted = json.loads(note.read_bytes())
        if noted["state"] == state:
            _touch(note)
            return noted["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = compute()
    newest = max((max(times[1:3]) for times in state), default=0)
    if state == _state(paths) and time.time_ns() - newest > _SETTLED:
        _write(cache, note, json.dumps({"files": paths, "state": state, "value": value}).encode())
    return value


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    if not home and sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA")
    if not home:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(home) / "fluxlab"


def _limit() -> int:
    text = os.environ.get(SIZE_VARIABLE) or str(LIMIT_GB)
    try:
        size = float(text)
        if not 0 < size < float("inf"):
            raise ValueError
    except ValueError:
        raise UserError(f"{SIZE_VARIABLE}={text}: expected a number of gigabytes above 0") from None
    return int(size * 1e9)


def _tensor_file(cache: Cache, key: str) -> Path:
    return cache.folder / "text" / f"{key}.safetensors"


def _digest(tensors: "Mapping[str, Tensor]") -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state(paths: Iterable[str]) -> list[list[int]]:
    every = [os.stat(path) for path in paths]
    return [[entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns, entry.st_ino] for entry in every]


def _touch(file: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(file)  # the time of last use, by which files are removed


def _write(cache: Cache, file: Path, content: bytes) -> None:
    with contextlib.suppress(OSError):  # another process may do the same, or remove the file
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
        _evict(cache)


def _evict(cache: Cache) -> None:
    """Remove the files that were not used for the longest time, until the folder is within its limit."""
    files, now = [], time.time()
    for kind in ("text", "files"):
        for entry in os.scandir(cache.folder / kind) if (cache.folder / kind).is_dir() else ():
            with contextlib.suppress(OSError):
                stat = entry.stat()
                if not entry.name.endswith(PARTIAL):
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif now - stat.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= cache.limit:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size
