"""One edit of a program: an op with its arguments, and where it acts."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluxlab.errors import join, text_key, unknown_key, wrong
from fluxlab.positions.registry import WHERE, Op, find_op
from fluxlab.select.masks import compact
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


def where_defaults(op: Op) -> dict[str, Any]:
    """Return the default of every key of `WHERE` for an op."""
    return {**DEFAULTS, "tokens": op.tokens, "axes": "all" if op.axes is None else list(op.axes)}


@dataclass(frozen=True)
class Edit:
    """An op with its arguments, and where it acts. Both are canonical and complete, so equal edits compare equal.

    The name does not count. `path` is the key of the edit in its config, for error messages.
    """

    op: str
    arguments: Mapping[str, Any]
    where: Mapping[str, Any]
    name: str = field(default="", compare=False)
    path: str = field(default="", compare=False)

    @property
    def acts_on(self) -> str:
        """What the op changes: a key of `registry.ACTS_ON`."""
        return find_op(self.op, join(self.path, "op")).acts_on

    def to_config(self, mask_digests: bool = False) -> dict[str, Any]:
        """Return plain values, without those that equal their default. `mask_digests`: as in `Program.to_config`."""
        known = find_op(self.op, join(self.path, "op"))
        defaults = {**known.defaults, **where_defaults(known)}
        given = {key: v for key, v in {**self.arguments, **self.where}.items() if v != defaults.get(key, _NOTHING)}
        given = compact(given, mask_digests)
        if "blocks" in given and len(given["blocks"]) == 1:
            ((group, numbers),) = given["blocks"].items()
            given["blocks"] = numbers if group == "through" else given["blocks"] if numbers != "all" else group
        return {"op": self.op, **{key: _short(value) for key, value in copy.deepcopy(given).items()}}


_NOTHING = object()


def _short(value: Any) -> Any:
    """Return [2, 2, 2] as 2 and 2.0 as 2, which are easier to read."""
    if isinstance(value, list) and len(value) == 3 and isinstance(value[0], float) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        return [_short(part) for part in value]
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def parse_edit(name: Any, config: Any, path: str) -> Edit:
    """Return the edit `name` of the program at `path`. Raises UserError for what is not accepted."""
    text_key(path, name, "the name of an edit")
    path = join(path, name)
    if not isinstance(config, Mapping):
        raise wrong(path, config, "an edit such as {op: scale, factor: 1.2}")
    known = find_op(config.get("op"), join(path, "op"))
    for key in config:
        if key not in ("op", *known.types, *known.where) and not _is_default(known, key, config[key]):
            raise unknown_key(path, key, config[key], (*known.types, *known.where), f"key of {known.name}")
    where = {
        key: PARSE[key](config[key], join(path, key)) if config.get(key) is not None else default
        for key, default in where_defaults(known).items()
    }
    if where["seen_by"] != "all" and where["side"] != "keys" and "side" in known.where:
        accepted = "side: keys with it, since it says which queries see the edited keys"
        raise wrong(join(path, "seen_by"), where["seen_by"], accepted)
    return Edit(known.name, known.parse(config, path), where, name, path)


def _is_default(known: Op, key: Any, value: Any) -> bool:
    """Return whether a key that this op does not take is set to its default, which is allowed."""
    return (value is None and key in WHERE) or value == where_defaults(known).get(key, _NOTHING)
