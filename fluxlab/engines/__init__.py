"""What computes the missing batches of a run: this process, or Ray's workers."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from numbers import Real
from os import PathLike
from typing import Any

from fluxlab.engines.inline import Inline
from fluxlab.errors import UserError, nearest, unknown_key
from fluxlab.experiment.engine import Engine
from fluxlab.memory import Memory

SETTINGS = {
    "inline": {"name": "inline or ray"},
    "ray": {
        "name": "inline or ray",
        "workers": "a whole number, at least 1, or null",
        "gpus_per_worker": "a number from 0, or null",
        "address": "auto, an address, or null",
        "retries": "a whole number from 0",
    },
}
"""The keys of the files in `configs/engine`, and what each one expects."""


def checked(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of an engine.

    Raises `UserError` for an unknown key, a value of another type, and if Ray is not installed.
    """
    name = settings.get("name", "inline")
    if name not in SETTINGS:
        raise UserError(f"engine.name={name}: expected {' or '.join(SETTINGS)}{nearest(name, SETTINGS)}")
    for key, value in settings.items():
        if key not in SETTINGS[name]:
            raise unknown_key("engine", key, value, SETTINGS[name], f"key of engine={name}")
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        whole = number and value == int(value)
        fits = {
            "workers": value is None or (whole and value >= 1),
            "gpus_per_worker": value is None or (number and value >= 0),
            "address": value is None or (isinstance(value, str) and bool(value)),
            "retries": whole and value >= 0,
        }.get(key, True)
        if not fits:
            raise UserError(f"engine.{key}={value}: expected {SETTINGS[name][key]}")
    if name == "ray" and find_spec("ray") is None:
        raise UserError('engine=ray: Ray is not installed; pip install "fluxlab[ray]"')
    return settings


@contextmanager
def start(
    settings: Mapping[str, Any],
    cache: "str | PathLike[str] | None" = None,
    memory: Memory | None = None,
) -> Iterator[Engine]:
    """Yield the engine of a file of `configs/engine`. It is closed, and its memory freed, at the end of the block.

    cache: of encoded prompts, as in `fluxlab.cache.open_cache`. memory: where weights are kept.
    """
    checked(settings)
    if settings.get("name") == "ray":
        from fluxlab.engines.ray_engine import started

        with started(settings, None if cache is None else str(cache), memory) as engine:
            yield engine
    else:
        from fluxlab.loading import load_row

        yield Inline(partial(load_row, cache=cache, memory=memory))


__all__ = ["Engine", "Inline", "checked", "start"]
