"""One edit of a program: an op with its arguments, and where it acts."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluxlab.errors import join, unknown_key, wrong
from fluxlab.positions.registry import WHERE, Op, find_op
from fluxlab.select.tokens import parse_tokens
from fluxlab.select.where import parse_axes, parse_blocks, parse_heads, parse_side, parse_steps, parse_strength

PARSE = {
    "tokens": parse_tokens,
    "axes": parse_axes,
    "steps": parse_steps,
    "blocks": parse_blocks,
    "heads": parse_heads,
    "side": parse_side,
    "seen_by": parse_tokens,
    "strength": parse_strength,
}
DEFAULTS = {
    "axes": "all",
    "steps": "all",
    "blocks": "all",
    "heads": "all",
    "side": "both",
    "seen_by": "all",
    "strength": 1.0,
}
assert set(PARSE) == set(WHERE)


@dataclass(frozen=True)
class Edit:
    """An op and where it acts, both canonical and complete: equal edits compare equal whatever their names.

    `path` is where a config holds it, for errors.
    """

    op: str
    arguments: Mapping[str, Any]
    where: Mapping[str, Any]
    name: str = field(default="", compare=False)
    path: str = field(default="", compare=False)

    def to_config(self) -> dict[str, Any]:
        """Plain values; what equals its default is left out."""
        known = find_op(self.op, join(self.path, "op"))
        defaults = {**known.defaults, **DEFAULTS, "tokens": known.tokens}
        given = {key: v for key, v in {**self.arguments, **self.where}.items() if v != defaults.get(key, _NOTHING)}
        if "blocks" in given and len(given["blocks"]) == 1:
            ((group, numbers),) = given["blocks"].items()
            given["blocks"] = numbers if group == "through" else given["blocks"] if numbers != "all" else group
        return {"op": self.op, **{key: _short(value) for key, value in copy.deepcopy(given).items()}}


_NOTHING = object()


def _short(value: Any) -> Any:
    """[2, 2, 2] reads better as 2; whole numbers without a point."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], float) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        return [_short(part) for part in value]
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def parse_edit(name: str, config: Any, path: str) -> Edit:
    if not isinstance(config, Mapping):
        raise wrong(path, config, "an edit such as {op: scale, factor: 1.2}")
    known = find_op(config.get("op"), join(path, "op"))
    for key in config:
        if key not in ("op", *known.kinds, *known.where) and not _is_default(known, key, config[key]):
            raise unknown_key(path, key, config[key], (*known.kinds, *known.where), f"key of {known.name}")
    where = {
        key: PARSE[key](config[key], join(path, key)) if config.get(key) is not None else default
        for key, default in {"tokens": known.tokens, **DEFAULTS}.items()
    }
    if where["seen_by"] != "all" and where["side"] != "keys":
        raise wrong(join(path, "seen_by"), where["seen_by"], "it together with side: keys, whose ids these queries see")
    return Edit(known.name, known.parse(config, path), where, name, path)


def _is_default(known: Op, key: Any, value: Any) -> bool:
    """A key that says nothing to this op may still be written out with its default."""
    return (value is None and key in WHERE) or value == {**DEFAULTS, "tokens": known.tokens}.get(key, _NOTHING)
