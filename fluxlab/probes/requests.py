"""What can be asked of a probe: requests, read from a config in the language of programs and written back."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxlab.config import config_folder
from fluxlab.errors import UserError, join, show, unknown_key, wrong
from fluxlab.select.arguments import choice, integer, is_list, positive
from fluxlab.select.tokens import parse_tokens
from fluxlab.select.where import parse_blocks, parse_heads, parse_steps

MAX_MB = 512.0
"""The budget where a config names none, in MB of 10⁶ bytes."""

AVERAGES = ("steps", "blocks", "heads")


def _words(value: Any, path: str) -> str | list[str]:
    """ "all", or words and phrases as programs name them."""
    return "all" if value == "all" else parse_tokens({"words": value}, path.rpartition(".")[0])["words"]


def _regions(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise wrong(path, value, "a mapping of names to tokens, such as {sky: {box: [0, 0, 4, 16]}, ground: text}")
    return {str(name): parse_tokens(tokens, join(path, name)) for name, tokens in value.items()}


def _sample(value: Any, path: str) -> int:
    if integer(value, path, "a sample of the batch, from 0") < 0:
        raise wrong(path, value, "a sample of the batch, from 0")
    return int(value)


REQUIRED = object()


@dataclass(frozen=True)
class Kind:
    """A kind of request: (parser, default) of its own keys, and what it can be averaged over."""

    keys: Mapping[str, tuple[Callable[[Any, str], Any], Any]]
    averages: tuple[str, ...] = AVERAGES


KINDS = {
    "words": Kind({"words": (_words, "all"), "direction": (choice("image_to_word", "word_to_image", "both"), "both")}),
    "regions": Kind({"regions": (_regions, REQUIRED)}),
    "map": Kind({"from": (parse_tokens, REQUIRED), "to": (parse_tokens, REQUIRED)}),
    "quadrants": Kind({}),
    "entropy": Kind({"tokens": (parse_tokens, "image")}, (*AVERAGES, "tokens")),
    "distance": Kind({"tokens": (parse_tokens, "image")}, (*AVERAGES, "tokens")),
    "peak": Kind({"tokens": (parse_tokens, "image")}, ()),
    "similarity": Kind({"tokens": (parse_tokens, "image"), "to": (_sample, 0)}, (*AVERAGES, "tokens")),
    "logits": Kind({"from": (parse_tokens, REQUIRED), "to": (parse_tokens, REQUIRED), "against": (parse_tokens, None)}),
}
COMMON = {"steps": parse_steps, "blocks": parse_blocks, "heads": parse_heads}


@dataclass(frozen=True)
class Request:
    """One thing to look at. `arguments` are its kind's own keys, all selections canonical; `path` is for errors."""

    name: str
    kind: str
    arguments: Mapping[str, Any]
    steps: str | list[int] | dict = "all"
    blocks: str | dict = "all"
    heads: str | list[int] = "all"
    average: tuple[str, ...] = ()
    path: str = ""

    def to_config(self) -> dict[str, Any]:
        """Plain values; what equals its default is left out."""
        own = {k: v for k, v in self.arguments.items() if v != KINDS[self.kind].keys[k][1]}
        common = {key: getattr(self, key) for key in COMMON if getattr(self, key) != "all"}
        average = {"average": list(self.average)} if self.average else {}
        return {"kind": self.kind, **copy.deepcopy(own), **copy.deepcopy(common), **average}


@dataclass(frozen=True)
class Capture:
    """Everything to look at in a run, within a budget of `max_mb` (10⁶ bytes) for results and working memory."""

    requests: tuple[Request, ...] = ()
    max_mb: float = MAX_MB

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | Capture | str | None", path: str = "capture") -> "Capture":
        """A capture from `{name: {kind: words, words: [cat], blocks: …, steps: …, heads: …, average: [heads]}}`, from
        the name of a file in `configs/capture`, or nothing. `max_mb` among the names is the budget.

        Raises `UserError`, one line, naming the path of what it cannot take, the value and what would be accepted.
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
        """Plain nested values for YAML or JSON that `from_config` reads back."""
        return {"max_mb": self.max_mb, **{request.name: request.to_config() for request in self.requests}}

    def __bool__(self) -> bool:
        return bool(self.requests)


def _request(name: str, config: Any, path: str) -> Request:
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{path}: {name!r}, expected a name of letters, digits, _ and -")
    if not isinstance(config, Mapping):
        raise wrong(path, config, "a request such as {kind: words, words: [cat]}")
    given, listed = config.get("kind"), ", ".join(KINDS)
    if given is None:
        raise UserError(f"{join(path, 'kind')}: missing, expected one of {listed}")
    if not isinstance(given, str) or given not in KINDS:
        raise wrong(join(path, "kind"), given, f"one of {listed}", KINDS)
    kind = KINDS[given]
    for key in config:
        if key not in ("kind", *kind.keys, *COMMON, "average"):
            raise unknown_key(path, key, config[key], (*kind.keys, *COMMON, "average"), f"key of {given}")
    arguments = {}
    for key, (parse, default) in kind.keys.items():
        value = config.get(key)
        if value is None and default is REQUIRED:
            raise UserError(f"{join(path, key)}: missing, {given} needs it (keys: {', '.join(kind.keys)})")
        arguments[key] = default if value is None else parse(value, join(path, key))
    common = {key: parse(config[key], join(path, key)) for key, parse in COMMON.items() if config.get(key) is not None}
    average = _average(config.get("average"), given, join(path, "average"))
    return Request(name, given, arguments, **common, average=average, path=path)


def _average(value: Any, kind: str, path: str) -> tuple[str, ...]:
    possible = KINDS[kind].averages
    given = [value] if isinstance(value, str) else [] if value is None else value
    if not is_list(given):
        raise wrong(path, value, f"some of {', '.join(possible)}")
    for i, part in enumerate(given):
        if part not in possible:
            accepted = f"some of {', '.join(possible)}" if possible else f"none: places do not average ({kind})"
            raise wrong(f"{path}[{i}]", part, accepted, possible)
    return tuple(name for name in possible if name in given)


def _preset(name: str, path: str) -> Any:
    """The contents of `configs/capture/<name>.yaml`."""
    from omegaconf import OmegaConf

    known = sorted(file.stem for file in (config_folder() / "capture").glob("*.yaml"))
    if name not in known:
        raise wrong(path, name, f"one of {', '.join(known)}, or a mapping of requests", known)
    return OmegaConf.to_container(OmegaConf.load(config_folder() / "capture" / f"{name}.yaml"))
