"""Arguments to learn: `{learn: 5.0, min: 0, max: 16}` in place of a number of a program."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, show, unknown_key
from fluxlab.positions import Context, Program, compile_programs
from fluxlab.positions.edit import PARSE
from fluxlab.positions.registry import find_op
from fluxlab.positions.tensors import as_tensor, has_tensor
from fluxlab.select.arguments import is_list, number

KEYS = ("learn", "min", "max")
STEPWISE = ("quantize", "shuffle")
"""Ops whose result is a step function of their arguments."""

SMALLEST = (None, 0.0, 1e-6, 1 + 1e-6)
"""Lower limits that arguments may have of their own: none, 0, above 0, above 1."""

LARGEST_STRENGTH = 1 - 1e-6
"""At a strength of 1 an edit returns the op's result as it is, and no gradient reaches the strength."""

H = 1e-5
"""Step of finite differences, as a share of an argument's unit."""


@dataclass(frozen=True)
class Learned:
    """An argument to learn. key: (edit, argument, …) in the config. low, high: bounds, None for no bound.

    places: where it is in the canonical arguments of its edit: (argument, index, …), one or several.
    """

    path: str
    key: tuple[Any, ...]
    start: float
    low: float | None
    high: float | None
    places: tuple[tuple[Any, ...], ...]

    @property
    def unit(self) -> float:
        """The size of a change of 1 for the optimiser: half the range, or without bounds |start|, at least 1."""
        if self.low is not None and self.high is not None:
            return (self.high - self.low) / 2
        return max(1.0, abs(self.start))

    @property
    def name(self) -> str:
        """The path within the program, such as `a.by.row`."""
        return ".".join(map(str, self.key))


@dataclass(frozen=True)
class Template:
    """A program with arguments to learn. config: that of the program with the starts in their place."""

    config: Mapping[str, Any]
    program: Program
    learned: tuple[Learned, ...]

    @property
    def starts(self) -> list[float]:
        return [argument.start for argument in self.learned]

    def at(self, values: Tensor) -> Program:
        """Return the program whose arguments are `values` `(n,)`, with their gradients."""
        edits = {edit.name: edit for edit in self.program.edits}
        for value, argument in zip(values, self.learned, strict=True):
            edit = edits[argument.key[0]]
            for place in argument.places:
                if place[0] in PARSE:
                    edit = replace(edit, where=_with(edit.where, place, value))
                else:
                    edit = replace(edit, arguments=_with(edit.arguments, place, value))
            edits[edit.name] = edit
        return Program(tuple(replace(e, arguments=_stacked(e.arguments)) for e in edits.values()))

    def config_at(self, values: Sequence[float]) -> dict[str, Any]:
        """Return the config of an ordinary program."""
        config = copy.deepcopy(dict(self.config))
        for value, argument in zip(values, self.learned, strict=True):
            config = _with(config, argument.key, float(value))
        return config


def has_learned(config: Any) -> bool:
    """Return whether a config of a program has an argument to learn."""
    return any(True for _ in _found(config, ()))


def read_template(config: Mapping[str, Any], path: str) -> Template:
    """Return the template of a program's config. Raises UserError, in one line, for what cannot be learned."""
    found = list(_found(config, ()))
    if not found:
        raise UserError(f"{path}: nothing to learn; write {{learn: <start>}} in place of a number")
    plain = copy.deepcopy(dict(config))
    for key, given in found:
        plain = _with(plain, key, _start(join(path, *key), given))
    learned = tuple(_learned(plain, key, given, path) for key, given in found)
    program = Program.from_config(plain, path)
    if program.sees_latent:
        raise UserError(f"{path}: an op that sees the latents has no gradient to learn by, leave it out")
    return Template(plain, program, learned)


def _found(config: Any, key: tuple) -> Iterator[tuple[tuple, Mapping]]:
    if isinstance(config, Mapping):
        if "learn" in config:
            yield key, config
            return
        for name, value in config.items():
            yield from _found(value, (*key, name))
    elif is_list(config):
        for i, value in enumerate(config):
            yield from _found(value, (*key, i))


def _start(path: str, given: Mapping[str, Any]) -> float:
    for key in given:
        if key not in KEYS:
            raise unknown_key(path, key, given[key], KEYS, "key of learn")
    start = number(given["learn"], join(path, "learn"), "the number to start from")
    low, high = (None if given.get(key) is None else number(given[key], join(path, key)) for key in ("min", "max"))
    if low is not None and high is not None and low >= high:
        raise UserError(f"{path}: min {low:g}, max {high:g}, expected min < max")
    if (low is not None and start < low) or (high is not None and start > high):
        bounds = f"{'' if low is None else f'{low:g} ≤ '}start{'' if high is None else f' ≤ {high:g}'}"
        raise UserError(f"{path}: learn {start:g} is outside of its bounds, expected {bounds}")
    return start


def _learned(plain: Mapping[str, Any], key: tuple, given: Mapping[str, Any], path: str) -> Learned:
    """Find where an argument is in the canonical form: its parser is called with the start and a number close to it."""
    where = join(path, *key)
    if len(key) < 2 or not isinstance(plain[key[0]], Mapping) or key[1] == "op":
        raise UserError(
            f"{where}: learn stands for a number of an edit, such as {{a: {{op: offset, by: {{learn: 5}}}}}}"
        )
    edit, name = plain[key[0]], key[1]
    op = find_op(edit.get("op"), join(path, key[0], "op"))
    if name not in op.types and name not in op.where:
        raise unknown_key(join(path, key[0]), name, given, (*op.types, *op.where), f"key of {op.name}")
    parse = op.types[name] if name in op.types else PARSE[name]
    start, meaning = _value(plain, key), (parse.__doc__ or "").partition("\n")[0]
    if op.acts_on in ("activations", "size"):
        raise UserError(f"{where}: learn needs gradients, which edits of {op.acts_on} do not have")
    if op.name in STEPWISE:
        raise UserError(f"{where}: the result of {op.name} is a step function, which has no useful gradient")

    def parsed(value: float) -> Any:
        return parse(_value(_with(plain, key, value), key[:2]), join(path, *key[:2]))

    def accepts(value: float) -> bool:
        try:
            parsed(value)
        except UserError:
            return False
        return True

    if name in PARSE and name != "strength":
        raise UserError(f"{where}: {name} selects where the edit acts, which has no gradient to learn by")
    if not accepts(start):
        raise UserError(f"{where}: learn {start:g} is not accepted, {name} of {op.name} is {meaning}")
    close = next((v for v in (start * 1.001 + 1e-4, start * 0.999 - 1e-4) if accepts(v)), None)
    places = [] if close is None else _differences(parsed(start), parsed(close), start, close, (name,))
    if not places or isinstance(_at(parsed(start), places[0][1:]), int):
        raise UserError(f"{where}: {name} of {op.name} is {meaning}, expected an argument that takes any number")
    low, high = (None if given.get(bound) is None else float(given[bound]) for bound in ("min", "max"))
    for bound, value in (("min", low), ("max", high)):
        if value is not None and not accepts(value):
            raise UserError(f"{join(where, bound)}: {value:g} is not accepted, {name} of {op.name} is {meaning}")
    if low is None:
        low = next((v for v in SMALLEST if accepts(min(start, 0.0) - 1e6 if v is None else v)), None)
    if name == "strength":
        high = LARGEST_STRENGTH if high is None else min(high, LARGEST_STRENGTH)
        start = min(start, high)
    return Learned(where, key, start, low, high, tuple(places))


def _differences(a: Any, b: Any, start: float, close: float, place: tuple) -> list[tuple]:
    """Return where `a` is the start and `b` the number close to it. Empty if they differ in any other way."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        parts = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        parts = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [place] if a == start and b == close else []
    return [found for key, x, y in parts if x != y for found in _differences(x, y, start, close, (*place, key))]


def _value(config: Any, key: Sequence) -> Any:
    for part in key:
        config = config[part]
    return config


_at = _value


def _with(config: Any, key: Sequence, value: Any) -> Any:
    """Return a copy of nested mappings and lists with `value` at `key`."""
    if not key:
        return value
    first, *rest = key
    if isinstance(config, Mapping):
        return {**config, first: _with(config[first], rest, value)}
    return [_with(part, rest, value) if i == first else part for i, part in enumerate(config)]


def _stacked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in which nested lists with a tensor among their numbers are one tensor."""
    return {key: _as_one(value) if has_tensor(value) else value for key, value in arguments.items()}


def _as_one(value: Any) -> Any:
    if not (isinstance(value, list) and isinstance(value[0], list)):  # numbers per axis: the op fills in the others
        return value
    like = next(part for part in _leaves(value) if isinstance(part, Tensor))
    return as_tensor(value, like)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def check_smooth(template: Template, context: Context) -> None:
    """Raise UserError unless the derivatives of tables and masks by each argument are those of finite differences.

    Tables are computed in fp64 at every step of the run. Words are those of the first prompt.
    """
    exact = replace(context, ids=context.ids.double())
    if exact.prompts is not None:
        exact = replace(exact, prompts=exact.prompts[:1])

    def projected(values: Tensor) -> Tensor:
        compiled, generator = compile_programs([template.at(values)], exact), torch.Generator().manual_seed(0)
        total = values.new_zeros(())
        for t in context.sigmas[:-1]:
            for part in _distinct(compiled.at(t)):
                weight = torch.randn(part.shape[-2:], generator=generator, dtype=torch.float64)
                total = total + (torch.where(part.isfinite(), part, 0).double() * weight).sum()
        return total

    start = torch.tensor(template.starts, dtype=torch.float64)
    values = start.clone().requires_grad_()
    with torch.enable_grad():
        total = projected(values)
        found = torch.autograd.grad(total, values, allow_unused=True)[0] if total.requires_grad else None
    found = torch.zeros_like(start) if found is None else found
    for i, argument in enumerate(template.learned):
        moved, h = [], H * argument.unit
        ends = [min(argument.start + h, math.inf if argument.high is None else argument.high), argument.start - h]
        if argument.low is not None:
            ends[1] = max(ends[1], argument.low)
        with torch.enable_grad():  # a factor of 1 without gradients is left out of the tables
            for end in ends:
                value = start.clone()
                value[i] = end
                moved.append(float(projected(value.requires_grad_()).detach()))
        expected = (moved[0] - moved[1]) / (ends[0] - ends[1])
        largest = max(abs(expected), abs(float(found[i])))
        if largest < 1e-9:
            raise UserError(f"{argument.path}: changes nothing at its start {argument.start:g}, or only in jumps")
        if abs(float(found[i]) - expected) > 1e-3 * largest:
            raise UserError(
                f"{argument.path}: not smooth at its start {argument.start:g}, or not differentiable; "
                "start elsewhere, or learn another argument"
            )


def _distinct(placement: Any) -> list[Tensor]:
    """Return every tensor of a placement once."""
    found: dict[int, Tensor] = {}

    def walk(x: Any) -> None:
        if isinstance(x, Tensor):
            found[id(x)] = x
        elif isinstance(x, list | tuple):
            for part in x:
                walk(part)

    walk(placement)
    return [part for part in found.values() if part.is_floating_point()]


def described(values: Sequence[float], template: Template) -> str:
    """Return `a.factor 1.25, b.by.row 3`."""
    named = zip(template.learned, values, strict=True)
    return ", ".join(f"{argument.name} {value:.6g}" for argument, value in named) or show(None)
