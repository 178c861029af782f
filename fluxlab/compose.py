"""From a command line to a checked config, and from an error to the line a user sees."""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.terminal import tolerant_output

T = TypeVar("T")


def flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags that we know, and `overrides`. Raises `UserError` for one that we do not."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path, default=None)
    parser.add_argument("--cfg", "-c", choices=["job"], default=None)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("overrides", nargs="*")
    known, others = parser.parse_known_intermixed_args(list(arguments))
    unknown = [other for other in others if other.startswith("-")]
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such flag; keys are set as key=value, see --help")
    known.overrides += others
    if known.config_dir and not known.config_dir.is_dir():
        raise UserError(f"--config-dir {known.config_dir}: there is no such folder; it holds exp/, model/ or op/")
    return known


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def compose(
    name: str,
    schema: type[T],
    schema_name: str,
    arguments: Sequence[str],
    folder: Path | None = None,
    show: bool = False,
) -> "T | str":
    """The config `name` under `configs/` with `arguments` as overrides, as an object of the dataclass `schema`.

    Configs call the schema `schema_name` in their defaults lists; `folder` holds a user's own groups. With `show` the
    composed YAML is returned as it stands. Raises `UserError`, of one to three lines, for a key or type that the
    schema does not know, a value left open, and whatever else Hydra refuses.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=schema_name, node=schema)
    _check_groups(arguments)
    own = [f"hydra.searchpath=[file://{folder.resolve()}]"] if folder else []
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = hydra_compose(name, overrides=[*arguments, *own])
        if show:
            return OmegaConf.to_yaml(config)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    return to_schema(config, schema)


def _check_groups(arguments: Sequence[str]) -> None:
    """Refuse `capture=5` and `capture={…}`: what a group takes is the name of one of its files."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        group = config_folder() / re.sub(r"@.*", "", key)
        if key and group.is_dir() and re.fullmatch(r"[\[{].*|[-+]?[\d.]+", value, re.DOTALL):
            names, own = ", ".join(sorted(file.stem for file in group.glob("*.yaml"))), key.rpartition("@")[2]
            raise UserError(
                f"{key}={value}: a name is needed, one of {names};\nits own keys are set as {own}.<key>=… and added as "
                f"'+{own}.<key>=…'"
            )


def to_schema(config: Any, schema: type[T]) -> T:
    """An object of the dataclass `schema`. Raises `UserError` for unknown keys and values left open."""
    from omegaconf import OmegaConf

    known = [f.name for f in fields(schema)]
    unknown = sorted(set(config) - set(known))  # Hydra lets +key=value past the schema
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such key; known: {', '.join(known)}")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is missing: add {missing[0]}=… to the command line")
    return OmegaConf.to_object(config)


def explain(error: Exception) -> str:
    """What Hydra refuses, in one to three lines."""
    # where Hydra only says which override it was merging, the cause says what is wrong
    told = error.__cause__ if error.__cause__ and str(error).startswith("Error merging override") else error
    override = getattr(error, "override", None)  # what a parse error is about
    return (f"{override}: " if override else "") + _hydra_line(str(told))


def hydra_main(
    arguments: Sequence[str], schema: type, schema_name: str, name: str, work: Callable[[Any], None]
) -> None:
    """Let Hydra itself run `work(config)`: once a combination with -m, or to complete a command line for a shell.

    Hydra writes nothing. A combination that fails is said and the others go on; at the end `UserError` counts them.
    Raises `UserError` for what Hydra refuses, too.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=schema_name, node=schema)
    # of -m Hydra always writes a multirun.yaml: to where nobody keeps it
    own = tempfile.TemporaryDirectory(prefix="fluxlab-")
    quiet = ["hydra.output_subdir=null", "hydra.run.dir=.", f"hydra.sweep.dir={own.name}", "hydra.sweep.subdir=."]
    quiet += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    failed: list[Exception] = []

    def one(config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        try:
            work(config)
        except (UserError, OSError) as error:
            elsewhere = HydraConfig.get().runtime.choices.get("hydra/launcher", "basic") != "basic"
            if before[1] == "1" or elsewhere:  # a job elsewhere has only its exception to tell us by
                raise
            print(_short(str(error)), file=sys.stderr)
            failed.append(error)

    completes = any(argument in ("-sc", "--shell-completion") for argument in arguments)
    sys.argv = [sys.argv[0], *arguments, *([] if completes else quiet)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors come to us
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)(one)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    finally:
        own.cleanup()
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]
    if failed:
        raise UserError(f"{len(failed)} of the combinations failed; the others are done")


def guarded(work: Callable[[], None], interrupted: str) -> int:
    """Run `work`; 0 when done, 2 for what the user can mend (at most three lines on stderr), 130 when interrupted.

    `HYDRA_FULL_ERROR=1` shows the traceback instead. Output that nobody reads any more stops nothing.
    """
    with tolerant_output():
        return _exit_code(work, interrupted)


def _exit_code(work: Callable[[], None], interrupted: str) -> int:
    try:
        work()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(_short(str(error)), file=sys.stderr)
        return 2
    return 0


def _hydra_line(text: str) -> str:
    """Hydra's message, which can take dozens of lines, in one or two."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    missing = re.search(r"Could not find '(\w+)/(\S+)'", lines[0])
    if missing:
        options = [line.strip() for line in lines[1:] if line.startswith("\t") and "provider=" not in line]
        return f"{missing[1]}={missing[2]}: there is none; available: {', '.join(options)}"
    unknown = re.match(r"Could not override '(\S+)'", lines[0])
    if unknown:
        return f"{unknown[1]}: there is no such key: see configs/config.yaml for those there are"
    key = [line.strip().removeprefix("full_key: ") for line in lines if "full_key: " in line]
    return f"{key[0]}: {lines[0]}" if key else _short(text)


def _short(text: str) -> str:
    """At most three non-empty lines."""
    return "\n".join([line for line in text.splitlines() if line.strip()][:3])
