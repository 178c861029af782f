"""The part of `engine=ray` that runs in a worker. It holds the model, and answers with plain values, never exceptions.

An exception would be unpickled by the driver, together with whatever class it has. An `Answer` is text and bytes.
"""

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxlab.errors import UserError


@dataclass(frozen=True)
class Answer:
    """What a worker returns. kind: ok, user, memory or bug; all but ok have a message, a bug its traceback too."""

    kind: str
    value: Any = None
    message: str = ""
    details: str = ""


def answered(work: Callable[[], Any]) -> Answer:
    """Return the result of `work`, or its exception as text."""
    try:
        return Answer("ok", work())
    except Exception as error:
        message, details = f"{type(error).__name__}: {error}", traceback.format_exc()
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
            return Answer("user", message=str(error))
        if isinstance(error, MemoryError) or "OutOfMemory" in message or "can't allocate memory" in message:
            _free_memory()
            return Answer("memory", message=message, details=details)
        return Answer("bug", message=message, details=details)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compared_versions() -> dict[str, str]:
    """Return the versions that have to be the same in all workers."""
    import torch

    import fluxlab

    return {"fluxlab": fluxlab.__version__, "torch": torch.__version__}


class Worker:
    """One actor: a process with the model."""

    def __init__(self, folder: str, paths: Sequence[str]):
        """folder, paths: the driver's working directory and import path, for models, masks and plugins."""
        if os.path.isdir(folder):
            os.chdir(folder)
        sys.path.extend(path for path in paths if path not in sys.path)
        self.engine = self.cache = self.memory = None

    def open(self, plugins: Sequence[str], row: Any, cache: str | None, memory: Any = None) -> Answer:
        """Return the name of the machine, the fingerprint of the model's files, and versions."""
        self.cache, self.memory = cache, memory

        def work() -> dict[str, str]:
            from fluxlab.cache import open_cache
            from fluxlab.checkpoints.identity import fingerprint
            from fluxlab.positions import load_plugins

            load_plugins(plugins)
            return {
                "machine": socket.gethostname(),
                "model": fingerprint(row, open_cache(cache)),
                **compared_versions(),
            }

        return answered(work)

    def settle(self, experiment: Any, known: Any, batch_tokens: int | None, threads: int | None) -> Answer:
        """Return the settings of the run. See `fluxlab.experiment.engine.Engine`."""
        return answered(lambda: self._inline().settle(experiment, known, batch_tokens, threads))

    def check(self, experiment: Any, settings: Any, fixed: bool) -> Answer:
        """Check that the experiment fits the model. See `fluxlab.experiment.engine.Engine`."""
        return answered(lambda: self._inline().check(experiment, settings, fixed))

    def begin(self, experiment: Any, settings: Any, store: str, token: str) -> Answer:
        """Load the model, and return whether this process sees the driver's store: the file `token` in it."""

        def work() -> bool:
            from fluxlab.experiment.settings import check_kernel
            from fluxlab.experiment.store import Store

            self.experiment, self.settings = experiment, settings
            self.store = Store(Path(store)) if (Path(store) / token).is_file() else None
            check_kernel(self._inline().loaded(experiment, settings), settings)
            return self.store is not None

        return answered(work)

    def compute(self, batch: Any) -> Answer:
        """Compute a batch. Return (lines about cells without an image, files by name if the store is not seen)."""

        def work() -> tuple[list[str], dict[str, bytes]]:
            from fluxlab.experiment.store import Store

            if self.store is not None:
                return self._run(batch, self.store), {}
            with tempfile.TemporaryDirectory(prefix="fluxlab-") as scratch:
                failures = self._run(batch, Store(Path(scratch)))
                files = [file for file in sorted(Path(scratch).rglob("*")) if file.is_file()]
                return failures, {file.relative_to(scratch).as_posix(): file.read_bytes() for file in files}

        return answered(work)

    def _inline(self) -> Any:
        from fluxlab.engines.inline import Inline
        from fluxlab.loading import load_row

        self.engine = self.engine or Inline(partial(load_row, cache=self.cache, memory=self.memory))
        return self.engine

    def _run(self, batch: Any, store: Any) -> list[str]:
        (done,) = self._inline().compute(self.experiment, self.settings, store, [batch])
        return done.failures
