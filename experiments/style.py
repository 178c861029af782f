"""What the figures share: widths, letters, colours, and files whose bytes are the same at every run."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.compose import guarded
from fluxlab.drawing.style import OKABE_ITO, style, write_figure
from fluxlab.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMN", "OKABE_ITO", "PAGE", "command", "figure", "paper", "save", "save_caption"]

COLUMN, PAGE = 3.35, 6.9
"""Widths in inches: one column of a two-column page, and both."""

SETTINGS = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def paper() -> Iterator[None]:
    """matplotlib's settings while a figure is drawn: a user's own have no part in it."""
    with style(SETTINGS):
        yield


def figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, printed at its own size."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: "Figure", stem: Path) -> list[Path]:
    """Write `<stem>.pdf`, with letters as letters, and `<stem>.png` at 300 dots an inch: equal figures, equal bytes."""
    return [write_figure(drawn, stem.with_name(f"{stem.name}{ending}"), dpi=300) for ending in (".pdf", ".png")]


def save_caption(text: str, stem: Path) -> Path:
    """Write `<stem>.txt`, what stands below the figure."""
    file = stem.with_name(f"{stem.name}.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.strip() + "\n")
    return file


def command(make: Callable[[Path], list[Path]], name: str, arguments: list[str] | None = None) -> int:
    """Run `make(folder)` with the folder of `-o`, and say which files it wrote. Exit codes as `fluxlab.run`'s."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=make.__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    options = parser.parse_args(arguments)

    def work() -> None:
        for file in make(options.out):
            print(file)

    return guarded(work, "interrupted")
