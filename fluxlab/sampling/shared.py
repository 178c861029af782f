"""Samples that are equal up to some step are computed once until then: which rows a step needs, and whose they are."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """The rows of one step of a batch. Samples with the same past and the same present share one.

    samples: for each row, the first sample that it stands for. of: for each sample, its row.
    """

    samples: tuple[int, ...]
    of: tuple[int, ...]

    def parts(self, size: int | None) -> list[tuple[tuple[int, ...], list[int | None]]]:
        """Return the rows in parts of at most `size`: the samples, and for each sample its row of this part, or None.

        None for all rows in one part.
        """
        size = size or len(self.samples)
        return [
            (self.samples[i : i + size], [row - i if 0 <= row - i < size else None for row in self.of])
            for i in range(0, len(self.samples), size)
        ]


def own_rows(samples: int) -> Rows:
    """Return a row for each sample."""
    return Rows(tuple(range(samples)), tuple(range(samples)))


def shared_rows(starts: Sequence[Hashable], actions: Sequence[Sequence[Hashable]]) -> list[Rows]:
    """Return the rows of each step. Two samples share a row until the first step in which they differ.

    starts: for each sample, all that its first step depends on but for what is done there: prompt, noise.
    actions: for each sample, what is done at each step.
    """
    steps, past = [], list(starts)
    for now in zip(*actions, strict=True):
        first: dict[Hashable, int] = {}
        present = list(zip(past, now, strict=True))
        for sample, key in enumerate(present):
            first.setdefault(key, sample)
        numbers = {key: row for row, key in enumerate(first)}
        of = tuple(numbers[key] for key in present)
        steps.append(Rows(tuple(first.values()), of))
        past = list(of)
    return steps
