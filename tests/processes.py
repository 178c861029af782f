"""Commands in processes of their own that start at once: forked from a process which has imported the libraries.

They are killed, interrupted and resumed like any other. Starting `python -m fluxlab.run` takes seconds of imports;
`tests/integration/test_command_line.py` does it.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = [
    "tests.processes",
    "fluxlab.run",
    "fluxlab.train",
    "fluxlab.api",
    "fluxlab.engines.inline",
    "fluxlab.experiment.runner",
    "fluxlab.report.products",
    "fluxlab.training.stages",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "hydra.compose",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
]


class Started:
    """A command that runs, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, module: str, words: list[str], cwd: Path, env: dict[str, str], merged: bool):
        files = [tempfile.NamedTemporaryFile(prefix="fluxlab-test-") for _ in range(1 if merged else 2)]  # noqa: SIM115
        self._files = files  # they are removed with this object
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self._process = context.Process(target=_run, args=(module, words, cwd, env, [file.name for file in files]))
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))  # of the process that imports
        try:
            self._process.start()
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = lambda self: self._process.exitcode  # noqa: E731

    def wait(self, timeout: float | None = 600) -> int:
        """Return the exit code, -9 after SIGKILL. Raises TimeoutError, after it has killed the process."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"not finished after {timeout} s: {self.read()}")
        return self._process.exitcode

    def communicate(self, timeout: float | None = 600) -> tuple[str, str]:
        """Wait, and return what was written to stdout and stderr; to both, and "", if they are merged."""
        self.wait(timeout)
        return self.read()

    def read(self) -> tuple[str, str]:
        texts = [Path(file.name).read_text(encoding="utf-8") for file in self._files]
        return texts[0], texts[1] if len(texts) > 1 else ""

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)


def start(module: str, *words, cwd: Path = ROOT, merged: bool = False, **env: str) -> Started:
    """Start `python -m module words…`. merged: one text of stdout and stderr."""
    env = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "FLUXLAB_CACHE": os.environ["FLUXLAB_CACHE"], **env}
    return Started(module, [str(word) for word in words], cwd, env, merged)


def run(module: str, *words, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Start `python -m module words…`, wait, and return its exit code and what it wrote."""
    started = start(module, *words, cwd=cwd, **env)
    out, errors = started.communicate()
    return subprocess.CompletedProcess([module, *words], started.returncode, out, errors)


def _run(module: str, words: list[str], cwd: Path, env: dict[str, str], files: list[str]) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    for number, name in ((1, files[0]), (2, files[-1])):
        opened = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    sys.argv = [module, *words]
    sys.exit(import_module(module).main())
