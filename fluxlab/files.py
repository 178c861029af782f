"""Atomic writes and hashes of files."""

import filecmp
import hashlib
import os
import secrets
from collections.abc import Callable, Collection
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
                elif entry.name.startswith(".") and entry.name.endswith(PARTIAL):
                    Path(entry.path).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_in(folder: Path, left_out: Collection[str] = ()) -> list[str]:
    """Return the files below a folder, relative to it with slashes, in the order of their parts.

    left_out: subfolders of `folder` that are not read.
    """
    found = []
    for root, folders, files in os.walk(folder):
        if root == str(folder):
            folders[:] = [name for name in folders if name not in left_out]
        start = Path(root).relative_to(folder).as_posix()
        names = files if start == "." else [f"{start}/{name}" for name in files]
        found += [name for name in names if os.path.isfile(os.path.join(folder, name))]
    return sorted(found, key=lambda name: name.split("/"))
