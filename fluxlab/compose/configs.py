"""From the words of a command line to checked configs, with Hydra."""

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from fluxlab.compose.explain import explain, short, unknown_key
from fluxlab.config import config_folder
from fluxlab.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Combination(Generic[T]):
    """One of the runs of -m. words: its own command line; settings: the part that differs between the runs."""

    words: list[str]
    settings: str
    config: T


def compose(
    name: str,
    schema: type[T],
    schema_name: str,
    arguments: Sequence[str],
    folder: Path | None = None,
    show: bool = False,
) -> "T | str":
    """Return the config `name` of `configs/` with `arguments` as overrides, as an object of the dataclass `schema`.

    Configs refer to the schema as `schema_name` in their defaults lists. `folder` contains a user's own groups. With
    `show` the composed YAML is returned, with interpolations as written. Raises UserError, of one to three lines, for
    a key or type that the schema does not have, a value that is missing, and whatever else Hydra refuses.
    """
    from fluxlab.compose.overrides import read_words
    from fluxlab.compose.session import hydra_session

    with hydra_session(schema, schema_name, folder):
        prepared = [value for word in read_words(arguments) for value in word.prepared]
        config = _composed(name, prepared, schema)
        return _as_yaml(config) if show else to_schema(config, schema)


def combinations(
    name: str, schema: type[T], schema_name: str, arguments: Sequence[str], folder: Path | None = None
) -> list[Combination[T]]:
    """Return every combination of the values in `arguments`, as with -m, each composed as by `compose`."""
    from fluxlab.compose.overrides import read_words
    from fluxlab.compose.session import hydra_session

    with hydra_session(schema, schema_name, folder) as loader:
        words = read_words(arguments, loader, multirun=True)
        made = []
        for choice in itertools.product(*(range(len(word.prepared)) for word in words)):
            picked = list(zip(words, choice, strict=True))
            config = _composed(name, [word.prepared[i] for word, i in picked], schema)
            typed = [word.typed[i] for word, i in picked if word.typed]
            varied = [word.typed[i] for word, i in picked if len(word.typed) > 1]
            made.append(Combination(typed, "  ".join(varied), to_schema(config, schema)))
        return made


def launches_jobs(arguments: Sequence[str]) -> bool:
    """Whether a launcher or sweeper of Hydra's is asked for, which runs combinations as jobs of their own."""
    return any(re.match(r"\+{0,2}hydra/(launcher|sweeper)=", argument) for argument in arguments)


def launch(
    name: str,
    schema: type[T],
    schema_name: str,
    arguments: Sequence[str],
    folder: Path | None,
    work: Callable[[T, list[str]], None],
) -> None:
    """Let the launcher that `arguments` name run `work(config, words)` once per combination, and wait for all jobs.

    `words` is the job's own command line. Hydra writes nothing into the working directory. Raises UserError for what
    Hydra refuses; a job that fails raises its own exception.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.types import Quote, QuotedString

    from fluxlab.compose.overrides import read_words
    from fluxlab.compose.session import hydra_session

    with (
        hydra_session(schema, schema_name, folder) as loader,
        tempfile.TemporaryDirectory(prefix="fluxlab-") as scratch,
    ):
        words = read_words(arguments, loader, multirun=True)
        typed = {value: text for word in words for value, text in zip(word.prepared, word.typed, strict=False)}
        overrides = [_joined(word.prepared) for word in words]
        # with -m Hydra always writes a multirun.yaml: into a folder that nobody keeps
        sweep_folder = QuotedString(scratch, Quote.single).with_quotes()
        quiet = ["hydra.output_subdir=null", "hydra.run.dir=.", f"hydra.sweep.dir={sweep_folder}"]
        quiet += ["hydra.sweep.subdir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]

        def job(config: Any) -> None:
            from hydra.core.hydra_config import HydraConfig

            task = HydraConfig.get().overrides.task
            work(to_schema(config, schema), [typed.get(override, override) for override in task])

        with _explained(schema):
            GlobalHydra.instance().hydra.multirun(
                config_name=name,
                task_function=job,
                overrides=overrides + quiet,
            )


def _joined(alternatives: Sequence[str]) -> str:
    """Return one override with all the values, as Hydra's sweepers expect it."""
    key, equals, first = alternatives[0].partition("=")
    return key + equals + ",".join([first, *(word.partition("=")[2] for word in alternatives[1:])])


def complete(name: str, schema: type, schema_name: str, arguments: Sequence[str], folder: Path | None = None) -> None:
    """Print what completes a command line, for `-sc query=<shell>` (and install=, uninstall=)."""
    from hydra.core.global_hydra import GlobalHydra

    from fluxlab.compose.session import hydra_session

    words = [argument for argument in arguments if argument.startswith(("query=", "install=", "uninstall="))]
    with hydra_session(schema, schema_name, folder):
        try:
            GlobalHydra.instance().hydra.shell_completion(config_name=name, overrides=words)
        except ValueError as error:
            raise UserError(f"-sc: {short(str(error))}; for bash: fluxlab -sc install=bash") from None


def _composed(name: str, prepared: Sequence[str], schema: type) -> Any:
    from hydra import compose as hydra_compose

    _check_groups(prepared)
    with _explained(schema, name, prepared):
        return hydra_compose(name, overrides=list(prepared))


@contextmanager
def _explained(schema: type, name: str = "", prepared: Sequence[str] = ()) -> Iterator[None]:
    """Raise what Hydra and OmegaConf refuse as UserError."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from fluxlab.compose.yaml_source import decode

    known = [f.name for f in fields(schema)]
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            decode(explain(error, known, lambda parent: _keys_below(parent, name, prepared), prepared))
        ) from error
    except ValueError as error:  # of a defaults list Hydra raises a plain one
        if isinstance(error, UserError) or "default" not in str(error):
            raise
        raise UserError(decode(short(str(error)))) from error


def _check_groups(prepared: Sequence[str]) -> None:
    """Refuse `capture=5` and `capture={…}`: the value of a group is the name of one of its files."""
    groups = {file.parent.name for file in config_folder().glob("*/*.yaml")}
    for word in prepared:
        key, _, value = word.lstrip("+").partition("=")
        group, package = re.sub(r"@.*", "", key), key.rpartition("@")[2]
        if group in groups and re.fullmatch(r"[\[{].*|[-+]?[\d.]+", value, re.DOTALL):
            names = ", ".join(sorted(file.stem for file in (config_folder() / group).glob("*.yaml")))
            raise UserError(
                f"{key}={value}: expected one of {names};\nits keys are set as {package}.<key>=… and added as "
                f"'+{package}.<key>=…'"
            )


def to_schema(config: Any, schema: type[T]) -> T:
    """Return an object of the dataclass `schema`. Raises UserError for unknown keys and missing values."""
    from omegaconf import OmegaConf

    from fluxlab.compose.yaml_source import decode

    known = [f.name for f in fields(schema)]
    unknown = sorted(str(key) for key in set(config) - set(known) - {"hydra"})  # +key=value is not checked by Hydra
    if unknown:
        raise UserError(unknown_key(unknown[0], known))
    with _explained(schema):
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{missing[0]} is missing: add {missing[0]}=… to the command line")
        made = OmegaConf.to_object(config)
    for f in fields(schema):
        setattr(made, f.name, decode(getattr(made, f.name)))
    return made


def _as_yaml(config: Any) -> str:
    import yaml
    from omegaconf import OmegaConf

    from fluxlab.compose.yaml_source import decode

    values = decode(OmegaConf.to_container(config))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)


def _keys_below(parent: str, name: str, prepared: Sequence[str]) -> list[str]:
    """Return the keys of a mapping of the config, before values on the command line change it."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = [word for word in prepared if re.match(r"\+{0,2}(exp|model|capture|tracking|engine|train)=", word)]
    try:
        node = OmegaConf.select(hydra_compose(name, overrides=groups), parent)
    except (HydraException, OmegaConfBaseException, AssertionError):
        return []
    return [str(key) for key in node] if isinstance(node, DictConfig) else []
