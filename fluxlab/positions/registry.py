"""The registry of ops: it maps the word in a config to a function."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fluxlab.errors import UserError, join, wrong
from fluxlab.select.arguments import ArgumentType
from fluxlab.select.where import parse_plugins

WHERE = ("tokens", "axes", "steps", "blocks", "heads", "side", "seen_by", "strength")

ACTS_ON = {
    "ids": WHERE,
    "rotation": WHERE,
    "scale": ("tokens", "steps", "blocks", "heads", "side", "seen_by", "strength"),
    "attention": ("steps", "blocks", "heads", "strength"),
    "frequencies": WHERE,
    "windows": WHERE,
    "scores": ("axes", "steps", "blocks", "heads", "strength"),
    "heads": ("steps", "blocks", "heads", "strength"),
    "text": ("steps", "blocks", "heads", "strength"),
    "activations": ("tokens", "steps", "blocks", "heads", "seen_by", "strength"),
    "size": (),
}
"""What an op changes, and which keys of an edit apply to it."""


@dataclass(frozen=True)
class Op:
    """An entry of the registry.

    types: the type of each argument, by its name in a config. names: the same arguments' names in Python. tokens: what
    an edit selects by default. axes: those it acts on by default. timed: whether it depends on the noise level.
    sees_latent: whether it depends on the latents of the sample at the step.
    """

    name: str
    function: Callable
    types: Mapping[str, ArgumentType]
    names: Mapping[str, str]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    acts_on: str = "ids"
    tokens: str = "image"
    axes: tuple[str, ...] | None = None
    timed: bool = False
    sees_latent: bool = False

    @property
    def where(self) -> tuple[str, ...]:
        return ACTS_ON[self.acts_on]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def source(self) -> str:
        """File and line of the function."""
        code = inspect.unwrap(self.function).__code__
        return f"{code.co_filename}:{code.co_firstlineno}"

    def parse(self, given: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Return all arguments, defaults included, in canonical form. Raises UserError for a missing or wrong one."""
        for name in self.required:
            if given.get(name) is None:
                others = ", ".join(self.types)
                raise UserError(f"{join(path, name)}: missing, {self.name} needs it (arguments: {others})")
        for name, value in given.items():
            if _has_learn(value):
                raise UserError(f"{join(path, name)}: learn, expected a number; python -m fluxlab.learn finds one")
        with bugs_named(f"in argument types of op {self.name} ({self.source}), edit {path}"):
            return {
                name: parse(given[name], join(path, name)) if given.get(name) is not None else self.defaults.get(name)
                for name, parse in self.types.items()
            }


def _has_learn(value: Any) -> bool:
    """Return whether an argument, or a part of it, is to be learned."""
    if isinstance(value, Mapping):
        return "learn" in value or any(map(_has_learn, value.values()))
    return isinstance(value, list) and any(map(_has_learn, value))


OPS: dict[str, Op] = {}


@contextmanager
def bugs_named(what: str) -> Iterator[None]:
    """Add the note `what` to any exception that is not for the user to fix. It keeps its traceback."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:  # the command line reports an OSError in one line, without the traceback
        raise RuntimeError(f"{type(error).__name__}: {error} ({what})") from error
    except Exception as error:
        error.add_note(what)
        raise


def op(
    name: str,
    types: Mapping[str, ArgumentType] | None = None,
    *,
    acts_on: str = "ids",
    tokens: str = "image",
    axes: tuple[str, ...] | None = None,
    timed: bool = False,
    sees_latent: bool = False,
) -> Callable:
    """Register a function as the op `name`.

    types: the type of each argument after (ids, scope), by its name in YAML. acts_on: a key of `ACTS_ON`. tokens,
    axes: what an edit selects by default; None for all axes. timed: whether the op depends on the noise level, which
    is only possible for ops on frequencies: they see it as `spectrum.t`. sees_latent: whether it depends on the
    sample's latents at the step, which such an op sees as `spectrum.latent`. It is called for each sample and step.

    A name that Python reserves gets an underscore in the function: `from` is `from_`.
    """
    types = dict(types or {})

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())
        arguments = {p.name.rstrip("_"): p for p in parameters if p.name.rstrip("_") in types}
        reserved = [key for key in types if key in (*WHERE, "op")]
        assert not reserved, f"op {name}: {reserved[0]} is a key of every edit, choose another argument name"
        assert len(arguments) == len(types), f"op {name}: types {list(types)} do not fit {parameters}"
        assert acts_on in ACTS_ON, f"op {name}: acts_on {acts_on!r}, expected one of {', '.join(ACTS_ON)}"
        known = OPS.get(name)
        if known and (known.function.__module__, known.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise UserError(f"op {name!r} is taken by {known.function.__module__}; choose another name")
        required = tuple(key for key in types if arguments[key].default is inspect.Parameter.empty)
        defaults = {
            key: None if arguments[key].default is None else parse(arguments[key].default, key)
            for key, parse in types.items()
            if key not in required
        }
        names = {key: parameter.name for key, parameter in arguments.items()}
        OPS[name] = Op(
            name, function, types, names, required, defaults, acts_on, tokens, axes, timed or sees_latent, sees_latent
        )
        return function

    return register


def find_op(name: Any, path: str) -> Op:
    """Return the op of a name. Raises UserError if there is none."""
    if name is None:
        raise UserError(f"{path}: missing, expected one of {', '.join(sorted(OPS))}")
    if not isinstance(name, str) or name not in OPS:
        raise wrong(path, name, f"one of {', '.join(sorted(OPS))}", OPS)
    return OPS[name]


_plugins: dict[str, None] = {}


def loaded_plugins() -> list[str]:
    """Return the modules that `load_plugins` has imported, for other processes of this run."""
    return list(_plugins)


def load_plugins(modules: Any, path: str = "plugins") -> None:
    """Import modules by name, so that the ops in them register.

    Raises UserError if there is no such module, or if an op's name is taken. An error inside a module keeps its
    traceback.
    """
    for i, name in enumerate(parse_plugins(modules, path)):
        try:
            with bugs_named(f"while importing {path}[{i}]: {name}"):
                importlib.import_module(name)
            _plugins.setdefault(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
            raise UserError(
                f"{path}[{i}]: {name!r}, expected a module in the current folder, on PYTHONPATH or installed ({error})"
            ) from None
