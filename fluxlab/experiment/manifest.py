"""`manifest.jsonl`: the size and sha256 of every file of a finished store."""

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from fluxlab.files import sha256_of

MANIFEST = "manifest.jsonl"
NOT_AS_LISTED = "it is not the file that manifest.jsonl lists"


class Manifest:
    """The manifest of a store as it was when this object was made, or none if the store has none.

    problem: why there is none, in words; "" if there is one.
    """

    def __init__(self, folder: Path):
        self.folder, self.problem = folder, ""
        self._entries: dict[str, tuple[int, bytes]] = {}
        self._written = 0
        try:
            with open(folder / MANIFEST, encoding="utf-8") as lines:
                self._written = os.fstat(lines.fileno()).st_mtime_ns
                for line in lines:
                    entry = json.loads(line)
                    self._entries[entry["file"]] = int(entry["bytes"]), bytes.fromhex(entry["sha256"])
        except FileNotFoundError:
            self.problem = f"{MANIFEST} is missing"
        except (OSError, ValueError, KeyError, TypeError):
            self._entries, self.problem = {}, f"{MANIFEST} is damaged"

    @property
    def names(self) -> list[str]:
        """The files that the manifest lists, relative to the folder."""
        return list(self._entries)

    def unchanged(self, name: str) -> bool:
        """Return whether a file has the listed size and is older than the manifest. It is not read."""
        entry = self._entries.get(name)
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
            if name not in self._entries:
                return f"{MANIFEST} does not list it"
            return "" if self._entries[name][1].hex() == sha256_of(self.folder / name) else NOT_AS_LISTED
        except FileNotFoundError:
            return "it is missing"

    def lines(self, names: Iterable[str], verify: bool) -> Iterable[str]:
        """Yield the manifest of the files `names` as they are now. Unless `verify`, only changed ones are hashed."""
        for name in names:
            file = self.folder / name
            known = not verify and self.unchanged(name)
            sha256 = self._entries[name][1].hex() if known else sha256_of(file)
            yield json.dumps({"file": name, "bytes": file.stat().st_size, "sha256": sha256}) + "\n"

    @cached_property
    def _root(self) -> str:
        return str(self.folder)
