"""Atomic writes and hashes of files."""

import filecmp
import hashlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".part"


def write_atomic(path: Path, content: "bytes | str | Callable[[BinaryIO], None]", unless_equal: bool = False) -> None:
    """Write a file atomically: a reader, or a crash, sees either the old file or the complete new one.

    content: bytes, text (UTF-8), or a function that writes into the open file. A process that is killed leaves a hidden
    file in the same folder, which `sweep` removes. unless_equal: leave a file that already has this content as it is.
    """
    partial = path.with_name(
        f".{path.name}.{secrets.token_hex(6)}{PARTIAL}"
    )  # processes of two machines may share a pid
    try:
        with open(partial, "wb") as handle:
            if callable(content):
                content(handle)
            else:
                handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        if unless_equal and path.is_file() and filecmp.cmp(partial, path, shallow=False):
            partial.unlink()
            return
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make a rename in a folder durable, if the system supports that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the hidden files that killed processes left in a folder and its subfolders."""
    waiting = [str(folder)]
    while waiting:  # `rglob` lists a folder before it yields, and a large store has millions of files
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif _is_partial(entry.name):
                    Path(entry.path).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_in(folder: Path, left_out: Collection[str] = ()) -> Iterator[str]:
    """Yield the files below a folder, relative to it with slashes, in the order of their parts.

    Files that are being written are left out. Only the names in one folder at a time are in memory.
    left_out: subfolders of `folder` that are not read.
    """
    return _files(str(folder), left_out)


def _files(folder: str, left_out: Collection[str] = ()) -> Iterator[str]:
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
            elif not entry.is_file() or _is_partial(entry.name):
                continue
            names.append(entry.name)
    names.sort()
    for name in names:
        if name not in folders:
            yield name
        elif name not in left_out:
            yield from (f"{name}/{file}" for file in _files(os.path.join(folder, name)))


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)
