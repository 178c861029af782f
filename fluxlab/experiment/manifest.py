"""`manifest.jsonl`: the size and sha256 of every file of a finished store."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fluxlab.files import sha256_of

MANIFEST = "manifest.jsonl"
NOT_AS_LISTED = "it is not the file that manifest.jsonl lists"

_DAMAGE = (ValueError, KeyError, TypeError)


class Manifest:
    """The manifest of a store as it was when this object was made, or none if the store has none.

    Only the place of each line is kept in memory, 16 bytes per file: a large store has millions. The lines themselves
    are read from the file, which stays open.

    problem: why there is none, in words; "" if there is one.
    """

    def __init__(self, folder: Path):
        self.folder, self.problem = folder, ""
        self._lines: BinaryIO | None = None
        self._hashes, self._places = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._written = 0
        hashes, places = array("q"), array("q")
        try:
            self._lines = open(folder / MANIFEST, "rb")  # noqa: SIM115 it stays open
            self._written = os.fstat(self._lines.fileno()).st_mtime_ns
            place = 0
            for line in self._lines:
                hashes.append(hash(_parsed(line)[0]))
                places.append(place)
                place += len(line)
        except FileNotFoundError:
            self.problem = f"{MANIFEST} is missing"
        except (OSError, *_DAMAGE):
            self._lines, self.problem = None, f"{MANIFEST} is damaged"
        if self._lines:
            order = np.argsort(hashes, kind="stable")
            self._hashes, self._places = np.array(hashes)[order], np.array(places)[order]

    @property
    def names(self) -> Iterator[str]:
        """The files that the manifest lists, relative to the folder."""
        for place in np.sort(self._places):
            yield self._line(place)[0]

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
        """Return the listed size and sha256 of a file; of several lines the last one."""
        first, end = (int(np.searchsorted(self._hashes, hash(name), side)) for side in ("left", "right"))
        for place in self._places[first:end][::-1]:
            listed, *entry = self._line(place)
            if listed == name:
                return tuple(entry)
        return None

    def _line(self, place: int) -> tuple[str, int, str]:
        self._lines.seek(place)
        return _parsed(self._lines.readline())

    @cached_property
    def _root(self) -> str:
        return str(self.folder)


def _parsed(line: bytes) -> tuple[str, int, str]:
    """Return a line's file, size and sha256. Raises one of `_DAMAGE`."""
    entry = json.loads(line)
    return entry["file"], int(entry["bytes"]), bytes.fromhex(entry["sha256"]).hex()
