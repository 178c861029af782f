"""How the images of a large run are divided into pages: consecutive prompts, so many that a page stays usable."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxlab.experiment.reading import Run

CELLS = 2000
"""Cells on one page. A page has more only if there are more variants."""

Place = tuple[str, int]


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
    if sum(len(run.metrics) for run in runs) <= CELLS:
        return [Part(list(enumerate(runs)), name, "")]
    groups = [_groups(run, max(1, CELLS // len(runs))) for run in runs]
    divided = [run.divided(group) for run, group in zip(runs, groups, strict=True)]
    longest = max(range(len(runs)), key=lambda i: len(groups[i]))
    labels = _labels(runs[longest].places, groups[longest])
    return [
        Part(
            [(i, parts[n]) for i, parts in enumerate(divided) if n < len(parts)],
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


def _groups(run: Run, cells: int) -> list[list[Place]]:
    """Return the (prompt, seed) of every page. The seeds of a prompt are on one page if they fit on one."""
    count: dict[str, dict[Place, int]] = {}
    for row in run.metrics:
        of_prompt, place = count.setdefault(row["prompt"], {}), (row["prompt"], row["seed"])
        of_prompt[place] = of_prompt.get(place, 0) + 1
    groups: list[list[Place]] = []
    room = 0
    for of_prompt in count.values():
        if sum(of_prompt.values()) > room:
            room = 0
        for place, needed in of_prompt.items():
            if not groups or needed > room:
                groups.append([])
                room = cells
            groups[-1].append(place)
            room -= needed
    return groups


def _labels(places: Sequence[Place], groups: Sequence[Sequence[Place]]) -> list[str]:
    """Return which prompts the pages of a run show, and which seeds if those of a prompt are on several pages."""
    seeds: dict[str, list[int]] = {}
    for prompt, seed in places:
        seeds.setdefault(prompt, []).append(seed)
    number = {prompt: i + 1 for i, prompt in enumerate(seeds)}
    labels = []
    for group in groups:
        first, last = group[0], group[-1]
        if first[0] != last[0]:
            labels.append(f"prompts {number[first[0]]} to {number[last[0]]}")
        elif len(group) == len(seeds[first[0]]):
            labels.append(f"prompt {number[first[0]]}")
        else:
            span = f"seed {first[1]}" if first == last else f"seeds {first[1]} to {last[1]}"
            labels.append(f"prompt {number[first[0]]}, {span}")
    return labels
