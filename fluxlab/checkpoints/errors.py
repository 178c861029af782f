"""Errors about checkpoints that a user can fix, in one to three lines."""

from collections.abc import Collection
from pathlib import Path

from fluxlab.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


def quantised(where: Path, what: str) -> CheckpointError:
    """Return the error for weights of a quantised format."""
    return CheckpointError(
        f"{where}: quantised weights, which are not supported ({what}); "
        "get the model's bfloat16, float16, float32 or plain float8 safetensors"
    )


def few(names: Collection[str], most: int = 4) -> str:
    """Return the first of many names, so that 780 missing tensors still make one line."""
    shown = list(names)[:most]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, cut after 160 characters."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else f"{text[:160]}…"
