"""Shards: every n-th batch of an experiment, computed by a process of its own."""

import re
from dataclasses import dataclass
from typing import Any

from fluxlab.errors import UserError, show


@dataclass(frozen=True)
class Shard:
    """The batches whose number is `index` modulo `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        """Return whether a batch belongs to the shard."""
        return number % self.count == self.index


def read_shard(value: Any) -> Shard | None:
    """Return the shard that `3/16` names; None for None. Raises `UserError` for anything else."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(
            f"shard={show(value)[1:-1] if isinstance(value, str) else value}: expected i/n with i from 0 to n - 1, "
            "such as 0/3, 1/3 and 2/3"
        )
    return Shard(int(match[1]), int(match[2]))
