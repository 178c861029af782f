"""Errors of a config, in one line each: where, what was found, what would be accepted, the nearest spelling."""

import difflib
from collections.abc import Iterable
from typing import Any


def join(path: str, *keys: object) -> str:
    """`a.b` from "a" and "b"; an empty path leaves no dot."""
    return ".".join(str(part) for part in (path, *keys) if str(part))


def show(value: Any, most: int = 60) -> str:
    """A value on one line, its middle left out when long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def nearest(word: Any, options: Iterable[str]) -> str:
    """`; did you mean scale?` for a word close to an option, else nothing."""
    close = difflib.get_close_matches(str(word).lower(), [str(option) for option in options], 1, 0.55)
    return f"; did you mean {close[0]}?" if close else ""


def wrong(path: str, value: Any, accepted: str, options: Iterable[str] = ()) -> ValueError:
    """The error for a value that cannot be taken. `options` are what a misspelt word may have meant."""
    hint = nearest(value, options) if isinstance(value, str) else ""
    return ValueError(f"{path or 'program'}: {show(value)}, expected {accepted}{hint}")


def unknown_key(path: str, key: Any, value: Any, options: Iterable[str], of: str) -> ValueError:
    """The error for a key that nobody reads."""
    options = list(options)
    listed = f"expected {', '.join(options)}" if options else "none is expected"
    return ValueError(f"{join(path, key)}: {show(value)}, unknown {of}, {listed}{nearest(key, options)}")
