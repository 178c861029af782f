"""What a check returns."""

from typing import Any, NamedTuple


class Result(NamedTuple):
    """text: one line for the user. value: what later checks need. warning: nothing failed, but the user should know."""

    text: str
    value: Any = None
    warning: bool = False
