"""The store, also called run folder: the only thing that figures, reports and trackers read.

    experiment.yaml   what was requested, the settings it was computed with, versions
    cells/            <key>.png and <key>.json for every cell; the JSON is written last
    references/       the same for the controls that are not cells: noise floor, another seed
    attention/        <digest of the capture>/<key>.safetensors for every cell; index.json lists them
    metrics.csv       one row per cell, in the experiment's order; references.csv, summary.csv
    grid.png          variants × (prompt, seed)
    manifest.jsonl    the size and sha256 of every file

Every write is atomic. One run at a time has the lock, or the shards of one experiment have it together.
"""

import errno
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fluxlab.errors import UserError
from fluxlab.experiment.cells import REQUIRED, Cell, Settings
from fluxlab.experiment.locks import FolderLock, is_lock, locked, make_folder, running_shards
from fluxlab.experiment.manifest import MANIFEST, NOT_AS_LISTED, Manifest
from fluxlab.experiment.shards import Shard
from fluxlab.experiment.spec import SCHEMA, Experiment
from fluxlab.files import files_in, in_order, left_over, sha256_of, sweep, write_atomic
from fluxlab.probes import Captured, is_complete
from fluxlab.probes import write as write_arrays

if TYPE_CHECKING:
    from PIL import Image

EXPERIMENT = "experiment.yaml"
CELLS, REFERENCES, ATTENTION = "cells", "references", "attention"
TRACKERS = ("wandb",)
"""Folders that trackers write into; they are not part of the manifest."""


class Store:
    """A run folder, open for one process. Made by `open_store`."""

    def __init__(self, path: Path, lock: FolderLock | None = None, verify: bool = False):
        """verify: read every file to tell whether it is complete, also those that are as old as the manifest says."""
        self.path, self.lock, self.verify = path, lock, verify
        self.read()

    def read(self) -> None:
        """Read experiment.yaml, which another shard may have written."""
        self.record: dict[str, Any] = {}
        self.name = ""
        if (self.path / EXPERIMENT).is_file():
            try:
                self.record = read_experiment(self.path)
                self.name = self.record["name"]
            except DamagedRecordError as error:
                self.name = error.name
                if not self.name:  # without it another experiment's images could be taken over
                    raise

    @property
    def damaged(self) -> bool:
        """Whether experiment.yaml cannot be read, or is not the file that the manifest lists."""
        return bool(self.name) and (not self.record or self.manifest.changed(EXPERIMENT) == NOT_AS_LISTED)

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest as it was when the store was opened, or sealed."""
        return Manifest(self.path)

    def settings(self) -> Settings | None:
        """Return the settings that the images were computed with; None for a new store."""
        return Settings(**self.record["settings"]) if self.record else None

    def write_experiment(
        self, experiment: Experiment, settings: Settings, versions: dict[str, str], command: str
    ) -> None:
        """Write experiment.yaml."""
        self.record = {
            "schema": SCHEMA,
            "name": experiment.name,
            "caption": experiment.caption,
            "command": command,
            "digest": experiment.digest,
            "variants": {
                name: {"program": program.to_config(), "describe": experiment.describe(name), "digest": program.digest}
                for name, program in experiment.variants.items()
            },
            "request": experiment.request(),
            "settings": settings.record(),
            "versions": versions,
        }
        text = yaml.safe_dump(self.record, sort_keys=False, allow_unicode=True, width=120)
        write_atomic(self.path / EXPERIMENT, text)

    def png(self, key: str, folder: str = CELLS) -> Path:
        """Return the path of a cell's image, whether or not it exists."""
        return self.path / folder / f"{key}.png"

    def has(self, cell: Cell, folder: str = CELLS) -> bool:
        """Return whether the image of a cell is complete. It is not read if it is unchanged since the manifest."""
        names = [f"{folder}/{cell.key}.json", f"{folder}/{cell.key}.png"]
        if not self.verify and all(map(self.manifest.unchanged, names)):
            return True
        if self.verify and any(self.manifest.changed(name) == NOT_AS_LISTED for name in names):
            return False
        file = self.png(cell.key, folder)
        try:
            notes = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            return notes["sha256"] == sha256_of(file)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def put(self, cell: Cell, image: "Image.Image", notes: dict[str, Any], folder: str = CELLS) -> Path:
        """Write the image of a cell, then its JSON. A complete cell is left as it is. Returns the image's path."""
        file = self.png(cell.key, folder)
        if self.has(cell, folder):
            return file
        file.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        image.save(png, format="png")
        content = png.getvalue()
        write_atomic(file, content)
        record = {
            "variant": cell.variant,
            "prompt": cell.prompt,
            "seed": cell.seed,
            "program": cell.program.to_config(mask_digests=True),
            "digest": cell.program.digest,
            "sha256": hashlib.sha256(content).hexdigest(),
            **notes,
        }
        write_atomic(file.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return file

    def arrays(self, key: str, captures: str) -> Path:
        """Return the path of a cell's attention arrays. captures: the digest of the capture."""
        return self.path / ATTENTION / captures / f"{key}.safetensors"

    def has_arrays(self, cell: Cell, captures: str) -> bool:
        """Return whether the attention arrays of a cell are complete, and with `verify`, as the manifest lists them."""
        name = f"{ATTENTION}/{captures}/{cell.key}.safetensors"
        if not self.verify and self.manifest.unchanged(name):
            return True
        return is_complete(self.path / name) and not (self.verify and self.manifest.changed(name) == NOT_AS_LISTED)

    def put_arrays(self, cell: Cell, captures: str, arrays: Mapping[str, Captured]) -> None:
        """Write the attention arrays of a cell. Complete ones are left as they are."""
        if not self.has_arrays(cell, captures):
            file = self.arrays(cell.key, captures)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(file, arrays)

    def other_cells(self, keys: Iterable[str]) -> dict[str, int]:
        """Return how many images of each variant are in `cells/` under a key that is not in `keys`."""
        counts: dict[str, int] = {}
        folder = self.path / CELLS
        files = files_in(folder) if folder.is_dir() else ()
        described = (name for name in files if name.endswith(".json") and "/" not in name)
        for name in left_over(described, in_order(f"{key}.json" for key in keys)):
            file = folder / name
            if file.with_suffix(".png").is_file():
                try:
                    variant = json.loads(file.read_text(encoding="utf-8"))["variant"]
                except (OSError, ValueError, KeyError, TypeError):
                    continue
                counts[variant] = counts.get(variant, 0) + 1
        return counts

    def write(self, name: str, content: "bytes | str | Iterable[str]") -> None:
        """Write a file. A file that already has this content is left as it is. Text may come in parts."""
        file = self.path / name
        if isinstance(content, bytes | str):
            new = content.encode() if isinstance(content, str) else content
            if not (file.is_file() and file.read_bytes() == new):
                write_atomic(file, new)
        else:
            write_atomic(file, lambda handle: handle.writelines(map(str.encode, content)), unless_equal=True)

    def remove(self, name: str) -> None:
        """Remove a file that is out of date."""
        (self.path / name).unlink(missing_ok=True)

    def seal(self) -> None:
        """Write the manifest: one line per file, sorted by name."""
        names = (name for name in files_in(self.path, TRACKERS) if name != MANIFEST and not is_lock(name))
        self.write(MANIFEST, self.manifest.lines(names, self.verify))
        del self.manifest

    def sealed(self, names: Collection[str]) -> bool:
        """Return whether experiment.yaml, the files `names`, and all drawn files are those that the manifest lists."""
        listed = self.manifest.names
        drawn = [n for n in listed if not (n.startswith((f"{CELLS}/", f"{REFERENCES}/")) or n.endswith(".safetensors"))]
        if not self.verify:
            drawn = [name for name in drawn if not self.manifest.unchanged(name)]
        return not any(self.manifest.changed(name) for name in dict.fromkeys((EXPERIMENT, *names, *drawn)))


def find_store(path: Path) -> Store | None:
    """Return the store at `path` for reading, or None for a new or empty folder.

    Raises `UserError` for a file, and for a folder with other things in it.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"out={path}: a file, expected a folder")
    if (path / EXPERIMENT).is_file():
        return Store(path)
    names = [p.name for p in path.iterdir() if p.name not in TRACKERS and not is_lock(p.name)]
    others = [name for name in names if not name.startswith(f".{EXPERIMENT}")]
    if others:
        raise UserError(
            f"out={path}: not a run folder, it contains {others[0]!r} and no {EXPERIMENT}; name a new or empty folder"
        )
    return None


@contextmanager
def open_store(path: Path, shard: Shard | None = None, verify: bool = False) -> Iterator[Store]:
    """Open the store at `path`, locked while the block runs. A new folder is created, and removed if it stays empty.

    shard: open it for a shard, next to which other shards may have it open. verify: see `Store`.

    Raises `UserError` for a folder with other things in it, a store of another schema, one that another process has
    open, and one that cannot be written.
    """
    entered = False
    try:
        find_store(path)
        make_folder(path)
        with locked(path, shard) as lock:
            entered = True
            if lock.alone:
                sweep(path)
            yield Store(path, lock, verify)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG):
            raise
        raise UserError(
            f"{error.filename or path}: {error.strerror}\n"
            "Finished images are kept. Free some space and run the same command again."
        ) from error
    finally:
        if entered:
            _remove_if_unused(path)


def _remove_if_unused(path: Path) -> None:
    """Remove the folder of a run that did not start."""
    if not (path / EXPERIMENT).exists() and not running_shards(path):
        with suppress(OSError):
            for file in path.iterdir():
                if is_lock(file.name):
                    file.unlink(missing_ok=True)
            path.rmdir()


class DamagedRecordError(UserError):
    """experiment.yaml cannot be read. name: the experiment's name if its line is complete, else ""."""

    def __init__(self, message: str, text: str = ""):
        super().__init__(message)
        line = re.search(r"^name: (\S+)\n", text, re.MULTILINE)
        self.name = line[1].strip("'\"") if line else ""


_KEYS = ("request", "settings", "name", "caption", "command", "digest", "variants", "versions")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first one, in C, is not in every PyYAML
_REMEDY = "run the command of this store again, or name another out= folder"


def read_experiment(path: Path) -> dict[str, Any]:
    """Return the content of experiment.yaml.

    Raises `DamagedRecordError` if it is damaged, and `UserError` if it is missing or of another schema.
    """
    file, text = path / EXPERIMENT, ""
    try:
        text = file.read_bytes().decode(errors="replace")
        record = yaml.load(text, _LOADER)
        schema = record["schema"]
    except FileNotFoundError:
        raise UserError(f"{path}: not a run folder, it contains no {EXPERIMENT}") from None
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedRecordError(f"{file}: cannot be read ({reason}); {_REMEDY}", text) from error
    if schema != SCHEMA:
        raise UserError(f"{file}: schema {schema}, but this version writes {SCHEMA}; name another out= folder")
    settings = record.get("settings")
    missing = [key for key in _KEYS if key not in record]
    missing += sorted(REQUIRED - set(settings if isinstance(settings, dict) else ()))
    if missing:
        raise DamagedRecordError(f"{file}: {missing[0]} is missing; {_REMEDY}", text)
    return record
