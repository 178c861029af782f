"""Atomic writes and hashes of files, and lists of files."""

import filecmp
import hashlib
import heapq
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO

PARTIAL = ".part"

AT_ONCE = 1 << 15
"""Texts that are sorted in memory, 3 MB of file names."""


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


def has_content(file: Path, parts: Iterable[bytes]) -> bool:
    """Return whether a file exists and has the content that `parts` make, which are read until they differ."""
    try:
        with open(file, "rb") as handle:
            return all(handle.read(len(part)) == part for part in parts) and not handle.read(1)
    except FileNotFoundError:
        return False


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

    Files that are being written are left out. Memory does not grow with the number of files (`in_order`).
    left_out: subfolders of `folder` that are not read.
    """
    return _files(str(folder), left_out)


def _files(folder: str, left_out: Collection[str] = ()) -> Iterator[str]:
    folders: set[str] = set()
    for name in in_order(_names(folder, folders)):  # which reads all names before it yields the first
        if name not in folders:
            yield name
        elif name not in left_out:
            yield from (f"{name}/{file}" for file in _files(os.path.join(folder, name)))


def _names(folder: str, folders: set[str]) -> Iterator[str]:
    """Yield the names of the files and folders in a folder, and add those of folders to `folders`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
            elif not entry.is_file() or _is_partial(entry.name):
                continue
            yield entry.name


def in_order(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in order. At most `AT_ONCE` are in memory: of more, sorted parts wait in a temporary file."""
    texts, starts = iter(texts), []
    with tempfile.SpooledTemporaryFile(1) as file:  # on the disk from the first part on
        while len(part := sorted(islice(texts, AT_ONCE))) == AT_ONCE:
            starts.append(file.tell())
            with naming_temporary_folder():
                for first in range(0, AT_ONCE, 64):
                    file.write(json.dumps(part[first : first + 64]).encode() + b"\n")
                file.flush()
        yield from heapq.merge(part, *(_waiting(file, start) for start in starts))


def _waiting(file: IO[bytes], start: int) -> Iterator[str]:
    """Yield the `AT_ONCE` texts that `in_order` has written from `start` on."""
    for _ in range(0, AT_ONCE, 64):
        file.seek(start)  # other parts are read from the same file
        line = file.readline()
        start = file.tell()
        yield from json.loads(line)


@contextmanager
def naming_temporary_folder() -> Iterator[None]:
    """Let an error of writing a temporary file, which has no name, name the folder that may be full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or tempfile.gettempdir()
        raise


def left_over(texts: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Yield the texts that are not among `others`. Both are in order. `others` are not read if there is no text."""
    others, other = iter(others), ""
    for text in texts:
        while other is not None and other < text:
            other = next(others, None)
        if text != other:
            yield text


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL)
