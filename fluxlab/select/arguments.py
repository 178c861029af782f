"""Types of op arguments: functions (value, path) that return the value in canonical form or raise UserError.

Canonical values are plain (str, int, float, list, dict, None). They serialise, and two spellings of one value are
equal.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from fluxlab.errors import join, unknown_key, wrong

ArgumentType = Callable[[Any, str], Any]

AXES = ("index", "row", "col")
"""FLUX.1's names of the id axes."""

UNITS = ("tokens", "pixels", "fraction")

LARGEST = float.fromhex("0x1.fffffep127")
"""The largest fp32 number: ids are fp32."""

LARGEST_INTEGER = 2**63 - 1
"""The largest whole number that torch takes, as an index or a seed."""


def number(value: Any, path: str, accepted: str = "a number") -> float:
    """a number"""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(path, value, accepted)
    if value != value or value in (math.inf, -math.inf):
        raise wrong(path, float(value), f"{accepted}, finite")
    if not -LARGEST <= value <= LARGEST:
        raise wrong(path, value, f"{accepted}, of at most 3.4e38, the largest float32")
    return float(value) + 0.0  # -0.0 becomes 0.0


def positive(value: Any, path: str) -> float:
    """a number above 0"""
    if not number(value, path, "a number above 0") > 0:
        raise wrong(path, value, "a number above 0")
    return float(value)


def not_negative(value: Any, path: str) -> float:
    """a number, 0 or more"""
    if number(value, path, "a number, 0 or more") < 0:
        raise wrong(path, value, "a number, 0 or more")
    return float(value) + 0.0


def integer(value: Any, path: str, accepted: str = "a whole number") -> int:
    """a whole number"""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(path, value, accepted)
    if not isinstance(value, Integral) and not (math.isfinite(value) and value == int(value)):
        raise wrong(path, value, accepted)
    if abs(value) > LARGEST_INTEGER:
        raise wrong(path, value, f"{accepted}, below 2^63")
    return int(value)


def seed(value: Any, path: str) -> int:
    """a whole number, 0 or more"""
    if integer(value, path, "a whole number, 0 or more") < 0:
        raise wrong(path, value, "a whole number, 0 or more")
    return int(value)


def flag(value: Any, path: str) -> bool:
    """true or false"""
    if not isinstance(value, bool):
        raise wrong(path, value, "true or false")
    return value


def above_one(value: Any, path: str) -> float:
    """a number above 1"""
    if not number(value, path, "a number above 1") > 1:
        raise wrong(path, value, "a number above 1")
    return float(value)


def index(value: Any, path: str) -> int:
    """a whole number, 0 or more"""
    return seed(value, path)


def interval(value: Any, path: str) -> list[float]:
    """[low, high]"""
    if not is_list(value) or len(value) != 2:
        raise wrong(path, value, "[low, high]")
    low, high = (number(n, f"{path}[{i}]") for i, n in enumerate(value))
    if low > high:
        raise wrong(path, list(value), "[low, high] with low <= high")
    return [low, high]


def choice(*words: str) -> ArgumentType:
    """Return the type of an argument that is one of `words`."""

    def parse(value: Any, path: str) -> str:
        if value not in words or not isinstance(value, str):
            raise wrong(path, value, " or ".join(words), words)
        return value

    parse.__doc__ = ", ".join(words[:-1]) + f" or {words[-1]}"
    return parse


def word_or(other: ArgumentType, *words: str) -> ArgumentType:
    """Return the type of an argument that is one of `words`, or what `other` accepts."""

    def parse(value: Any, path: str) -> Any:
        if not isinstance(value, str):
            return other(value, path)
        if value not in words:
            raise wrong(path, value, f"{', '.join(words)} or numbers", words)
        return value

    parse.__doc__ = f"{', '.join(words)} or {(other.__doc__ or '').partition(chr(10))[0]}"
    return parse


def axis(value: Any, path: str) -> str:
    """index, row, col or 0, 1, 2"""
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < len(AXES):
        return AXES[value]
    if not isinstance(value, str) or value not in AXES:
        raise wrong(path, value, f"an axis: {', '.join(AXES)} or 0 … {len(AXES) - 1}", AXES)
    return value


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def plain(value: Any) -> Any:
    """Return arrays and tensors as nested lists, and any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def per_axis(value: Any, path: str) -> list[float | None]:
    """a number, [row, col], [index, row, col] or {row: 2}

    Returns one number for each axis. None stands for an axis that the value leaves out.
    """
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


def positive_per_axis(value: Any, path: str) -> list[float | None]:
    """a number above 0, [row, col], [index, row, col] or {row: 2}"""
    numbers = per_axis(value, path)
    if any(n is not None and n <= 0 for n in numbers):
        raise wrong(path, value, "numbers above 0")
    return numbers


def not_negative_per_axis(value: Any, path: str) -> list[float | None]:
    """a number, 0 or more, [row, col], [index, row, col] or {row: 2}"""
    numbers = per_axis(value, path)
    if any(n is not None and n < 0 for n in numbers):
        raise wrong(path, value, "numbers from 0")
    return numbers


def positive_integer(value: Any, path: str) -> int:
    """a whole number, 1 or more"""
    if integer(value, path, "a whole number, 1 or more") < 1:
        raise wrong(path, value, "a whole number, 1 or more")
    return int(value)


def box(value: Any, path: str) -> list[float]:
    """[top, left, bottom, right], the bottom and right edges excluded"""
    if not is_list(value) or len(value) != 4:
        raise wrong(path, value, "[top, left, bottom, right]")
    top, left, bottom, right = (number(n, f"{path}[{i}]") for i, n in enumerate(value))
    if top >= bottom or left >= right:
        raise wrong(path, list(value), "[top, left, bottom, right] with top < bottom and left < right")
    return [top, left, bottom, right]
