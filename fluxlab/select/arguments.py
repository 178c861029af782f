"""Types of op arguments: functions (value, path) that return the value in canonical form or raise UserError.

Canonical values are plain (str, int, float, list, dict, None). They serialise, and two spellings of one value are
equal.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from fluxlab.errors import UserError, join, unknown_key, wrong
from fluxlab.families import FAMILIES, ROLES

ArgumentType = Callable[[Any, str], Any]
"""May have the attribute `words`: all values that it accepts; or `suggestions`: words that it accepts, among others."""

AXES = ("index", "row", "col")
"""The id axes that every family has, in their order. Programs are written down with these names."""

ORDER = "order"
"""The fourth axis, which some families have: the order of the text."""

EVERY_AXIS = (*AXES, ORDER)

PLANE = "plane"
"""The role of the two spatial axes."""

UNITS = ("tokens", "pixels", "fraction")

LARGEST = float.fromhex("0x1.fffffep127")
"""The largest fp32 number: ids are fp32."""

LARGEST_INTEGER = 2**63 - 1
"""The largest whole number that torch takes, as an index or a seed."""


def spellings() -> dict[str, str]:
    """Return the axis, one of `EVERY_AXIS`, that each name means: names of the families, and roles."""
    own = {name: axis for f in FAMILIES.values() for name, axis in zip(f.axes, EVERY_AXIS, strict=False)}
    return dict(zip(EVERY_AXIS, EVERY_AXIS, strict=True)) | own | dict(zip(ROLES, EVERY_AXIS, strict=True))


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


def choice(*words: str, spellings: Mapping[str, str] | None = None) -> ArgumentType:
    """Return the type of an argument that is one of `words`. spellings: others that are read as one of them."""

    def parse(value: Any, path: str) -> str:
        word = (spellings or {}).get(value, value) if isinstance(value, str) else value
        if word not in words or not isinstance(word, str):
            raise wrong(path, value, " or ".join(words), words)
        return word

    parse.__doc__ = ", ".join(words[:-1]) + f" or {words[-1]}"
    parse.words = words
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
    parse.suggestions = words
    return parse


def axis(value: Any, path: str) -> str:
    """index, row, col, order, FLUX.2's t, h, w, l, or 0 … 3"""
    if isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < len(EVERY_AXIS):
        return EVERY_AXIS[value]
    known = spellings()
    if not isinstance(value, str) or value not in known:
        names = [name for name in known if name not in ROLES or name in EVERY_AXIS]
        raise wrong(path, value, f"an axis: {', '.join(names)} or 0 … {len(EVERY_AXIS) - 1}", tuple(known))
    return known[value]


axis.words = EVERY_AXIS


def named_axes(value: Any, path: str) -> list[str]:
    """Return the axes that a name means: one, or the two of `plane`."""
    return list(AXES[1:]) if value == PLANE else [axis(value, path)]


def axis_mask(names: Collection[str], count: int) -> list[bool]:
    """Return for each of a model's `count` axes whether it is named. Raises UserError for one that it lacks."""
    spelled = spellings()
    known = {spelled[name] for name in names}
    if ORDER in known and count < len(EVERY_AXIS):
        raise UserError(f"axis order (l): this model has {', '.join(AXES)}, and no axis for the order of text")
    return [name in known for name in EVERY_AXIS[:count]]


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def plain(value: Any) -> Any:
    """Return arrays and tensors as nested lists, and any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def per_axis(value: Any, path: str) -> list[float | None]:
    """a number, [row, col], [index, row, col] or {row: 2}

    A list of four has the order of text last. Returns one number for each axis, and a fourth only if it differs. None
    stands for an axis that the value leaves out. `across` gives the numbers of a model.
    """
    accepted = "a number, [index, row, col], [row, col], [index, row, col, order], or a mapping such as {row: 2}"
    if isinstance(value, Mapping):
        if not value:
            raise wrong(path, dict(value), accepted)
        given: dict[str, float] = {}
        known = spellings()
        for key in value:
            if key not in known and key != PLANE:
                raise unknown_key(path, key, value[key], (*AXES, ORDER, PLANE), "axis")
            for name in named_axes(key, path):
                if name in given:
                    raise wrong(path, dict(value), f"each axis once; {key} is given twice")
                given[name] = number(value[key], join(path, key))
        numbers = [given.get(name) for name in EVERY_AXIS]
    elif is_list(value):
        if len(value) not in (2, len(AXES), len(EVERY_AXIS)):
            raise wrong(path, list(value), accepted)
        numbers = [None if n is None else number(n, f"{path}[{i}]") for i, n in enumerate(value)]
        if len(numbers) < len(EVERY_AXIS):
            return [None] * (len(AXES) - len(numbers)) + numbers
    else:
        return [number(value, path, accepted)] * len(AXES)
    *first, order = numbers
    same = len(set(first)) == 1
    if order is not None:
        return first if same and first[0] == order else numbers
    plain_axes = isinstance(value, Mapping) and set(value) <= set(AXES)
    return first if plain_axes or not same or first[0] is None else numbers


def across(numbers: Sequence[float | None], count: int) -> list[float | None]:
    """Return the numbers of `per_axis` for a model of `count` axes.

    A number for all of index, row and col is for the order of text too. Raises UserError for a number for the order
    that the model does not have.
    """
    if len(numbers) > count:
        if numbers[-1] is not None:
            axis_mask([ORDER], count)
        return list(numbers[:count])
    same = len(set(numbers)) == 1
    return [*numbers, *[numbers[0] if same else None] * (count - len(numbers))]


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
