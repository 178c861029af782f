"""The folder of an attribution: a record of how it was made, and a file with the arrays of each cell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fluxlab.errors import UserError
from fluxlab.files import write_atomic
from fluxlab.learning.objectives import Place
from fluxlab.probes import Captured, is_complete, load

RECORD, SCHEMA = "attribution.yaml", 1
_FREE = ("batch_tokens", "threads", "kernel")
"""Settings that change the last bits only."""

_KEYS = ("name", "caption", "command", "digest", "objective", "variant", "held_out", "request", "settings", "versions")


def cell_file(folder: Path, number: int) -> Path:
    """Return the file of a cell, whether or not it exists."""
    return folder / f"cell-{number:04}.safetensors"


@dataclass(frozen=True, eq=False)
class Attribution:
    """A finished attribution. Made by `read_attribution`.

    record: the content of attribution.yaml. places: prompt and seed of each cell. cells: the arrays of each cell by
    name: `gains`, or one for each site of `patches`; with `ablate` also `predicted` and `measured`.
    """

    path: Path
    record: Mapping[str, Any]
    places: Sequence[Place]
    cells: Sequence[Mapping[str, Captured]]

    @property
    def objective(self) -> str:
        """The name of the objective."""
        return self.record["objective"]["name"]

    def array(self, name: str) -> Captured:
        """Return an array of the first cell, with the labels that those of all cells have.

        Raises UserError if there is none of this name.
        """
        if name not in self.cells[0]:
            raise UserError(f"{self.path}: has no {name}, which need another key; it has {', '.join(self.cells[0])}")
        return self.cells[0][name]

    def values(self, name: str) -> np.ndarray:
        """Return the values of all cells, cells in front. Raises UserError if there is no array of this name."""
        self.array(name)
        return np.stack([cell[name].values for cell in self.cells])


def begin(folder: Path, record: dict[str, Any]) -> None:
    """Write the record into a folder, before any cell. A folder that is continued keeps the versions of its first cell.

    Raises UserError if the folder holds another attribution, or one with other settings.
    """
    known = _read(folder) if (folder / RECORD).exists() else None
    if known is None and cell_file(folder, 0).exists():
        raise UserError(f"out={folder}: has cells, but no {RECORD}; name another folder")
    if known is not None:
        if known["digest"] != record["digest"]:
            raise UserError(f"out={folder}: holds another attribution; name another folder")
        for key, value in record["settings"].items():
            if key not in _FREE and known["settings"].get(key) != value:
                raise UserError(
                    f"out={folder}: its cells were computed with {key}={known['settings'].get(key)}, not {value}; name "
                    "another folder"
                )
        record = {**record, "versions": known["versions"]}
    text = yaml.safe_dump({"schema": SCHEMA, **record}, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(folder / RECORD, text)


def read_attribution(folder: "str | PathLike[str]") -> Attribution:
    """Read the folder of a finished attribution. Raises UserError if it is not one, is not finished, or is damaged."""
    folder = Path(folder)
    record = _read(folder)
    request = record["request"]
    places = [Place(prompt, seed) for prompt in request["prompts"] for seed in request["seeds"]]
    files = [cell_file(folder, n) for n in range(len(places))]
    done = sum(map(is_complete, files))
    if done < len(files):
        raise UserError(f"{folder}: {done} of {len(files)} cells are done; run its command again:\n{record['command']}")
    return Attribution(folder, record, places, [load(file) for file in files])


def _read(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        missing = [key for key in _KEYS if key not in record]
        schema = record.get("schema")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: not a folder of python -m fluxlab.attribution, it contains no {RECORD}") from None
    except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); delete the folder") from error
    if schema != SCHEMA:
        raise UserError(f"{file}: schema {schema}, but this version writes {SCHEMA}; name another folder")
    if missing:
        raise UserError(f"{file}: {missing[0]} is missing; delete the folder and run its command again")
    return record
