"""The one list of ops: from the word in a config to a function, in one hop."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxlab.errors import UserError, join, wrong
from fluxlab.select.arguments import Kind
from fluxlab.select.where import parse_plugins

WHERE = ("tokens", "axes", "steps", "blocks", "heads", "side", "seen_by", "strength")

ACTS_ON = {
    "ids": WHERE,
    "rotation": WHERE,
    "scale": ("tokens", "steps", "blocks", "heads", "strength"),
    "attention": ("steps", "blocks", "heads", "strength"),
}
"""What an op changes, and which keys of an edit then mean something."""


@dataclass(frozen=True)
class Op:
    """An entry of the registry. names: each argument's in Python. tokens: what an edit selects by default."""

    name: str
    function: Callable
    kinds: Mapping[str, Kind]
    names: Mapping[str, str]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    acts_on: str = "ids"
    tokens: str = "image"

    @property
    def where(self) -> tuple[str, ...]:
        return ACTS_ON[self.acts_on]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def parse(self, given: Mapping[str, Any], path: str) -> dict[str, Any]:
        """All arguments, defaults included, in canonical form. `UserError` for a missing or wrong one."""
        for name in self.required:
            if given.get(name) is None:
                others = ", ".join(self.kinds)
                raise UserError(f"{join(path, name)}: missing, {self.name} needs it (arguments: {others})")
        return {
            name: kind(given[name], join(path, name)) if given.get(name) is not None else self.defaults.get(name)
            for name, kind in self.kinds.items()
        }


OPS: dict[str, Op] = {}


def op(name: str, kinds: Mapping[str, Kind] | None = None, *, acts_on: str = "ids", tokens: str = "image") -> Callable:
    """Register a function as the op `name`. Its arguments after (ids, scope) need a kind each, by their YAML names.

    A name that Python reserves takes an underscore in the function: `from` is `from_`.
    """
    kinds = dict(kinds or {})

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())
        arguments = {p.name.rstrip("_"): p for p in parameters if p.name.rstrip("_") in kinds}
        clash = [key for key in kinds if key in (*WHERE, "op")]
        assert not clash, f"op {name}: {clash[0]} is a key of every edit, choose another argument"
        assert len(arguments) == len(kinds), f"op {name}: kinds {list(kinds)} do not fit {parameters}"
        known = OPS.get(name)
        if known and (known.function.__module__, known.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise UserError(f"op {name!r} is taken by {known.function.__module__}; choose another name")
        required = tuple(key for key in kinds if arguments[key].default is inspect.Parameter.empty)
        defaults = {
            key: None if arguments[key].default is None else kind(arguments[key].default, key)
            for key, kind in kinds.items()
            if key not in required
        }
        OPS[name] = Op(
            name, function, kinds, {k: p.name for k, p in arguments.items()}, required, defaults, acts_on, tokens
        )
        return function

    return register


def find_op(name: Any, path: str) -> Op:
    if name is None:
        raise UserError(f"{path}: missing, expected one of {', '.join(sorted(OPS))}")
    if not isinstance(name, str) or name not in OPS:
        raise wrong(path, name, f"one of {', '.join(sorted(OPS))}", OPS)
    return OPS[name]


def load_plugins(modules: Any, path: str = "plugins") -> None:
    """Import modules (names) so that the ops in them register. `UserError` for one that cannot be imported."""
    for i, name in enumerate(parse_plugins(modules, path)):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{path}[{i}]: {name!r}, expected a module that can be imported ({error})") from error
