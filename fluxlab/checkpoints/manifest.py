"""The sha256 of every file of a folder: without it, a flipped bit in a weight file is not noticed."""

import json
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.files import sha256_of, write_atomic

NAME = "manifest.json"
_TEXT = ("text_encoder/", "text_encoder_2/")
_UNHASHED = (NAME, "README.md", "embedded.json")  # documentation, written after the weights


def write_manifest(folder: str | Path) -> Path:
    """Write `manifest.json` with the sha256 of every file of the folder except the model card. Returns its path."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _UNHASHED)
    file = folder / NAME
    hashes = {str(p.relative_to(folder).as_posix()): sha256_of(p) for p in files}
    write_atomic(file, json.dumps({"sha256": hashes}, indent=2) + "\n")
    return file


def verify_manifest(folder: str | Path, of_text: bool | None = None) -> None:
    """Raise `CheckpointError` naming every file that differs from the folder's manifest.

    A folder without a manifest passes. of_text: True for the files of the text encoders only, which are opened when
    they are needed; False for all others; None for all.
    """
    folder = Path(folder)
    hashes = manifest_hashes(folder)
    names = [name for name in hashes if of_text in (None, name.startswith(_TEXT))]
    wrong = [name for name in names if not (folder / name).is_file() or sha256_of(folder / name) != hashes[name]]
    if wrong:
        raise CheckpointError(
            f"{', '.join(str(folder / name) for name in wrong)}: not what {NAME} says, so damaged or changed\n"
            "Install or download the folder again."
        )


def manifest_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file that the folder's manifest lists; nothing without a manifest.

    Raises `CheckpointError` for a manifest that cannot be read.
    """
    if not (folder / NAME).is_file():
        return {}
    try:
        return dict(json.loads((folder / NAME).read_text())["sha256"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{folder / NAME}: cannot be read ({error})\nInstall or download the folder again."
        ) from error
