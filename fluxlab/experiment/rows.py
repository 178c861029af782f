"""The rows of a store's CSV files."""

import csv
import math
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fluxlab.errors import UserError

Row = dict[str, Any]

_TEXT = ("variant", "prompt", "digest", "cell", "metric")
_WHOLE = ("seed", "n", "paired_n")


class Rows(Sequence[Row]):
    """Rows with equal columns, in memory by column. A row is a dict that is made when it is asked for.

    A dict per row would take about 2 KB, and a large run has millions of rows.
    """

    def __init__(self, columns: dict[str, Sequence], chosen: Sequence[int]):
        """chosen: the rows of `columns` that these rows are, in order."""
        self._columns, self._chosen = columns, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return choose(self, range(len(self))[i])
        row = self._chosen[i]
        return {name: column[row] for name, column in self._columns.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} rows: {', '.join(self._columns)}>"

    def choose(self, which: Iterable[int]) -> "Rows":
        return Rows(self._columns, array("q", (self._chosen[i] for i in which)))


def choose(rows: Sequence[Row], which: Iterable[int]) -> Sequence[Row]:
    """Return some of the rows, in the given order."""
    return rows.choose(which) if isinstance(rows, Rows) else [rows[i] for i in which]


class _Keys(Sequence[str]):
    """The keys of cells, in 16 bytes each."""

    def __init__(self):
        self._bytes = bytearray()

    def append(self, key: str) -> None:
        """Add a key. Raises ValueError unless it has 32 hex digits."""
        content = bytes.fromhex(key)
        if len(content) != 16:
            raise ValueError(f"cell {key!r}: expected 32 hex digits")
        self._bytes += content

    def __len__(self) -> int:
        return len(self._bytes) // 16

    def __getitem__(self, i: int) -> str:
        return self._bytes[16 * i : 16 * i + 16].hex()


def read_table(file: Path) -> Rows:
    """Return the rows of one of a store's CSV files. Raises `UserError` if it is missing or damaged."""
    texts: dict[str, str] = {}  # a name or prompt is one object, however many rows have it
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            lines = csv.reader(handle)
            names = next(lines, [])
            columns: dict[str, Any] = {name: [] if name in (*_TEXT, *_WHOLE) else array("d") for name in names}
            columns |= {name: _Keys() for name in names if name == "cell"}
            count = 0
            for line in filter(None, lines):
                for name, text in zip(names, line, strict=True):
                    one = name in _TEXT and name != "cell"
                    columns[name].append(_value(name, texts.setdefault(text, text) if one else text))
                count += 1
    except FileNotFoundError:
        raise UserError(f"{file}: missing, so the run is not finished; run its command again") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); run the command of this store again") from error
    return Rows(columns, range(count))


def _value(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    return int(text) if name in _WHOLE else float(text) if text else math.nan
