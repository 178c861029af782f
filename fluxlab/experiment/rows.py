"""The rows of a store's CSV files."""

import csv
import math
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fluxlab.errors import UserError
from fluxlab.files import naming_temporary_folder

Row = dict[str, Any]

_TEXT = ("variant", "prompt", "digest", "metric")
_KEY = "cell"
_WHOLE = ("seed", "n", "paired_n")

IN_MEMORY = 1 << 22
"""Bytes of a table that are kept in memory. A larger table is in a temporary file."""


class Records:
    """A growing table, whose row `i` is made when it is asked for: a large run has millions, a dict takes about 2 KB.

    A row is packed into 8 bytes per number or text and 16 for the key of a cell, and stays in memory only while the
    table is small (`IN_MEMORY`). Different texts are kept once.
    """

    def __init__(self, names: Sequence[str]):
        """names: of the columns. They say which are text and whole numbers; all others are floats."""
        self.names = tuple(names)
        kinds = {**dict.fromkeys((*_TEXT, *_WHOLE), "q"), _KEY: "16s"}
        self._packing = struct.Struct("<" + "".join(kinds.get(name, "d") for name in names))
        self._text_columns = [i for i, name in enumerate(self.names) if name in _TEXT]
        self._key_columns = [i for i, name in enumerate(self.names) if name == _KEY]
        self._texts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._content, self._file, self._count = bytearray(), None, 0

    def __len__(self) -> int:
        return self._count

    def put(self, i: int, values: Iterable[Any]) -> None:
        """Write row `i`, in any order. Raises ValueError for a key that does not have 32 hex digits."""
        values = list(values)
        for column in self._text_columns:
            values[column] = self._number(values[column])
        for column in self._key_columns:
            values[column] = _bytes(values[column])
        try:
            record = self._packing.pack(*values)
        except struct.error as error:
            raise ValueError(str(error)) from error
        start, end = i * self._packing.size, (i + 1) * self._packing.size
        if self._file is None and end > IN_MEMORY:
            with naming_temporary_folder():
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 it stays open
            _write(self._file, self._content, 0)
            self._content = bytearray()
        if self._file:
            _write(self._file, record, start)
        else:
            self._content.extend(bytes(max(0, end - len(self._content))))
            self._content[start:end] = record
        self._count = max(self._count, i + 1)

    def row(self, i: int) -> Row:
        """Return a row that was written."""
        start, size = i * self._packing.size, self._packing.size
        record = os.pread(self._file.fileno(), size, start) if self._file else self._content[start : start + size]
        values = list(self._packing.unpack(record))
        for column in self._text_columns:
            values[column] = self._texts[values[column]]
        for column in self._key_columns:
            values[column] = values[column].hex()
        return dict(zip(self.names, values, strict=True))

    def _number(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        return number


def _write(file: BinaryIO, content: bytes, start: int) -> None:
    """Write all of `content`. `os.pwrite` writes a part of it when the disk becomes full, and fails the next time."""
    with naming_temporary_folder():
        while content:
            written = os.pwrite(file.fileno(), content, start)
            content, start = content[written:], start + written


def _bytes(key: str) -> bytes:
    content = bytes.fromhex(key)
    if len(content) != 16:
        raise ValueError(f"cell {key!r}: expected 32 hex digits")
    return content


class Rows(Sequence[Row]):
    """Some rows of a table, in order."""

    def __init__(self, records: Records, chosen: Sequence[int]):
        """chosen: their numbers."""
        self._records, self._chosen = records, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Rows(self._records, self._chosen[i])
        return self._records.row(self._chosen[i])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} rows: {', '.join(self._records.names)}>"

    def choose(self, which: Iterable[int]) -> "Rows":
        return Rows(self._records, array("q", (self._chosen[i] for i in which)))


def choose(rows: Sequence[Row], which: Iterable[int]) -> Sequence[Row]:
    """Return some of the rows, in the given order."""
    return rows.choose(which) if isinstance(rows, Rows) else [rows[i] for i in which]


def read_table(file: Path) -> Rows:
    """Return the rows of one of a store's CSV files. Raises `UserError` if it is missing or damaged."""
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            lines = csv.reader(handle)
            names = next(lines, [])
            records = Records(names)
            for line in filter(None, lines):
                records.put(len(records), [_value(*pair) for pair in zip(names, line, strict=True)])
    except FileNotFoundError:
        raise UserError(f"{file}: missing, so the run is not finished; run its command again") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); run the command of this store again") from error
    return Rows(records, range(len(records)))


def _value(name: str, text: str) -> Any:
    if name in _TEXT or name == _KEY:
        return text
    return int(text) if name in _WHOLE else float(text) if text else math.nan
