"""The requests of a capture: parsed from a config in the form of programs, and written back to it."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxlab.config import config_folder
from fluxlab.errors import UserError, join, show, unknown_key, wrong
from fluxlab.probes import measures, per_query, shares, sites  # noqa: F401 (they register the kinds)
from fluxlab.probes.registry import PROBES, ProbeKind
from fluxlab.select.arguments import is_list, positive
from fluxlab.select.where import parse_blocks, parse_heads, parse_steps

MAX_MB = 512.0
"""The default of `max_mb`, in MB of 10⁶ bytes."""

WHERE = {"steps": parse_steps, "blocks": parse_blocks, "heads": parse_heads}
"""Where a request of any kind acts, with the parsers of these keys."""


@dataclass(frozen=True)
class Request:
    """One entry of a capture. `arguments` are those of its kind, in canonical form. `path` is for error messages."""

    name: str
    kind: str
    arguments: Mapping[str, Any]
    steps: str | list[int] | dict = "all"
    blocks: str | dict = "all"
    heads: str | list[int] = "all"
    average: tuple[str, ...] = ()
    path: str = ""

    def to_config(self) -> dict[str, Any]:
        """Return plain values for YAML or JSON, without those that equal their default."""
        defaults = PROBES[self.kind].defaults
        arguments = {k: v for k, v in self.arguments.items() if k not in defaults or v != defaults[k]}
        where = {key: getattr(self, key) for key in WHERE if getattr(self, key) != "all"}
        average = {"average": list(self.average)} if self.average else {}
        return {"kind": self.kind, **copy.deepcopy(arguments), **copy.deepcopy(where), **average}


@dataclass(frozen=True)
class Capture:
    """All requests of a run. Their results and working memory may take `max_mb` (10⁶ bytes)."""

    requests: tuple[Request, ...] = ()
    max_mb: float = MAX_MB

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | Capture | str | None", path: str = "capture") -> "Capture":
        """Parse a mapping of requests, or the name of a file in `configs/capture`. None is an empty capture.

        A request is `{name: {kind: words, words: [cat], blocks: …, steps: …, heads: …, average: [heads]}}`. The key
        `max_mb` next to the names sets the memory limit.

        Raises `UserError` with the path, the value and what is expected.
        """
        if isinstance(config, Capture):
            return config
        if isinstance(config, str):
            config = _preset(config, path)
        if config is None:
            return cls()
        if not isinstance(config, Mapping):
            raise wrong(path, config, "a mapping of requests, for instance {cats: {kind: words, words: [cat]}}")
        if isinstance(config.get("kind"), str):
            raise UserError(f"{path}: {show(dict(config))} is a request without a name, expected {{a: {{…}}}}")
        max_mb = positive(config.get("max_mb", MAX_MB), join(path, "max_mb"))
        requests = [(name, request) for name, request in config.items() if name != "max_mb"]
        return cls(tuple(_request(str(name), request, join(path, name)) for name, request in requests), max_mb)

    def to_config(self) -> dict[str, Any]:
        """Return plain nested values for YAML or JSON. `from_config` reads them back."""
        return {"max_mb": self.max_mb, **{request.name: request.to_config() for request in self.requests}}

    def __bool__(self) -> bool:
        return bool(self.requests)


def concept_words(capture: Capture) -> tuple[str, ...]:
    """Return all words that a capture compares."""
    requests = [request for request in capture.requests if request.kind == "concepts"]
    return tuple(dict.fromkeys(word for request in requests for word in request.arguments["words"]))


def _request(name: str, config: Any, path: str) -> Request:
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{path}: {name!r}, expected a name of letters, digits, _ and -")
    if not isinstance(config, Mapping):
        raise wrong(path, config, "a request such as {kind: words, words: [cat]}")
    kind = _kind(config.get("kind"), join(path, "kind"))
    keys = (*kind.parsers, *WHERE, "average")
    for key in config:
        if key not in ("kind", *keys):
            raise unknown_key(path, key, config[key], keys, f"key of {kind.name}")
    arguments = {}
    for key, parse in kind.parsers.items():
        value = config.get(key)
        if value is None and key in kind.required:
            raise UserError(f"{join(path, key)}: missing, {kind.name} needs it (keys: {', '.join(kind.parsers)})")
        arguments[key] = kind.defaults[key] if value is None else parse(value, join(path, key))
    where = {key: parse(config[key], join(path, key)) for key, parse in WHERE.items() if config.get(key) is not None}
    average = _average(config.get("average"), kind, join(path, "average"))
    return Request(name, kind.name, arguments, **where, average=average, path=path)


def _kind(name: Any, path: str) -> ProbeKind:
    listed = ", ".join(PROBES)
    if name is None:
        raise UserError(f"{path}: missing, expected one of {listed}")
    if not isinstance(name, str) or name not in PROBES:
        raise wrong(path, name, f"one of {listed}", PROBES)
    return PROBES[name]


def _average(value: Any, kind: ProbeKind, path: str) -> tuple[str, ...]:
    axes = [value] if isinstance(value, str) else [] if value is None else value
    if not is_list(axes):
        raise wrong(path, value, f"some of {', '.join(kind.averages)}")
    for i, axis in enumerate(axes):
        if axis not in kind.averages:
            expected = f"some of {', '.join(kind.averages)}" if kind.averages else f"none: {kind.name} has no averages"
            raise wrong(f"{path}[{i}]", axis, expected, kind.averages)
    return tuple(axis for axis in kind.averages if axis in axes)


def _preset(name: str, path: str) -> Any:
    """Return the contents of `configs/capture/<name>.yaml`."""
    from omegaconf import OmegaConf

    known = sorted(file.stem for file in (config_folder() / "capture").glob("*.yaml"))
    if name not in known:
        raise wrong(path, name, f"one of {', '.join(known)}, or a mapping of requests", known)
    return OmegaConf.to_container(OmegaConf.load(config_folder() / "capture" / f"{name}.yaml"))
