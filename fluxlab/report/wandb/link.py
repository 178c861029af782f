"""A W&B run at arm's length: it lives in a process of its own (`wandb_process`), which hears messages through a pipe.

So it may be slow, hang, run out of disk or be killed: we never wait for it but at the end, and there for a set time.
Our environment stays as it is, and what it writes lies under `<folder>/wandb`, from where `wandb sync` can send it
later.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxlab.report.wandb import process as wandb_process

INIT_SECONDS = 20
"""How long W&B's server has to answer before the run is kept offline."""

_BACKLOG = 1 << 16  # bytes of messages kept for a process that does not listen; later ones are dropped
_PATIENCE = 5  # s, after which a process that was told to end is killed


class Link:
    """An open W&B run. Nothing in here raises for what W&B does; what is lost is said once, on stderr."""

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

        folder: where everything lies; W&B's own goes into `wandb` there. init: what `wandb.init` is to be called with.
        command: `python -m …`, for W&B to show. mode: online, offline, disabled, or None: `WANDB_MODE`, else online.
        Where online does not work it is offline. seconds: how long `close` may take. mark: noted beside the run's id,
        for `tracked`.
        """
        mode = mode or os.environ.get("WANDB_MODE") or "online"
        self.folder, self.seconds = folder / "wandb", seconds
        self.process, self.unsent = None, b""
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
                    [sys.executable, "-P", wandb_process.__file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    env=_environment(self.folder.resolve(), " ".join(shlex.split(command)[1:3])),
                    start_new_session=True,  # Ctrl-C is for us to hear
                )
            os.set_blocking(self.process.stdin.fileno(), False)
        except OSError as error:
            self._lost(error.strerror or str(error))
        self.say(start)

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message, now or with the next one: this never waits."""
        if self.process is None:
            return
        if len(self.unsent) < _BACKLOG:
            self.unsent += _line(message)
        try:
            self.unsent = self.unsent[self.process.stdin.write(self.unsent) or 0 :]
        except OSError:  # it is no more
            self._end(0)

    def close(
        self, messages: Sequence[Mapping[str, Any]] = (), exit_code: int = 0, seconds: float | None = None
    ) -> None:
        """Send messages, then end the run, and wait for it no longer than `seconds`. Says where it is."""
        if self.process is not None:
            lines = b"".join(map(_line, [*messages, {"finish": exit_code}]))
            self._end(self.seconds if seconds is None else seconds, self.unsent + lines)

    def _end(self, seconds: float, lines: bytes = b"") -> None:
        process, self.process = self.process, None
        late = False
        try:
            out, _ = process.communicate(lines or None, max(seconds, _PATIENCE))
        except subprocess.TimeoutExpired as error:
            late, out = True, error.stdout or b""
        finally:
            _kill(process)
        told: dict[str, Any] = {}
        for line in out.splitlines():
            with contextlib.suppress(ValueError):  # half a line of a process that was killed
                told |= json.loads(line)
        self._report(told, seconds if late else None)

    def _report(self, told: Mapping[str, Any], late: float | None) -> None:
        sync = f"wandb sync {shlex.quote(_shown(told['folder']))} sends it" if "folder" in told else ""
        if told.get("done"):
            why = f" ({told['why'].rstrip('.')})" if told["why"] else ""
            print(f"W&B: {told['url'] or f'offline{why}: {sync}'}", flush=True)
        elif late is not None:
            self._lost(f"not done after {late:.0f} s{'; ' if sync else ''}{sync}")
        else:
            self._lost(told.get("lost") or "its process ended")

    def _lost(self, why: str) -> None:
        if self.process is not None:
            _kill(self.process)
            self.process = None
        print(f"W&B stopped ({why}); the run goes on, {self.folder.parent} has everything", file=sys.stderr)


def tracked(folder: Path, mark: str) -> bool:
    """Whether a finished W&B run in `folder` bears `mark`."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        lines = [json.loads(line) for line in (folder / "wandb" / wandb_process.RUNS).read_text().splitlines()]
        return any(line["mark"] == mark and line["state"] == "finished" for line in lines)
    return False


def _settings(seconds: float) -> dict[str, Any]:
    return {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "disable_git": True,  # the store tells the commit; a working tree's changes are not ours to send
        "symlink": False,
        "allow_media_symlink": True,  # pictures are hard links to the store's, not copies
        "init_timeout": INIT_SECONDS,
        "finish_timeout": 0.9 * seconds,
        "finish_timeout_raises": True,
        "x_stats_pid": os.getpid(),
    }


def _environment(folder: Path, program: str) -> dict[str, str]:
    """Ours, with W&B's staging and caches in the folder; and no service of a W&B that we may run in."""
    inherited = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    ours = {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_PROGRAM": program}
    return inherited | {key: value for key, value in ours.items() if value}


def _shown(folder: str) -> str:
    """A path as short as may be: below the working directory, from there."""
    return str(Path(folder).relative_to(Path.cwd())) if Path(folder).is_relative_to(Path.cwd()) else folder


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _kill(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + _PATIENCE
    if process.poll() is None:
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0, deadline - time.monotonic()))
