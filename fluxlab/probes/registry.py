"""The kinds of request. `@probe` registers one; captures, the table in the docs and the tests find it here."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxlab.errors import UserError

if TYPE_CHECKING:
    from fluxlab.probes.outputs import Measure

AVERAGES = ("steps", "blocks", "heads")
"""What every kind of request can be averaged over, unless it says otherwise."""

COMMON = ("kind", "steps", "blocks", "heads", "average")
"""Keys of every request."""

Parser = Callable[[Any, str], Any]
"""(value, path) → the value in canonical form. Raises `UserError` that names the path."""


@dataclass(frozen=True)
class ProbeKind:
    """A registered kind of request.

    function: (context, **arguments) → `Measure`. parsers: one per argument, by its YAML name. parameters: the name of
    each argument in Python. required: arguments without a default. averages: axes that results can be averaged over.
    """

    name: str
    function: "Callable[..., Measure]"
    parsers: Mapping[str, Parser]
    parameters: Mapping[str, str]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    averages: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first paragraph of the function's docstring, on one line."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())

    def measure(self, context: Any, arguments: Mapping[str, Any]) -> "Measure":
        """Call the function with arguments by their YAML names."""
        return self.function(context, **{self.parameters[key]: value for key, value in arguments.items()})


PROBES: dict[str, ProbeKind] = {}


def probe(
    name: str, arguments: Mapping[str, Parser] | None = None, *, averages: tuple[str, ...] = AVERAGES
) -> Callable[[Callable], Callable]:
    """Register a function (context, …) → `Measure` as the kind of request `name`.

    arguments: a parser for each argument after `context`, by its YAML name. Defaults are those of the function. An
    argument whose name Python reserves ends with an underscore in the function: `from` is `from_`.
    averages: axes that results can be averaged over. With "tokens" among them, the function must average over the
    queries itself where `context.averages_tokens` is set.

    The name of another registered function raises `UserError`.
    """
    parsers = dict(arguments or {})

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        named = {parameter.name.rstrip("_"): parameter for parameter in parameters}
        assert set(named) == set(parsers), f"probe {name}: parsers {list(parsers)} do not match {list(named)}"
        clash = [key for key in parsers if key in COMMON]
        assert not clash, f"probe {name}: {clash[0]} is a key of every request, choose another argument"
        known = PROBES.get(name)
        if known and _origin(known.function) != _origin(function):
            raise UserError(f"probe {name!r} is registered by {known.function.__module__}; choose another name")
        required = tuple(key for key in parsers if named[key].default is inspect.Parameter.empty)
        defaults = {
            key: None if named[key].default is None else parse(named[key].default, key)
            for key, parse in parsers.items()
            if key not in required
        }
        python_names = {key: named[key].name for key in parsers}
        PROBES[name] = ProbeKind(name, function, parsers, python_names, required, defaults, averages)
        return function

    return register


def _origin(function: Callable) -> tuple[str, str]:
    return function.__module__, function.__qualname__
