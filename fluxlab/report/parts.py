"""How the images of a large run are divided into pages: consecutive prompts, so many that a page stays usable."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from fluxlab.experiment.reading import Run

CELLS = 2000
"""Cells on one page. A page has more only if there are more variants."""


@dataclass(frozen=True)
class Part:
    """One page. file: relative to the index page, which is the first part. label: which prompts, in words.

    places: (number of the run, which of its places this page shows, None for all).
    """

    places: list[tuple[int, range | None]]
    file: str
    label: str

    def runs(self, whole: Sequence[Run]) -> list[tuple[int, Run]]:
        """Return (number of the run, the run with only the cells of this page). whole: all runs."""
        return [(i, whole[i] if places is None else whole[i].part(places)) for i, places in self.places]


def divide(runs: Sequence[Run], name: str) -> list[Part]:
    """Return the pages of several runs, of at most `CELLS` cells each. name: that of the index page's file."""
    if sum(len(run.metrics) for run in runs) <= CELLS:
        return [Part([(i, None) for i in range(len(runs))], name, "")]
    groups = [_groups(run, max(1, CELLS // len(runs))) for run in runs]
    longest = max(range(len(runs)), key=lambda i: len(groups[i]))
    labels = _labels(runs[longest].places, groups[longest])
    return [
        Part(
            [(i, of_run[n]) for i, of_run in enumerate(groups) if n < len(of_run)],
            name if n == 0 else f"{folder(name)}/{n + 1:04}.html",
            label,
        )
        for n, label in enumerate(labels)
    ]


def folder(name: str) -> str:
    """Return the name of the folder of all pages but the index page."""
    return f"{Path(name).stem}-pages"


def links(parts: Sequence[Part], n: int) -> list[tuple[str, str]]:
    """Return (label, address) of every page as seen from page n; "" is the address of that page. Empty for one page."""
    if len(parts) == 1:
        return []
    up = "" if n == 0 else "../"
    return [(part.label, "" if i == n else f"{up}{part.file}") for i, part in enumerate(parts)]


def _groups(run: Run, cells: int) -> list[range]:
    """Return which places are on every page. The seeds of a prompt are on one page if they fit on one."""
    most = max(1, cells // len(run.variants))
    groups: list[range] = []
    for _, of_prompt in groupby(range(len(run.places)), key=lambda p: run.places[p][0]):
        numbers = list(of_prompt)
        if groups and len(groups[-1]) + len(numbers) <= most:
            groups[-1] = range(groups[-1].start, numbers[-1] + 1)
        else:
            groups += [range(n, min(n + most, numbers[-1] + 1)) for n in range(numbers[0], numbers[-1] + 1, most)]
    return groups


def _labels(places: Sequence[tuple[str, int]], groups: Sequence[range]) -> list[str]:
    """Return which prompts the pages of a run show, and which seeds if those of a prompt are on several pages."""
    seeds: dict[str, list[int]] = {}
    for prompt, seed in places:
        seeds.setdefault(prompt, []).append(seed)
    number = {prompt: i + 1 for i, prompt in enumerate(seeds)}
    labels = []
    for group in groups:
        first, last = places[group[0]], places[group[-1]]
        if first[0] != last[0]:
            labels.append(f"prompts {number[first[0]]} to {number[last[0]]}")
        elif len(group) == len(seeds[first[0]]):
            labels.append(f"prompt {number[first[0]]}")
        else:
            span = f"seed {first[1]}" if first == last else f"seeds {first[1]} to {last[1]}"
            labels.append(f"prompt {number[first[0]]}, {span}")
    return labels
