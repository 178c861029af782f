"""What the figures share: widths, type, colours, arguments, and files with the same bytes in every run."""

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fluxlab.compose import guarded
from fluxlab.drawing.style import OKABE_ITO, style, write_figure
from fluxlab.errors import UserError
from fluxlab.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMN",
    "OKABE_ITO",
    "PAGE",
    "command",
    "figure",
    "out_argument",
    "paper",
    "refusing_parser",
    "save",
    "save_caption",
    "save_table",
]

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
    """Use matplotlib's settings for print inside the block, whatever the user's own are."""
    with style(SETTINGS):
        yield


def figure(width: float, height: float) -> "Figure":
    """Return an empty figure of (width, height) inches, its size in print."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: "Figure", stem: Path) -> list[Path]:
    """Write `<stem>.pdf`, with text as text, and `<stem>.png` with 300 dpi. The same figure gives the same bytes."""
    return [write_figure(drawn, stem.with_name(f"{stem.name}{ending}"), dpi=300) for ending in (".pdf", ".png")]


def save_caption(text: str, stem: Path) -> Path:
    """Write the caption of a figure to `<stem>.txt`."""
    file = stem.with_name(f"{stem.name}.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.strip() + "\n")
    return file


def save_table(rows: Sequence[dict[str, Any]], file: Path) -> Path:
    """Write rows, at least one, as CSV: numbers with 6 digits, missing ones empty. Return the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shown = {key: f"{value:.6g}" for key, value in row.items() if isinstance(value, float)}
        writer.writerow(row | {key: "" if value == "nan" else value for key, value in shown.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.getvalue())
    return file


def refusing_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m experiments.<name>` that raises UserError for arguments it does not know."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=description, allow_abbrev=False)
    parser.error = _refuse
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def out_argument(parser: argparse.ArgumentParser, default: str = "figures") -> None:
    parser.add_argument("-o", "--out", type=Path, default=Path(default), metavar="FOLDER", help=f"default: {default}")


def command(make: Callable[[Path], list[Path]], name: str, arguments: list[str] | None = None) -> int:
    """Run `make(folder)` with the folder of `-o` and print the files that it wrote. Exit codes are `fluxlab.run`'s."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = refusing_parser(name, make.__doc__)
    out_argument(parser)

    def work() -> None:
        for file in make(parser.parse_args(arguments).out):
            print(file)

    return guarded(work, "interrupted")
