"""`manifest.jsonl`: the size and sha256 of every file of a finished store."""

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from fluxlab.files import sha256_of

MANIFEST = "manifest.jsonl"
NOT_AS_LISTED = "it is not the file that manifest.jsonl lists"

BLOCK = 64
"""Lines that are read at once to find one."""

_DAMAGE = (ValueError, KeyError, TypeError)


class Manifest:
    """The manifest of a store as it was when this object was made, or none if the store has none.

    Its lines are in the order of `files_in`. Only the name and the place of every 64th are kept in memory: a large
    store has millions. The lines themselves are read from the file, which stays open.

    problem: why there is none, in words; "" if there is one.
    """

    def __init__(self, folder: Path):
        self.folder, self.problem = folder, ""
        self._file: BinaryIO | None = None
        self._firsts: list[str] = []  # of every block, the key of its first line
        self._bounds = array("q")  # where every block begins, and where the last one ends
        self._written = 0
        try:
            self._file = open(folder / MANIFEST, "rb")  # noqa: SIM115 it stays open
            self._written = os.fstat(self._file.fileno()).st_mtime_ns
            self._firsts, self._bounds = _blocks(self._file)
        except FileNotFoundError:
            self.problem = f"{MANIFEST} is missing"
        except (OSError, *_DAMAGE):
            self.problem = f"{MANIFEST} is damaged"

    @property
    def names(self) -> Iterator[str]:
        """The files that the manifest lists, relative to the folder."""
        for start, end in pairwise(self._bounds):
            for line in self._lines(start, end):
                yield _parsed(line)[0]

    def unchanged(self, name: str) -> bool:
        """Return whether a file has the listed size and is older than the manifest. It is not read."""
        entry = self._entry(name)
        if entry is None:
            return False
        try:
            found = os.stat(os.path.join(self._root, name))
        except OSError:
            return False
        return found.st_size == entry[0] and found.st_mtime_ns < self._written

    def changed(self, name: str) -> str:
        """Return how the content of a file differs from the manifest, in words; "" if it does not."""
        if self.problem:
            return self.problem
        try:
            entry = self._entry(name)
            if entry is None:
                return f"{MANIFEST} does not list it"
            return "" if entry[1] == sha256_of(self.folder / name) else NOT_AS_LISTED
        except FileNotFoundError:
            return "it is missing"

    def lines(self, names: Iterable[str], verify: bool) -> Iterable[str]:
        """Yield the manifest of the files `names` as they are now. Unless `verify`, only changed ones are hashed."""
        for name in names:
            file = self.folder / name
            entry = None if verify or not self.unchanged(name) else self._entry(name)
            sha256 = entry[1] if entry else sha256_of(file)
            yield json.dumps({"file": name, "bytes": file.stat().st_size, "sha256": sha256}) + "\n"

    def _entry(self, name: str) -> tuple[int, str] | None:
        """Return the listed size and sha256 of a file."""
        block = bisect_right(self._firsts, _key(name))
        if block == 0:
            return None
        quoted = json.dumps(name).encode()
        for line in self._lines(self._bounds[block - 1], self._bounds[block]):
            if quoted in line:
                listed, *entry = _parsed(line)
                if listed == name:
                    return tuple(entry)
        return None

    def _lines(self, start: int, end: int) -> list[bytes]:
        return os.pread(self._file.fileno(), end - start, start).splitlines()

    @cached_property
    def _root(self) -> str:
        return str(self.folder)


def _blocks(file: BinaryIO) -> tuple[list[str], array]:
    """Return the keys of the first lines of all blocks, and their bounds. Raises one of `_DAMAGE`."""
    firsts, bounds, place, last = [], array("q"), 0, ""
    for number, line in enumerate(file):
        key = _key(_parsed(line)[0])
        if key <= last:
            raise ValueError(f"{key!r} is listed behind {last!r}")
        if number % BLOCK == 0:
            firsts.append(key)
            bounds.append(place)
        place, last = place + len(line), key
    bounds.append(place)
    return firsts, bounds


def _key(name: str) -> str:
    """Return a text that is ordered as the parts of a file's name are."""
    return name.replace("/", "\0")


def _parsed(line: bytes) -> tuple[str, int, str]:
    """Return a line's file, size and sha256. Raises one of `_DAMAGE`."""
    entry = json.loads(line)
    return entry["file"], int(entry["bytes"]), bytes.fromhex(entry["sha256"]).hex()
