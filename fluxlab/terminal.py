"""Printing that never stops a command: a closed pipe, a terminal without UTF-8."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Output:
    """A text stream that drops what nobody reads any more."""

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
        except BrokenPipeError:
            _discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: Any) -> None:
    """Point the stream's file at the null device, so that neither later output nor the interpreter's exit fails."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, stream.fileno())
    finally:
        os.close(null)


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Go on without output once its reader is gone (`… | head -1`), and replace characters that cannot be encoded.

    The streams are as before afterwards.
    """
    before = sys.stdout, sys.stderr
    strict = [stream for stream in before if _is_strict(stream)]
    for stream in strict:
        stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = map(_Output, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
        for stream in strict:
            stream.reconfigure(errors="strict")


def _is_strict(stream: Any) -> bool:
    """Whether a stream raises for characters that its encoding lacks."""
    return hasattr(stream, "reconfigure") and stream.errors == "strict"
