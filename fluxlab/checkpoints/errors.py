"""What a user can mend about a checkpoint, in one to three lines."""

from collections.abc import Collection

from fluxlab.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file and what to do."""


def few(names: Collection[str], most: int = 4) -> str:
    """The first names of many, so that 780 missing tensors still make one line."""
    shown = list(names)[:most]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")


def first_line(error: Exception) -> str:
    """The first line of a library's message, cut where it goes on and on."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else f"{text[:160]}…"
