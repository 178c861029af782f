"""Controls that follow from the registry of ops: what an argument accepts, and the range of its slider.

Nothing here is written for one op. The range of numbers is found by asking the argument's type which ones it accepts,
so that an op of a plugin gets its controls too. Every control has a value in YAML, which may be more than its slider
can express.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.positions.edit import PARSE, where_defaults
from fluxlab.positions.markdown import WHERE_VALUES
from fluxlab.positions.registry import Op
from fluxlab.select.arguments import ArgumentType

REACHES = (1, 2, 4, 8, 16, 32, 64, 180, 512)
"""Ends of sliders. The first that is at least three times the start value is taken."""


@dataclass(frozen=True)
class Slider:
    """A range of numbers."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Control:
    """How one key of an edit is set.

    start: its first value in YAML; empty for its default. hint: what the type accepts. words: all values, if they can
    be listed. suggestions: some of them. slider: the numbers that can be dragged to, None if numbers are not accepted.
    """

    key: str
    start: str
    hint: str
    words: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    slider: Slider | None = None
    required: bool = False


def argument_controls(op: Op) -> list[Control]:
    """Return a control for each argument of an op. They start at its preset in `configs/op`, if it has one."""
    given = {**op.defaults, **preset(op)}
    return [control(key, parse, given.get(key), key in op.required) for key, parse in op.types.items()]


def where_controls(op: Op) -> list[Control]:
    """Return a control for each key that says where an edit acts, without `steps` and `blocks`.

    Those two are ranges of numbers that depend on the model.
    """
    defaults, made = where_defaults(op), []
    for key in op.where:
        if key not in ("steps", "blocks"):
            start = preset(op).get(key, defaults[key])
            one = control(key, PARSE[key], start)
            kept = start if start != defaults[key] or one.words else None  # an empty field is the default
            hint = f"{WHERE_VALUES[key].replace('`', '')}; default {written(defaults[key])}"
            made.append(replace(one, start="" if kept is None else one.start, hint=hint))
    return made


def control(key: str, parse: ArgumentType, start: Any, required: bool = False) -> Control:
    """Return the control of a key from its type. start: a value, None for the default."""
    hint = " ".join((parse.__doc__ or "").partition("\n")[0].split())
    if start is None and not required:
        hint += "; empty for the default"
    words = tuple(getattr(parse, "words", ()))
    if accepts(parse, True):
        words = ("true", "false")
    slider = None if words else slider_of(parse, start)
    return Control(
        key,
        "" if start is None else written(start),
        hint,
        words,
        tuple(getattr(parse, "suggestions", ())),
        slider,
        required,
    )


def accepts(parse: ArgumentType, value: Any) -> bool:
    """Return whether a type takes a value."""
    try:
        parse(value, "value")
    except UserError:
        return False
    return True


def slider_of(parse: ArgumentType, start: Any = None) -> Slider | None:
    """Return a range of numbers that a type accepts, around `start`. None if it accepts no number."""
    if not accepts(parse, 1) and not accepts(parse, 2) and not accepts(parse, 0.5):
        return None
    size = max(map(abs, _numbers(start)), default=1.0) or 1.0
    wanted = 3 * size
    high = next((float(reach) for reach in REACHES if reach >= wanted), wanted)
    high = next((n for n in (high, 2.0, 1.0, 0.5) if accepts(parse, n)), None)
    if high is None:  # numbers that name something, such as axes
        return None
    whole = not accepts(parse, 1.5) and not accepts(parse, 0.5)
    step = 1.0 if whole or high >= 64 else high / 80
    least = ((-1, -high), (0, 0.0), (step, step), (1, 1.0), (1 + step, 1 + step))
    low = next(bound for number, bound in least if accepts(parse, number))
    return Slider(low, high, step)


def _numbers(value: Any) -> list[float]:
    """Return the numbers in a value and its parts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [number for part in value for number in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def preset(op: Op) -> dict[str, Any]:
    """Return the values of `configs/op/<name>.yaml`, without those that it leaves open. Empty if there is no file."""
    file = config_folder() / "op" / f"{op.name}.yaml"
    if not file.is_file():
        return {}
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {k: v for k, v in values.items() if k != "op" and v not in (None, "???")} if values["op"] == op.name else {}


def written(value: Any) -> str:
    """Return a value in YAML, on one line."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], float) and len(set(value)) == 1:
        value = value[0]  # one number for all axes
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("...\n").strip()
