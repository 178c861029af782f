"""How images are sampled: one set of settings for Python, YAML and the command line."""

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from fluxlab.errors import UserError, nearest

DTYPES = ("float32", "bfloat16", "float16")
TIMESTEP_ROUNDINGS = ("bfl", "diffusers")
UNKNOWN_WORDS = ("error", "allow", "warn")


@dataclass(frozen=True)
class Sampling:
    """The settings of a sampling run. The field names are the keys in YAML and on the command line. None means the
    model's own value.

    height, width: of the image, in pixels.
    enlarge: height and width as a multiple of the model's own, if they are not given, rounded to whole tokens.
    guidance: distilled guidance strength, for a guidance-distilled model only.
    true_cfg: scale of classifier-free guidance away from `negative_prompt`, which needs a second forward per step.
    max_sequence_length: number of T5 tokens. A longer prompt is an error, or is cut if `truncate`.
    timestep_rounding: "bfl" or "diffusers" rounds timesteps as a bf16 run of that implementation does.
    unknown_words: "error", or "warn" or "allow" to sample from a prompt with words that a text encoder does not know.
    dtype: "float32", "bfloat16" or "float16". None keeps the weights as they are stored.
    device: such as "cpu", "cuda:1" or "mps". None means a GPU if there is one.
    compile: whether the transformer's blocks run compiled (`fluxlab.model.compiling`).
    """

    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    timestep_rounding: str | None = None
    truncate: bool = False
    unknown_words: str = "error"
    dtype: str | None = None
    device: str | None = None
    enlarge: float | None = None
    compile: bool = False

    def check(self) -> None:
        """Raise `UserError`, naming the field and its value, for a value that no model accepts.

        Sizes, guidance and device are checked further against the model.
        """
        for key in ("steps", "height", "width", "max_sequence_length"):
            check_count(key, getattr(self, key))
        for key in ("guidance", "true_cfg"):
            check_number(key, getattr(self, key))
        check_number("enlarge", self.enlarge)
        if self.enlarge is not None and not 0 < self.enlarge <= 64:
            raise UserError(f"enlarge={self.enlarge:g}: expected a factor above 0 of the model's own size, at most 64")
        if self.enlarge is not None and (self.height is not None or self.width is not None):
            raise UserError(f"enlarge={self.enlarge:g}: sets height and width; leave those out, or write enlarge=null")
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value not in choices and not (value is None and key != "unknown_words"):
                expected = f"expected {' or '.join((', '.join(choices[:-1]), choices[-1]))}"
                hint = nearest(value, choices) if isinstance(value, str) else ""
                raise UserError(f"{key}={value!r}: {expected}{hint}")
        for key in ("truncate", "compile"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{key}={getattr(self, key)!r}: expected true or false")
        if self.negative_prompt is not None:
            if not isinstance(self.negative_prompt, str):
                raise UserError(f"negative_prompt={self.negative_prompt!r}: expected a string")
            if self.true_cfg is None:
                raise UserError("negative_prompt has no effect without true_cfg: add it, for instance true_cfg=4")

    def filled(self, defaults: "Sampling") -> "Sampling":
        """Return these settings with the values of `defaults` in place of None."""
        missing = {f.name for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **{name: getattr(defaults, name) for name in missing})

    def changed(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults. A new field leaves the digests of old settings as they
        were.
        """
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


_CHOICES = {"timestep_rounding": TIMESTEP_ROUNDINGS, "unknown_words": UNKNOWN_WORDS, "dtype": DTYPES}


def check_count(key: str, value: Any) -> None:
    """Raise `UserError` unless `value` is None or a whole number from 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise UserError(f"{key}={value!r}: expected a whole number, at least 1")


def check_number(key: str, value: Any) -> None:
    """Raise `UserError` unless `value` is None or a finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{key}={value!r}: expected a finite number")
