"""Kinds of op arguments: each a function (value, path) → the value in canonical form, or `UserError`.

Canonical values are plain (str, int, float, list, dict, None), so that they serialise and two spellings of one thing
are equal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from fluxlab.errors import UserError, join, unknown_key, wrong

Kind = Callable[[Any, str], Any]

AXES = ("index", "row", "col")
"""FLUX.1's names of the id axes."""

UNITS = ("tokens", "pixels", "fraction")


def number(value: Any, path: str, accepted: str = "a number") -> float:
    """A finite float; 1 and 1.0 are the same."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(path, value, accepted)
    if not math.isfinite(value):
        raise wrong(path, float(value), f"{accepted}, finite")
    return float(value) + 0.0  # -0.0 becomes 0.0


def positive(value: Any, path: str) -> float:
    if not number(value, path, "a number above 0") > 0:
        raise wrong(path, value, "a number above 0")
    return float(value)


def not_negative(value: Any, path: str) -> float:
    if number(value, path, "a number, 0 or more") < 0:
        raise wrong(path, value, "a number, 0 or more")
    return float(value) + 0.0


def integer(value: Any, path: str, accepted: str = "a whole number") -> int:
    if isinstance(value, bool) or not isinstance(value, Real) or value != int_or_none(value):
        raise wrong(path, value, accepted)
    return int(value)


def int_or_none(value: Real) -> int | None:
    return int(value) if isinstance(value, Integral) or math.isfinite(value) else None


def seed(value: Any, path: str) -> int:
    if integer(value, path, "a whole number, 0 or more") < 0:
        raise wrong(path, value, "a whole number, 0 or more")
    return int(value)


def flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(path, value, "true or false")
    return value


def choice(*words: str) -> Kind:
    """One of `words`."""

    def kind(value: Any, path: str) -> str:
        if value not in words or not isinstance(value, str):
            raise wrong(path, value, " or ".join(words), words)
        return value

    return kind


def word_or(other: Kind, *words: str) -> Kind:
    """One of `words`, or what `other` takes."""

    def kind(value: Any, path: str) -> Any:
        if not isinstance(value, str):
            return other(value, path)
        if value not in words:
            raise wrong(path, value, f"{', '.join(words)} or numbers", words)
        return value

    return kind


def axis(value: Any, path: str) -> str:
    """An axis, by name or number."""
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < len(AXES):
        return AXES[value]
    if not isinstance(value, str) or value not in AXES:
        raise wrong(path, value, f"an axis: {', '.join(AXES)} or 0 … {len(AXES) - 1}", AXES)
    return value


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def plain(value: Any) -> Any:
    """Arrays and tensors as nested lists, all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def per_axis(value: Any, path: str) -> list[float | None]:
    """One number for all axes, one an axis, two for (row, col), or a mapping `{row: 2}`. None: that axis stays."""
    accepted = "a number, [index, row, col], [row, col], or a mapping such as {row: 2}"
    if isinstance(value, Mapping):
        if not value:
            raise wrong(path, dict(value), accepted)
        for key in value:
            if key not in AXES:
                raise unknown_key(path, key, value[key], AXES, "axis")
        return [number(value[name], join(path, name)) if name in value else None for name in AXES]
    if is_list(value):
        if len(value) not in (2, len(AXES)):
            raise wrong(path, list(value), accepted)
        numbers = [None if n is None else number(n, f"{path}[{i}]") for i, n in enumerate(value)]
        return [None] * (len(AXES) - len(numbers)) + numbers
    return [number(value, path, accepted)] * len(AXES)


def box(value: Any, path: str) -> list[float]:
    """[top, left, bottom, right], the far edges excluded."""
    if not is_list(value) or len(value) != 4:
        raise wrong(path, value, "[top, left, bottom, right]")
    top, left, bottom, right = (number(n, f"{path}[{i}]") for i, n in enumerate(value))
    if top >= bottom or left >= right:
        raise wrong(path, list(value), "[top, left, bottom, right] with top < bottom and left < right")
    return [top, left, bottom, right]


def bitmap(value: Any, path: str) -> list[str]:
    """Rows of a mask, `#` chosen and `.` not, from such rows, 0s and 1s, or an image file (bright = chosen)."""
    if isinstance(value, str):
        return _read_bitmap(value, path)
    value = plain(value)
    accepted = "rows of equal length of '#' and '.', or of 0 and 1, or an image file"
    if not is_list(value) or not value:
        raise wrong(path, value, accepted)
    rows = []
    for i, row in enumerate(value):
        marks = list(row) if isinstance(row, str) or is_list(row) else [row]
        if not marks or any(mark not in ("#", ".", 0, 1) for mark in marks):
            raise wrong(f"{path}[{i}]", row, accepted)
        rows.append("".join("#" if mark in ("#", 1) else "." for mark in marks))
    if len({len(row) for row in rows}) != 1:
        raise wrong(path, rows, accepted)
    return rows


def _read_bitmap(file: str, path: str) -> list[str]:
    import numpy as np
    from PIL import Image

    try:
        bright = np.asarray(Image.open(file).convert("L")) >= 128
    except OSError as error:
        raise UserError(f"{path}: {file!r}, expected an image file ({type(error).__name__})") from None
    return ["".join(np.where(row, "#", ".")) for row in bright]
