"""Printing that never stops a command: a closed pipe, a terminal without UTF-8."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any


class _Output:
    """A text stream that drops output after its reader has closed the pipe."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Any) -> None:
        try:
            call()
        except OSError:  # no reader, a closed terminal, a full disk
            _discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: Any) -> None:
    """Point the stream's file at the null device, so that neither later output nor the interpreter's exit fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        with contextlib.suppress(OSError):  # a stream without a file
            os.dup2(null, stream.fileno())
    finally:
        os.close(null)


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Go on without output once its reader is gone (`… | head -1`), and replace characters that cannot be encoded.

    The streams are as before afterwards. Threads and nested blocks share one pair of streams.
    """
    global _blocks
    with _lock:
        _blocks += 1
        if _blocks == 1:
            _replaced.extend(_replace(name) for name in ("stdout", "stderr") if getattr(sys, name) is not None)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            while _blocks == 0 and _replaced:
                _restore(*_replaced.pop())


_lock = threading.Lock()
_blocks = 0
_replaced: list[tuple[str, _Output, Any, bool]] = []


def _replace(name: str) -> tuple[str, _Output, Any, bool]:
    stream = getattr(sys, name)
    strict = _is_strict(stream)
    if strict:
        stream.reconfigure(errors="replace")
    setattr(sys, name, _Output(stream))
    return name, getattr(sys, name), stream, strict


def _restore(name: str, output: _Output, stream: Any, strict: bool) -> None:
    output.flush()
    if strict:
        stream.reconfigure(errors="strict")
    if getattr(sys, name) is output:
        setattr(sys, name, stream)


def _is_strict(stream: Any) -> bool:
    """Whether a stream raises for characters that its encoding lacks."""
    return hasattr(stream, "reconfigure") and stream.errors == "strict"
