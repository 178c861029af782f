"""From a command line to a checked config, and from an error to the line a user sees."""

import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fluxlab.config import config_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig


def compose(name: str, schemas: dict[str, type], arguments: list[str]) -> "DictConfig":
    """The config `name` under `configs/` with `arguments` as overrides, resolved.

    `schemas` are dataclasses by the name that configs call them by; a key or type they do not know is an error. Raises
    `ValueError`, of one to three lines, for whatever Hydra refuses and for a value left open.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, schema in schemas.items():
        ConfigStore.instance().store(name=key, node=schema)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = hydra_compose(name, overrides=arguments)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        # where Hydra only says which override it was merging, the cause says what is wrong
        told = error.__cause__ if error.__cause__ and str(error).startswith("Error merging override") else error
        override = getattr(error, "override", None)  # what a parse error is about
        raise ValueError((f"{override}: " if override else "") + _hydra_line(str(told))) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} is missing: add {missing[0]}=… to the command line")
    return config


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
