"""How the images of a large run are divided into pages: consecutive prompts, so many that a page stays usable."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxlab.experiment.reading import Run

CELLS = 2000
"""Cells on one page. A page has more only if a single prompt has more."""


@dataclass(frozen=True)
class Part:
    """One page. runs: (number of the run, the run with only the prompts of this page). file: relative to the index
    page, which is the first part. label: which prompts, in words.
    """

    runs: list[tuple[int, Run]]
    file: str
    label: str


def divide(runs: Sequence[Run], name: str) -> list[Part]:
    """Return the pages of several runs, of at most `CELLS` cells each. name: that of the index page's file."""
    groups = [_groups(run, max(1, CELLS // len(runs))) for run in runs]
    if sum(len(run.metrics) for run in runs) <= CELLS:
        return [Part(list(enumerate(runs)), name, "")]
    parts = []
    for n in range(max(map(len, groups))):
        shown = [
            (i, run.only(group[n])) for i, (run, group) in enumerate(zip(runs, groups, strict=True)) if n < len(group)
        ]
        file = name if n == 0 else f"{Path(name).stem}-pages/{n + 1:04}.html"
        parts.append(Part(shown, file, _label(groups, n)))
    return parts


def links(parts: Sequence[Part], n: int) -> list[tuple[str, str]]:
    """Return (label, address) of every page as seen from page n; "" is the address of that page. Empty for one page."""
    if len(parts) == 1:
        return []
    up = "" if n == 0 else "../"
    return [(part.label, "" if i == n else f"{up}{part.file}") for i, part in enumerate(parts)]


def _groups(run: Run, cells: int) -> list[list[str]]:
    """Return the prompts in groups of consecutive ones."""
    count: dict[str, int] = {}
    for row in run.metrics:
        count[row["prompt"]] = count.get(row["prompt"], 0) + 1
    groups: list[list[str]] = []
    room = 0
    for prompt, needed in count.items():
        if not groups or needed > room:
            groups.append([])
            room = cells
        groups[-1].append(prompt)
        room -= needed
    return groups


def _label(groups: Sequence[list[list[str]]], n: int) -> str:
    """Return which prompts page n shows: those of the run that has most pages."""
    longest = max(groups, key=len)
    first = sum(map(len, longest[:n])) + 1
    last = first + len(longest[n]) - 1
    return f"prompt {first}" if first == last else f"prompts {first} to {last}"
