"""Programs: ordered edits, read from a config, written back, hashed, described, compiled."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluxlab.positions.compiled import Compiled, compile_programs
from fluxlab.positions.describe import describe_edit
from fluxlab.positions.layout import Context
from fluxlab.positions.registry import WHERE, Op, find_op
from fluxlab.positions.spelling import join, show, unknown_key, wrong
from fluxlab.positions.tokens import names_words, parse_tokens
from fluxlab.positions.where import (
    parse_axes,
    parse_blocks,
    parse_heads,
    parse_side,
    parse_steps,
    parse_strength,
)

SCHEMA = 1
"""Part of every digest: raised when the meaning of a config changes."""

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


@dataclass(frozen=True)
class Program:
    """An ordered list of edits; each acts on what the one before has left. The empty one changes nothing."""

    edits: tuple[Edit, ...] = ()

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | Program | None", path: str = "") -> "Program":
        """A program from `{name: {op: …, argument: …, tokens: …}}`. None and {} are the identity.

        Raises `ValueError`, one line, naming the path of what it cannot take (`path` comes first in it), the value,
        what would be accepted and the nearest spelling.
        """
        if isinstance(config, Program):
            return config
        if config is None:
            return cls()
        if not isinstance(config, Mapping):
            raise wrong(path, config, "a mapping of edits, for instance {a: {op: scale, factor: 1.2}}")
        if isinstance(config.get("op"), str):
            raise ValueError(
                f"{path or 'program'}: {show(dict(config))} is an edit without a name, expected {{a: {{…}}}}"
            )
        return cls(tuple(_edit(str(name), edit, join(path, name)) for name, edit in config.items()))

    def to_config(self) -> dict[str, dict[str, Any]]:
        """Plain nested values for YAML or JSON that `from_config` reads back; edits of one name are numbered."""
        config: dict[str, dict[str, Any]] = {}
        for edit in self.edits:
            name, n = edit.name or "edit", 2
            while name in config:
                name, n = f"{edit.name or 'edit'}_{n}", n + 1
            config[name] = edit.to_config()
        return config

    @property
    def digest(self) -> str:
        """Hash of what the program does: 64 hex digits, free of names, key order, number spelling and defaults."""
        edits = [{"op": edit.op, "arguments": edit.arguments, "where": edit.where} for edit in self.edits]
        text = json.dumps({"schema": SCHEMA, "edits": edits}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __add__(self, other: "Program") -> "Program":
        """First this program, then the other."""
        return Program(self.edits + other.edits)

    def __bool__(self) -> bool:
        return bool(self.edits)

    @property
    def names_words(self) -> bool:
        """Whether it depends on the prompt."""
        return any(names_words(edit.arguments) or names_words(edit.where) for edit in self.edits)

    def describe(self) -> str:
        """One readable line."""
        return "; then ".join(describe_edit(edit) for edit in self.edits) or "identity"

    def compile(self, context: Context) -> Compiled:
        """Rotary tables and masks for every step and block of one model, sequence and schedule.

        Raises `ValueError` naming the path of what the context does not have: a step, a block, a word, a selection.
        """
        return compile_programs([self], context)


def _edit(name: str, config: Any, path: str) -> Edit:
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
