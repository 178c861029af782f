"""Config files for Hydra: read as UTF-8, with errors that name the file and line, and with text kept as written.

YAML 1.1 reads `No` as false, `1_000` as 1000 and `1.50` as 1.5, and OmegaConf fills in `${…}` and takes `???` for a
missing value. None of this may change a prompt or a name. Such values are therefore encoded as plain words while Hydra
and OmegaConf handle them (`encode`), and decoded when the config is finished (`decode`).
"""

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader  # the reader of `OmegaConf.load`, for the positions of its nodes
from omegaconf.errors import OmegaConfBaseException

from fluxlab.errors import UserError, show

TEXT_KEYS = ("name", "caption", "baseline", "negative_prompt")
"""Top-level keys whose value is text, next to `prompts`."""

PATH_KEYS = ("out", "prompts_file", "clip", "dino", "model.path", "model.autoencoder", "model.text")
"""Keys that hold a path or a hub id. They are text too, but `${…}` is filled in."""

_NAMED = ("variants", "capture", "variants.*", "regions")
"""Mappings whose keys are names."""

_GLOBAL_GROUPS = ("exp", "train")
"""Groups whose files set top-level keys, with or without the line `# @package _global_`."""

_SCHEME = "fluxlab"
_MARK = "fluxlab_text_"
_TYPES = {"bool": "true or false", "int": "a number", "float": "a number", "null": "null"}

folders: list[Path] = []
"""The user's own config folders while a config is composed (`--config-dir`)."""

active = False
"""Whether it is fluxlab that composes a config, and not another Hydra application in the same process."""


def encode(text: str, where: str) -> str:
    """Return a word that neither Hydra's grammar nor OmegaConf changes; `decode` returns the text."""
    try:
        return _MARK + text.encode().hex()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text!a} contains half a character (a lone surrogate)") from None


def decode(value: Any) -> Any:
    """Return `value` with every encoded text replaced by the text, in lists, mappings and messages."""
    if isinstance(value, dict):
        return {decode(key): decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, str):
        return re.sub(rf"{_MARK}((?:[0-9a-f]{{2}})*)", lambda match: bytes.fromhex(match[1]).decode(), value)
    return value


def read_yaml(file: Path, package: str = "") -> Any:
    """Return what a YAML file contains. `package` is the dotted key that its top level is merged into.

    Text is encoded. Raises UserError, in one to three lines with file and line, for a file that is not UTF-8, invalid
    YAML, a key that occurs twice, and a number or boolean where text is expected.
    """
    return _construct(read_text(file), file, package)


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark. Raises UserError with the line that is not UTF-8."""
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _construct(text: str, file: Path, package: str) -> Any:
    class Loader(get_yaml_loader()):
        """OmegaConf's loader; a class of its own because constructors are registered on the class."""

    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        _check(node, tuple(filter(None, package.split("."))), file, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{file}, {_problem(error, text)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{file}, line {line}: the character {chr(error.character)!a} is not allowed in YAML") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: {error}") from None  # a number of more than 4300 digits
    finally:
        if loader:
            loader.dispose()


def _problem(error: yaml.MarkedYAMLError, text: str) -> str:
    """Return `line 3: …` for an error of the YAML parser, with the place where the open construct started."""
    mark, problem = error.problem_mark or error.context_mark, " ".join((error.problem or "invalid YAML").split())
    line = text.split("\n")[min(mark.line, text.count("\n"))]
    if "\\t" in problem or "\t" in line[: len(line) - len(line.lstrip())]:
        return f"line {mark.line + 1}: a tab; indent with spaces"
    if "mapping values are not allowed" in problem:
        return f"line {mark.line + 1}: a second colon; write a value that contains one in quotes"
    context, start = error.context or "", error.context_mark
    if start is None or start.line == mark.line or "flow" not in context:
        return f"line {mark.line + 1}: {problem}"
    bracket = "{" if "mapping" in context else "["
    return f"line {mark.line + 1}: {problem}; is the {bracket} of line {start.line + 1} closed?"


def _check(node: yaml.Node, path: tuple[str, ...], file: Path, seen: set[int]) -> None:
    """Refuse duplicate keys and text that is not a string, and encode text, in a node and all below it."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, path, file)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, (*path, "*"), file, seen)
    else:
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{_where(file, key)}: a key must be a single word; is a quote or a colon missing?")
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"{_where(file, key)}: the key {key.value} was set in line {lines[key.value]} already")
            lines[key.value] = key.start_mark.line + 1
            if _holds_names(path):
                _refuse_other_types(key, ".".join(path), file)
            _check(value, (*path, key.value), file, seen)


def _check_scalar(node: yaml.ScalarNode, path: tuple[str, ...], file: Path) -> None:
    if node.tag.endswith(":int") and re.fullmatch(r"[-+]?(0[0-7_]+|[\d_]+(:\d+)+)", node.value):
        read_as = "an octal number" if ":" not in node.value else "a number of base 60"
        raise UserError(f"{_where(file, node)}: YAML reads {node.value} as {read_as}; write it in decimal digits")
    key = ".".join(path)
    words = "words" in path[-2:] and path[-1] in ("words", "*")
    is_text = key in (*TEXT_KEYS, "prompts", "prompts.*") or words
    may_be_null = path[-1:] != ("*",) and key != "prompts"
    if (is_text or key in PATH_KEYS) and not (may_be_null and node.tag.endswith(":null")):
        _refuse_other_types(node, key.removesuffix(".*"), file)
        if is_text:
            node.value = encode(node.value, _where(file, node))


def _holds_names(path: tuple[str, ...]) -> bool:
    if path[-1:] == ("regions",):
        return True
    return ".".join((*path[:1], *("*" for _ in path[1:]))) in _NAMED


def _refuse_other_types(node: yaml.Node, key: str, file: Path) -> None:
    if isinstance(node, yaml.ScalarNode) and not node.tag.endswith((":str", ":merge")):
        read_as = _TYPES.get(node.tag.rpartition(":")[2], "another type")
        raise UserError(
            f"{_where(file, node)}: {key}: YAML reads {node.value or 'nothing'} as {read_as}, but text is expected; "
            f'write it in quotes: "{node.value}"'
        )


def _where(file: Path, node: yaml.Node) -> str:
    return f"{file}, line {node.start_mark.line + 1}"


class TextSource(ConfigSource):
    """A folder of config files, read by `read_yaml`."""

    @staticmethod
    def scheme() -> str:
        return _SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if file is None:
            raise ConfigLoadError(f"Config not found : {Path(self.path, config_path)}")
        try:
            header = ConfigSource._get_header_dict(read_text(file)[:512])
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"{file}: {error}") from None
        group = config_path.partition("/")[0] if "/" in config_path else ""
        if header["package"] is None and (group in _GLOBAL_GROUPS):
            header["package"] = "_global_"
        package = header["package"] or config_path.rpartition("/")[0].replace("/", ".")
        values = read_yaml(file, "" if package == "_global_" else package)
        if not isinstance(values, dict):
            raise UserError(f"{file}: holds {show(decode(values))}, expected keys with values, such as name: mine")
        if not isinstance(values.get("defaults", []), list):
            raise UserError(f"{file}: defaults: {show(decode(values['defaults']))}, expected a list")
        if package == "_global_":
            _choose_prompts(values, file)
        try:
            config = OmegaConf.create(values)
        except OmegaConfBaseException as error:
            raise UserError(f"{file}: {decode(str(error)).splitlines()[0]}") from None
        return ConfigResult(config=config, path=self.full_path(), provider=self.provider, header=header)

    def available(self) -> bool:
        return self.is_group("")

    def is_group(self, config_path: str) -> bool:
        return os.path.isdir(os.path.join(self.path, config_path))

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found: list[str] = []
        for name in os.listdir(os.path.join(self.path, config_path)):
            self._list_add_result(found, os.path.join(config_path, name), name, results_filter)
        return sorted(set(found))

    def _file(self, config_path: str) -> Path | None:
        names = [config_path] if config_path.endswith((".yaml", ".yml")) else [f"{config_path}{e}" for e in _ENDINGS]
        files = (Path(self.path, name) for name in names)
        return next((file for file in files if os.path.isfile(file)), None)


_ENDINGS = (".yaml", ".yml")


def _choose_prompts(values: dict[str, Any], file: Path) -> None:
    """Let the key that a file sets, prompts or prompts_file, replace the other one of the files before it."""
    if values.get("prompts") and values.get("prompts_file"):
        raise UserError(f"{file}: sets both prompts and prompts_file; leave one of them out")
    if values.get("prompts_file"):
        values["prompts"] = []
    elif "prompts" in values:
        values["prompts_file"] = None
    if isinstance(values.get("prompts"), str):
        values["prompts"] = [values["prompts"]]


class TextSearchPath(SearchPathPlugin):
    """Reads fluxlab's configs, and the user's folders after them, through `TextSource`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if active:
            for element in search_path.get_path():
                if element.provider == "main":
                    element.path = f"{_SCHEME}://{element.path.removeprefix('file://')}"
            for folder in folders:
                search_path.append("--config-dir", f"{_SCHEME}://{folder.resolve()}")


def experiment_files(places: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield (name, file) of every experiment in `exp/` of the folders, in the order of their names."""
    files = {
        file.relative_to(place / "exp").with_suffix("").as_posix(): file
        for place in places
        for ending in _ENDINGS
        for file in (place / "exp").rglob(f"*{ending}")
    }
    yield from sorted(files.items())


Plugins.instance().register(TextSource)
Plugins.instance().register(TextSearchPath)
