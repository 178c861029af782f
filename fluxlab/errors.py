"""Errors that a user can fix, in one to three lines, and the error for values that are not finite."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LONGEST_NAME = 60
"""Characters of a key or a value that a message shows."""


class UserError(ValueError):
    """An error that the user can fix. The command line prints its message without a traceback and exits with code 2.

    Raise it for a wrong key, value or file, and for nothing else: a bug keeps its own exception and traceback.
    """


def join(path: str, *keys: object) -> str:
    """Return `a.b` for "a" and "b". Empty parts are left out, long ones are shortened, and the result is one line."""
    return ".".join([*([path] if path else []), *(_shortened(" ".join(str(key).split())) for key in keys if str(key))])


def show(value: Any, most: int = LONGEST_NAME) -> str:
    """Return `repr(value)` on one line of at most about `most` characters. A longer one loses its middle."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print whole numbers of more than 4300 digits
        text = "a number of thousands of digits" if isinstance(value, int) else f"a {type(value).__name__}"
    return _shortened(" ".join(text.split()), most)


def _shortened(text: str, most: int = LONGEST_NAME) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def nearest(word: Any, options: Iterable[str]) -> str:
    """Return `; did you mean scale?` if `word` is close to one of `options`, else an empty string."""
    close = difflib.get_close_matches(str(word)[:200].lower(), [str(option) for option in options], 1, 0.55)
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


def text_key(path: str, key: Any, what: str) -> str:
    """Return a mapping's key that names something, such as an edit.

    Raises `UserError` for a key that is not a string: YAML reads `on`, `1.50` and `1_000` as true, 1.5 and 1000, so the
    spelling is lost. The message shows the quoted spelling. Also raises for an empty or unprintable name.
    """
    if not isinstance(key, str):
        raise UserError(f"{join(path, show(key))}: {show(key)} is not text, expected {what} in quotes, such as '{key}'")
    if not key.strip() or not key.isprintable():
        raise UserError(f"{path or 'program'}: {show(key)}, expected {what} of printable characters")
    return key


class NonFiniteError(ArithmeticError):
    """NaN or infinity where an image was expected. It is never a result.

    steps: for each affected sample, by its index in the batch, the first step (from 0) after which its latents are not
    finite. None if its latents are finite and the autoencoder returned the value.
    reasons: for each affected sample, a phrase such as "its latents are not finite after step 3 of 20".
    results: the images (or latents) of the whole batch, None for the affected samples. The others are what they would
    have been without them. None if sampling stopped early because no sample was left.
    """

    def __init__(
        self,
        message: str,
        steps: Mapping[int, int | None] | None = None,
        reasons: Mapping[int, str] | None = None,
        results: Sequence[Any] | None = None,
    ):
        super().__init__(message)
        self.steps, self.reasons = dict(steps or {}), dict(reasons or {})
        self.results = None if results is None else list(results)

    @property
    def samples(self) -> list[int]:
        """Return the indices of the affected samples."""
        return sorted(self.steps)


class BatchError(RuntimeError):
    """Some images could not be computed, and the others were finished. The message names them and has the traceback."""
