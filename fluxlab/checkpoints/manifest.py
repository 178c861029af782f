"""The sha256 of every file of a folder: without it, a flipped bit in a weight file is not noticed."""

import json
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.files import sha256_of, write_atomic

NAME = "manifest.json"
_UNHASHED = (NAME, "README.md", "embedded.json")  # documentation, written after the weights


def write_manifest(folder: str | Path) -> Path:
    """Write `manifest.json` with the sha256 of every file of the folder except the model card. Returns its path."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _UNHASHED)
    file = folder / NAME
    hashes = {str(p.relative_to(folder).as_posix()): sha256_of(p) for p in files}
    write_atomic(file, json.dumps({"sha256": hashes}, indent=2) + "\n")
    return file


def verify_manifest(folder: str | Path) -> None:
    """Raise `CheckpointError` naming every file that differs from the folder's manifest.

    A folder without a manifest passes.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        return
    try:
        hashes = json.loads((folder / NAME).read_text())["sha256"]
        wrong = [
            name for name, sha in hashes.items() if not (folder / name).is_file() or sha256_of(folder / name) != sha
        ]
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{folder / NAME}: cannot be read ({error})\nInstall or download the folder again."
        ) from error
    if wrong:
        raise CheckpointError(
            f"{', '.join(str(folder / name) for name in wrong)}: not what {NAME} says, so damaged or changed\n"
            "Install or download the folder again."
        )
