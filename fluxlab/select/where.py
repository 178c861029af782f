"""Where an edit acts besides its tokens: axes, steps, blocks, heads, side and strength.

The `parse_…` functions read a config without a model. The `resolve_…` functions apply the result to one.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fluxlab.errors import UserError, join, unknown_key, wrong
from fluxlab.select.arguments import AXES, EVERY_AXIS, choice, integer, is_list, named_axes, number

SIDES = ("both", "queries", "keys")


def parse_axes(value: Any, path: str) -> str | list[str]:
    if value == "all":
        return "all"
    if is_list(value):
        if not value:
            raise wrong(path, [], "at least one axis, or all")
        named = {name for i, part in enumerate(value) for name in named_axes(part, f"{path}[{i}]")}
        spelled = {part for part in value if isinstance(part, str)}
    else:
        named, spelled = set(named_axes(value, path)), set()
    if named == set(AXES) and not spelled & set(AXES):  # [t, h, w] of FLUX.2, which has one axis more
        return ["t", "h", "w"]
    return "all" if named.issuperset(AXES) else [name for name in EVERY_AXIS if name in named]


def _numbers(value: Any, path: str, accepted: str) -> list[int]:
    """Return whole numbers, ascending, from one, from text such as "0, 3-7" (both ends included), or a list of both."""
    if is_list(value):
        if not value:
            raise wrong(path, [], accepted)
        return sorted({n for i, part in enumerate(value) for n in _numbers(part, f"{path}[{i}]", accepted)})
    if isinstance(value, str):
        ranges = [re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part) for part in value.split(",")]
        if any(ends is None or int(ends[1]) > int(ends[2] or ends[1]) for ends in ranges):
            raise wrong(path, value, accepted)
        return sorted({n for ends in ranges for n in range(int(ends[1]), int(ends[2] or ends[1]) + 1)})
    return [integer(value, path, accepted)]


def parse_steps(value: Any, path: str) -> str | list[int] | dict:
    """Return "all", indices, `{fraction: [a, b]}` of the schedule, or `{sigma: [low, high]}`."""
    accepted = "all, indices such as [0, 1] or '0-3', {fraction: [0, 0.5]} or {sigma: [0.7, 1]}"
    if value == "all":
        return "all"
    if not isinstance(value, Mapping):
        if isinstance(value, str) and not re.search(r"\d", value):
            raise wrong(path, value, accepted, ("all", "fraction", "sigma"))
        return _numbers(value, path, accepted)
    for key in value:
        if key not in ("fraction", "sigma"):
            raise unknown_key(path, key, value[key], ("fraction", "sigma"), "key")
    if len(value) != 1:
        raise wrong(path, dict(value), "one of fraction and sigma")
    ((key, ends),) = value.items()
    ends_path = join(path, key)
    if not is_list(ends) or len(ends) != 2:
        raise wrong(ends_path, ends, "two numbers from 0 to 1")
    low, high = sorted(number(n, f"{ends_path}[{i}]") for i, n in enumerate(ends))
    if low < 0 or high > 1 or low == high:
        raise wrong(ends_path, list(ends), "two different numbers from 0 to 1")
    return {key: [low, high]}


def resolve_steps(steps: str | list[int] | dict, sigmas: Sequence[float], path: str) -> tuple[bool, ...]:
    """Return for each step whether the edit acts.

    Windows are half-open, so that two windows with a common bound share no step. `{fraction: [a, b]}` selects the steps
    that start at a share s of the schedule with a <= s < b. `{sigma: [low, high]}` selects the steps that start at a σ
    with low < σ <= high. A bound copied from a message, where σ is rounded, means the step it was printed for.

    Raises UserError for a step that the schedule does not have, or if no step is selected.
    """
    count = len(sigmas) - 1
    if steps == "all":
        return (True,) * count
    if isinstance(steps, list):
        for n in steps:
            if not -count <= n < count:
                raise wrong(path, n, f"a step of this run, 0 … {count - 1} (-1 is the last)")
        chosen = {n % count for n in steps}
    elif "fraction" in steps:
        low, high = steps["fraction"]
        chosen = {i for i in range(count) if low <= i / count < high}
    else:
        low, high = (_step_sigma(bound, sigmas[:-1]) for bound in steps["sigma"])
        chosen = {i for i in range(count) if low < sigmas[i] <= high}
    if not chosen:
        starts = ", ".join(f"{s:.3g}" for s in sigmas[:-1][:8]) + (" …" if count > 8 else "")
        raise UserError(f"{path}: {steps} selects none of the {count} steps, which start at σ = {starts}")
    return tuple(i in chosen for i in range(count))


def _step_sigma(bound: float, starts: Sequence[float]) -> float:
    """Return the σ that a bound means: that of the step which rounds to it, else the bound itself.

    Messages print σ with three digits, so a bound is compared with σ rounded to its own digits, three at least.
    """
    digits = next(n for n in range(3, 18) if float(f"{bound:.{n}g}") == bound)
    meant = [s for s in starts if float(f"{s:.{digits}g}") == bound]
    return min(meant, key=lambda s: abs(s - bound), default=bound)


def parse_blocks(value: Any, path: str) -> str | dict:
    """Return "all", or `{through: [...], double: [...] or "all", single: ...}` without the keys that are not needed."""
    accepted = "all, double, single, numbers through all blocks such as [0, 1] or '0-18', or {double: …, single: …}"
    if value == "all":
        return "all"
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("through", "double", "single"):
                raise unknown_key(path, key, value[key], ("through", "double", "single"), "key")
        if not value:
            raise wrong(path, {}, accepted)
        keys = [key for key in ("through", "double", "single") if key in value]
        return {k: "all" if value[k] == "all" else _numbers(value[k], join(path, k), accepted) for k in keys}
    blocks: dict[str, str | list[int]] = {}
    for i, part in enumerate(value if is_list(value) else [value]):
        part_path = f"{path}[{i}]" if is_list(value) else path
        if part in ("double", "single"):
            blocks[part] = "all"
        elif isinstance(part, str) and not re.search(r"\d", part):
            raise wrong(part_path, part, accepted, ("all", "double", "single"))
        else:
            blocks["through"] = sorted({*blocks.get("through", ()), *_numbers(part, part_path, accepted)})
    if not blocks:
        raise wrong(path, value, accepted)
    return {key: blocks[key] for key in ("through", "double", "single") if key in blocks}


def resolve_blocks(blocks: str | dict, double: int, single: int, path: str) -> frozenset[int]:
    """Return block numbers through the model, double blocks first. Raises UserError if the model lacks one."""
    if blocks == "all":
        return frozenset(range(double + single))
    chosen = set()
    for key, numbers in blocks.items():
        first, count = {"through": (0, double + single), "double": (0, double), "single": (double, single)}[key]
        for n in range(count) if numbers == "all" else numbers:
            if not 0 <= n < count:
                numbered = f"0-{double + single - 1} through: {double} double, {single} single"
                group = f"{key} block" if key != "through" else "block"
                raise wrong(path, n, f"a {group} below {count} (this model: {numbered})")
            chosen.add(first + n)
    if not chosen:
        raise UserError(f"{path}: {blocks} selects none of this model's {double} double and {single} single blocks")
    return frozenset(chosen)


def parse_heads(value: Any, path: str) -> str | list[int]:
    return "all" if value == "all" else _numbers(value, path, "all, or heads such as [0, 1] or '0-3'")


def parse_pairs(value: Any, path: str) -> list[int]:
    """numbers such as [0, 1] or 0-9"""
    return _numbers(value, path, "pairs such as [0, 1] or '0-9', from the highest frequency")


def resolve_heads(heads: str | list[int], count: int, path: str) -> frozenset[int] | None:
    """Return head numbers, or None for all heads. Raises UserError if the model lacks one."""
    if heads == "all":
        return None
    for n in heads:
        if not 0 <= n < count:
            raise wrong(path, n, f"a head below {count}")
    return None if len(heads) == count else frozenset(heads)


parse_side = choice(*SIDES)


def parse_strength(value: Any, path: str) -> float | list[list[float]]:
    """Return a number from 0 to 1, or points [σ, strength] in descending σ.

    `{from: a, to: b}` stands for the points [1, a] and [0, b].
    """
    accepted = "a number from 0 to 1, {from: 1, to: 0}, or points [[sigma, strength], …]"
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("from", "to"):
                raise unknown_key(path, key, value[key], ("from", "to"), "key")
        if len(value) != 2:
            raise wrong(path, dict(value), accepted)
        return _points([[1.0, value["from"]], [0.0, value["to"]]], path, accepted)
    if is_list(value):
        return _points(value, path, accepted)
    return _share(value, path, accepted)


def _points(value: Sequence, path: str, accepted: str) -> list[list[float]]:
    if not value or any(not is_list(point) or len(point) != 2 for point in value):
        raise wrong(path, list(value), accepted)
    points = [[_share(n, f"{path}[{i}]", accepted) for n in point] for i, point in enumerate(value)]
    if len({sigma for sigma, _ in points}) != len(points):
        raise wrong(path, list(value), "points of different sigma")
    return sorted(points, reverse=True)


def _share(value: Any, path: str, accepted: str) -> float:
    if not 0 <= number(value, path, accepted) <= 1:
        raise wrong(path, value, accepted)
    return float(value) + 0.0


def strength_at(strength: float | list[list[float]], sigma: float) -> float:
    """Return the strength at σ: linear between the points, constant beyond them."""
    if not isinstance(strength, list):
        return strength
    if sigma >= strength[0][0]:
        return strength[0][1]
    for (s0, v0), (s1, v1) in itertools.pairwise(strength):
        if sigma >= s1:
            return v1 + (v0 - v1) * (sigma - s1) / (s0 - s1)
    return strength[-1][1]


def parse_plugins(plugins: Any, path: str = "plugins") -> list[str]:
    """Return module names. Raises UserError if `plugins` is not a list of names such as `my_ops`."""
    names = [plugins] if isinstance(plugins, str) else plugins
    if not is_list(names):
        raise wrong(path, plugins, "a list of module names")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise wrong(f"{path}[{i}]", name, "the name of a module, such as my_ops or package.my_ops")
        if name.endswith(".py"):
            raise wrong(f"{path}[{i}]", name, f"the name of a module without its ending: {name[:-3]}")
    return list(names)
