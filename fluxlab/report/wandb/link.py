"""A W&B run in a separate process (`process.py`), which receives messages through a pipe.

The process may be slow, hang, run out of disk or be killed. Only `close` waits for it, and for a limited time. The
environment of this process does not change. W&B writes to `<folder>/wandb`, from where `wandb sync` can send it later.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxlab.report.wandb import process
from fluxlab.report.wandb.process import RUNS

INIT_SECONDS = 20
"""How long W&B's server may take to answer before the run is kept offline."""

PROGRAM = process.__file__

_BACKLOG = 1 << 16  # bytes of messages kept for a process that does not read; later ones are dropped
_PATIENCE = 5  # s until a process that was asked to end is killed


class Link:
    """An open W&B run. No method raises for an error in W&B; what is lost is reported once, on stderr."""

    def __init__(
        self,
        folder: Path,
        init: Mapping[str, Any],
        config: Mapping[str, Any],
        command: str = "",
        mode: str | None = None,
        seconds: float = 120,
        mark: str = "",
    ):
        """Start the process and return at once.

        folder: the run folder; W&B writes to `wandb` in it. init: arguments of `wandb.init`. command: `python -m …`,
        shown by W&B. mode: online, offline, disabled, or None for `WANDB_MODE`, by default online. If online does not
        work, the run is offline. seconds: how long `close` may take. mark: written next to the run's id, for
        `is_tracked`.
        """
        mode = mode or os.environ.get("WANDB_MODE") or "online"
        self.folder, self.seconds = folder / "wandb", seconds
        self.process: subprocess.Popen | None = None
        self.unsent, self.received = b"", b""
        if mode == "disabled":
            return
        start = {
            "folder": str(self.folder.resolve()),
            "modes": ["online", "offline"] if mode == "online" else [mode],
            "init": dict(init),
            "config": dict(config),
            "settings": _settings(seconds),
            "arguments": shlex.split(command)[3:],
            "seconds": seconds,
            "mark": mark,
        }
        try:
            self.folder.mkdir(exist_ok=True)
            with open(self.folder / "process.log", "ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", PROGRAM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    env=_environment(self.folder.resolve(), " ".join(shlex.split(command)[1:3])),
                    start_new_session=True,  # so that Ctrl-C reaches this process only
                )
            os.set_blocking(self.process.stdin.fileno(), False)
        except OSError as error:
            self._lost(error.strerror or str(error))
        self.send(start)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, now or together with the next one. Never waits."""
        if self.process is None:
            return
        if len(self.unsent) < _BACKLOG:
            self.unsent += _line(message)
        try:
            self.unsent = self.unsent[self.process.stdin.write(self.unsent) or 0 :]
        except OSError:  # the process has ended
            self._end(0)

    def wait_until_started(self) -> None:
        """Wait until W&B has opened the run, or its process has ended."""
        if self.process is not None:
            self.received += self.process.stdout.readline()

    def close(
        self, messages: Sequence[Mapping[str, Any]] = (), exit_code: int = 0, seconds: float | None = None
    ) -> None:
        """Send messages, end the run, and wait at most `seconds` for it. Print where it is."""
        if self.process is not None:
            lines = b"".join(map(_line, [*messages, {"finish": exit_code}]))
            self._end(self.seconds if seconds is None else seconds, self.unsent + lines)

    def _end(self, seconds: float, lines: bytes = b"") -> None:
        running, self.process = self.process, None
        late = False
        try:
            out, _ = running.communicate(lines or None, max(seconds, _PATIENCE))
        except subprocess.TimeoutExpired as error:
            late, out = True, error.stdout or b""
        finally:
            _kill(running)
        replies: dict[str, Any] = {}
        for line in (self.received + out).splitlines():
            with contextlib.suppress(ValueError):  # a killed process can leave half a line
                replies |= json.loads(line)
        self._report(replies, seconds if late else None)

    def _report(self, replies: Mapping[str, Any], late: float | None) -> None:
        sync = f"wandb sync {shlex.quote(_relative(replies['folder']))} sends it" if "folder" in replies else ""
        if replies.get("done"):
            why = f" ({replies['why'].rstrip('.')})" if replies["why"] else ""
            print(f"W&B: {replies['url'] or f'offline{why}: {sync}'}", flush=True)
        elif late is not None:
            self._lost(f"not done after {late:.0f} s{'; ' if sync else ''}{sync}")
        else:
            self._lost(replies.get("lost") or "its process ended")

    def _lost(self, why: str) -> None:
        if self.process is not None:
            _kill(self.process)
            self.process = None
        print(f"W&B stopped ({why}); the run continues, {self.folder.parent} has all results", file=sys.stderr)


def is_tracked(folder: Path, mark: str) -> bool:
    """Return whether `folder` has a finished W&B run with this mark."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        lines = [json.loads(line) for line in (folder / "wandb" / RUNS).read_text().splitlines()]
        return any(line["mark"] == mark and line["state"] == "finished" for line in lines)
    return False


def _settings(seconds: float) -> dict[str, Any]:
    return {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "disable_git": True,  # the store has the commit; changes of a working tree may be private
        "symlink": False,
        "allow_media_symlink": True,  # images are hard links to the store's files, not copies
        "init_timeout": INIT_SECONDS,
        "finish_timeout": 0.9 * seconds,
        "finish_timeout_raises": True,
        "x_stats_pid": os.getpid(),
    }


def _environment(folder: Path, program: str) -> dict[str, str]:
    """Return this environment with W&B's staging and caches in the folder, without the service of an enclosing run."""
    inherited = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    added = {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_PROGRAM": program}
    return inherited | {key: value for key, value in added.items() if value}


def _relative(folder: str) -> str:
    """Return a path relative to the working directory if it is below that."""
    return str(Path(folder).relative_to(Path.cwd())) if Path(folder).is_relative_to(Path.cwd()) else folder


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _kill(running: subprocess.Popen) -> None:
    if running.poll() is None:
        running.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(_PATIENCE)
