"""Errors that a user can fix, in one to three lines: the key or file, the value, what is accepted."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """An error that the user can fix. The command line prints its message without a traceback and exits with code 2.

    Raise it for a wrong key, value or file, and for nothing else: a bug keeps its own exception and traceback.
    """


def join(path: str, *keys: object) -> str:
    """Return `a.b` for "a" and "b". Empty parts are left out."""
    return ".".join(str(part) for part in (path, *keys) if str(part))


def show(value: Any, most: int = 60) -> str:
    """Return `repr(value)` on one line of at most about `most` characters; a longer one loses its middle."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def nearest(word: Any, options: Iterable[str]) -> str:
    """Return `; did you mean scale?` if `word` is close to one of `options`, else an empty string."""
    close = difflib.get_close_matches(str(word).lower(), [str(option) for option in options], 1, 0.55)
    return f"; did you mean {close[0]}?" if close else ""


def wrong(path: str, value: Any, accepted: str, options: Iterable[str] = ()) -> UserError:
    """Return the error for a value that is not accepted. `options` are the words that a misspelt value may mean."""
    hint = nearest(value, options) if isinstance(value, str) else ""
    return UserError(f"{path or 'program'}: {show(value)}, expected {accepted}{hint}")


def unknown_key(path: str, key: Any, value: Any, options: Iterable[str], of: str) -> UserError:
    """Return the error for an unknown key of `of`, such as "key of scale"."""
    options = list(options)
    listed = f"expected {', '.join(options)}" if options else "none is expected"
    return UserError(f"{join(path, key)}: {show(value)}, unknown {of}, {listed}{nearest(key, options)}")
