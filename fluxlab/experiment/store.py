"""The run folder: the only thing that figures, reports and trackers read.

    experiment.yaml   what was asked for, how it was computed, with which versions
    cells/            <key>.png and <key>.json, a cell each; a cell is there once its JSON is
    references/       the same for pictures that are no cells: noise floor, another seed
    attention/        <digest of the capture>/<key>.safetensors, a cell's attention; index.json, which file is whose
    metrics.csv       a row a cell, in the experiment's order; references.csv, summary.csv
    grid.png          variants × (prompt, seed)
    manifest.jsonl    every file's sha256

Every write is atomic, and one process at a time holds the lock.
"""

import errno
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fluxlab.errors import UserError
from fluxlab.experiment.cells import Cell, Settings
from fluxlab.experiment.spec import SCHEMA, Experiment
from fluxlab.files import sha256_of, sweep, write_atomic
from fluxlab.probes import Captured
from fluxlab.probes import whole as is_whole
from fluxlab.probes import write as write_arrays

if TYPE_CHECKING:
    from PIL import Image

EXPERIMENT, MANIFEST, LOCK = "experiment.yaml", "manifest.jsonl", ".lock"
CELLS, REFERENCES, ATTENTION = "cells", "references", "attention"
TRACKERS = ("wandb",)  # folders that a tracker writes into while we look


class Store:
    """A run folder, open for one process. Made by `open_store`."""

    def __init__(self, path: Path):
        self.path = path
        self.record: dict[str, Any] = read_experiment(path) if (path / EXPERIMENT).is_file() else {}

    def settings(self) -> Settings | None:
        """How the pictures here were computed; None for a new store."""
        return Settings(**self.record["settings"]) if self.record else None

    def write_experiment(self, experiment: Experiment, settings: Settings, versions: dict, command: str) -> None:
        self.record = {
            "schema": SCHEMA,
            "name": experiment.name,
            "caption": experiment.caption,
            "command": command,
            "digest": experiment.digest,
            "variants": {
                name: {"program": program.to_config(), "describe": program.describe(), "digest": program.digest}
                for name, program in experiment.variants.items()
            },
            "request": experiment.request(),
            "settings": asdict(settings),
            "versions": versions,
        }
        text = yaml.safe_dump(self.record, sort_keys=False, allow_unicode=True, width=120)
        write_atomic(self.path / EXPERIMENT, text)

    def png(self, key: str, folder: str = CELLS) -> Path:
        return self.path / folder / f"{key}.png"

    def has(self, cell: Cell, folder: str = CELLS) -> bool:
        """Whether a cell's picture is there, whole."""
        file = self.png(cell.key, folder)
        try:
            told = json.loads(file.with_suffix(".json").read_text())
            return told["sha256"] == sha256_of(file)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def put(self, cell: Cell, image: "Image.Image", notes: dict[str, Any], folder: str = CELLS) -> Path:
        """Write a picture, then what it is. A cell that is there stays as it is."""
        file = self.png(cell.key, folder)
        if self.has(cell, folder):
            return file
        file.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        image.save(png, format="png")
        content = png.getvalue()
        write_atomic(file, content)
        told = {
            "variant": cell.variant,
            "prompt": cell.prompt,
            "seed": cell.seed,
            "program": cell.program.to_config(mask_digests=True),
            "digest": cell.program.digest,
            "sha256": hashlib.sha256(content).hexdigest(),
            **notes,
        }
        write_atomic(file.with_suffix(".json"), json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        return file

    def arrays(self, key: str, captures: str) -> Path:
        """Where the arrays of a cell lie; `captures` is the digest of what was looked at."""
        return self.path / ATTENTION / captures / f"{key}.safetensors"

    def has_arrays(self, cell: Cell, captures: str) -> bool:
        """Whether what a cell's attention was is there, whole."""
        return is_whole(self.arrays(cell.key, captures))

    def put_arrays(self, cell: Cell, captures: str, arrays: Mapping[str, Captured]) -> None:
        """Write what a cell's attention was. What is there stays as it is."""
        if not self.has_arrays(cell, captures):
            file = self.arrays(cell.key, captures)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(file, arrays)

    def write(self, name: str, content: "bytes | str") -> None:
        """Write a file unless it already holds just that: what is finished is never rewritten."""
        file = self.path / name
        new = content.encode() if isinstance(content, str) else content
        if not (file.is_file() and file.read_bytes() == new):
            write_atomic(file, new)

    def remove(self, name: str) -> None:
        """Remove a file that says what is no longer so."""
        (self.path / name).unlink(missing_ok=True)

    def seal(self) -> None:
        """Write the manifest: a line a file, in the order of their names."""
        tops = [p for p in self.path.iterdir() if p.name not in (MANIFEST, LOCK, *TRACKERS)]
        files = sorted(p for top in tops for p in (top, *top.rglob("*")) if p.is_file())
        lines = [
            json.dumps({"file": p.relative_to(self.path).as_posix(), "bytes": p.stat().st_size, "sha256": sha256_of(p)})
            for p in files
        ]
        self.write(MANIFEST, "".join(line + "\n" for line in lines))

    def sealed(self, names: tuple[str, ...]) -> bool:
        """Whether the manifest is there and says of every one of `names` what lies in the folder."""
        try:
            lines = [json.loads(line) for line in (self.path / MANIFEST).read_text().splitlines()]
            told = {line["file"]: line["sha256"] for line in lines}
            return all(told.get(name) == sha256_of(self.path / name) for name in (EXPERIMENT, *names))
        except (OSError, ValueError, KeyError, TypeError):
            return False


def look(path: Path) -> Store | None:
    """The store at `path` to look at, None where there is none yet. Raises `UserError` for what is no run folder."""
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"out={path}: a file; name a folder")
    if (path / EXPERIMENT).is_file():
        return Store(path)
    names = [p.name for p in path.iterdir() if p.name not in (LOCK, *TRACKERS)]
    others = [name for name in names if not name.startswith(f".{EXPERIMENT}")]
    if others:
        raise UserError(
            f"out={path}: holds {others[0]!r} and no {EXPERIMENT}, so it is no run folder; name a new or empty one"
        )
    return None


@contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """The store at `path`, made if need be, locked while the block runs.

    Raises `UserError` for a folder with other things in it, a store of another schema, one that another process holds,
    or one that cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        look(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"out={path}: another process is running in this folder; wait for it, or name another"
        ) from None
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror or error}); name another folder") from error
    try:
        sweep(path)
        yield Store(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EFBIG):
            raise
        raise UserError(
            f"{error.filename or path}: {error.strerror}\n"
            "What was finished is kept; make room and run the same command again."
        ) from error
    finally:
        lock.release()
        if not (path / EXPERIMENT).exists():  # what could not begin leaves no folder
            (path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                path.rmdir()


def read_experiment(path: Path) -> dict[str, Any]:
    """What `experiment.yaml` holds. Raises `UserError` for one that is damaged or of another schema."""
    file = path / EXPERIMENT
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        schema = record["schema"]
    except FileNotFoundError:
        raise UserError(f"{path}: no {EXPERIMENT} in it, so it is no run folder") from None
    except (OSError, yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); name another out= folder") from error
    if schema != SCHEMA:
        raise UserError(f"{file}: schema {schema}, this fluxlab writes {SCHEMA}; name another out= folder")
    missing = {f.name for f in fields(Settings)} - set(record.get("settings") or ())
    if missing or "request" not in record:
        raise UserError(f"{file}: {min(missing, default='request')} is missing; name another out= folder")
    return record
