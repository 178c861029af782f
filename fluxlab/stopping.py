"""SIGTERM, by which schedulers end a job: what is at hand is finished first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM. The command line exits with code 143."""


class _State:
    deferring, asked = 0, False


def asked() -> bool:
    """Return whether SIGTERM has come while it is deferred."""
    return _State.asked


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM while the block runs. Has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _State.asked = False


@contextmanager
def deferred() -> Iterator[None]:
    """Raise `Terminated` at the end of the block, not within it. The block ends early where it sees `asked()`."""
    _State.deferring += 1
    try:
        yield
    finally:
        _State.deferring -= 1
    if _State.asked and not _State.deferring:
        raise Terminated


def _handle(number: int, frame: FrameType | None) -> None:
    _State.asked = True
    if not _State.deferring:
        raise Terminated
