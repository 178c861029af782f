"""From a command line to a checked config, and from an error to the line a user sees."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

from fluxlab.config import config_folder

T = TypeVar("T")


def compose(name: str, schema: type[T], schema_name: str, arguments: list[str]) -> T:
    """The config `name` under `configs/` with `arguments` as overrides, as an object of the dataclass `schema`.

    Configs call the schema `schema_name` in their defaults lists. Raises `ValueError`, of one to three lines, for a key
    or type that the schema does not know, a value left open, and whatever else Hydra refuses.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=schema_name, node=schema)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = hydra_compose(name, overrides=arguments)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        # where Hydra only says which override it was merging, the cause says what is wrong
        told = error.__cause__ if error.__cause__ and str(error).startswith("Error merging override") else error
        override = getattr(error, "override", None)  # what a parse error is about
        raise ValueError((f"{override}: " if override else "") + _hydra_line(str(told))) from error
    known = [f.name for f in fields(schema)]
    unknown = sorted(set(config) - set(known))  # Hydra lets +key=value past the schema
    if unknown:
        raise ValueError(f"{unknown[0]}: there is no such key; known: {', '.join(known)}")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} is missing: add {missing[0]}=… to the command line")
    return OmegaConf.to_object(config)


def guarded(work: Callable[[], None], interrupted: str) -> int:
    """Run `work`; 0 when done, 2 for what the user can mend (at most three lines on stderr), 130 when interrupted.

    `HYDRA_FULL_ERROR=1` shows the traceback instead.
    """
    try:
        work()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
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
