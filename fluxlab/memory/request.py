"""What a user asks of memory: the keys `memory=…` and `memory.limit_gb=…`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from fluxlab.errors import UserError, nearest, show

MODES = ("auto", "resident", "streamed")


@dataclass(frozen=True)
class Memory:
    """Where weights are kept. It changes no image.

    mode: "auto" keeps everything on the device if it fits, and streams transformer blocks from their file otherwise.
        "resident" keeps everything on the device. "streamed" keeps no block on the device unless `limit_gb` leaves
        room.
    limit_gb: bytes in units of 10⁹ that the run may use: on a GPU of its memory, on a CPU of the process (its
        resident set, mapped pages of files included). None means what the device has free.

    Raises `UserError` for other values.
    """

    mode: str = "auto"
    limit_gb: float | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            hint = nearest(self.mode, MODES) if isinstance(self.mode, str) else ""
            raise UserError(f"memory={show(self.mode)}: expected auto, resident or streamed{hint}")
        if self.limit_gb is None:
            return
        limit = self.limit_gb
        if isinstance(limit, bool) or not isinstance(limit, Real) or not math.isfinite(limit) or limit <= 0:
            raise UserError(f"memory.limit_gb={show(limit)}: expected a number of gigabytes above 0, or null")
        if self.mode == "resident":
            raise UserError(
                f"memory.limit_gb={limit:g} has no effect with memory=resident, which keeps everything: use memory=auto"
            )

    @classmethod
    def from_config(cls, value: "Memory | Mapping[str, Any] | str | None") -> "Memory":
        """Return the request of a config: a mode, a mapping with `mode` and `limit_gb`, or None for the default."""
        if value is None or isinstance(value, Memory):
            return value or cls()
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise UserError(f"memory={show(value)}: expected auto, resident or streamed")
        unknown = sorted(set(map(str, value)) - {"mode", "limit_gb"})
        if unknown:
            raise UserError(f"memory.{unknown[0]}: unknown key; expected mode or limit_gb")
        return cls(value.get("mode", "auto"), value.get("limit_gb"))

    @property
    def limit_bytes(self) -> int | None:
        return None if self.limit_gb is None else int(self.limit_gb * 1e9)
