"""sha256 of every file of a folder: a flipped bit in a weight file loads silently otherwise."""

import hashlib
import json
import os
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError

NAME = "manifest.json"
_TOLD = (NAME, "README.md", "embedded.json")  # documentation, written after the weights


def _digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: str | Path) -> Path:
    """Write `manifest.json`: the sha256 of every file of the folder, the model card excepted. Returns its path."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _TOLD)
    file, partial = folder / NAME, folder / f".{NAME}.part"
    hashes = {str(p.relative_to(folder).as_posix()): _digest(p) for p in files}
    partial.write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
    os.replace(partial, file)
    return file


def verify_manifest(folder: str | Path) -> None:
    """Raise `CheckpointError` naming every file that is not what the folder's manifest says; a folder without one
    passes.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        return
    try:
        hashes = json.loads((folder / NAME).read_text())["sha256"]
        wrong = [name for name, sha in hashes.items() if not (folder / name).is_file() or _digest(folder / name) != sha]
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{folder / NAME}: cannot be read ({error})\nInstall or download the folder again."
        ) from error
    if wrong:
        raise CheckpointError(
            f"{', '.join(str(folder / name) for name in wrong)}: not what {NAME} says; damaged or changed\n"
            "Install or download the folder again."
        )
