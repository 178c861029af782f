"""Colours, settings and titles of figures, and figure files with the same bytes on every run."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.errors import UserError
from fluxlab.files import write_atomic
from fluxlab.positions.program import Program
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_DATES = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}
"""The file types that `write_figure` writes, and the metadata that it leaves out."""

OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
"""Colours that colour-blind readers can distinguish (Okabe and Ito, Color Universal Design, 2008)."""

GREY = "0.75"
STYLE = {"font.size": 8, "figure.titlesize": 9, "legend.frameon": False}
MARKS = {TEXT: ("^", OKABE_ITO["orange"]), IMAGE: ("o", OKABE_ITO["blue"]), REFERENCE: ("s", OKABE_ITO["purple"])}


def title(program: Program, labels: Mapping[str, str]) -> str:
    """Return a program in at most four lines, and labels in another."""
    lines = textwrap.wrap(program.describe(), 100, max_lines=4, placeholder=" …")
    return "\n".join([*lines, ", ".join(labels.values())]).strip()


@contextmanager
def style(settings: Mapping[str, Any]) -> Iterator[None]:
    """Use matplotlib's defaults and `settings`, and not the user's own configuration."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def write_figure(figure: "Figure", path: str | Path, dpi: int = 200) -> Path:
    """Write a figure as PNG, PDF or SVG, depending on the file's ending. Raises UserError for another ending.

    The same figure has the same bytes on every run. Text in a PDF stays text.
    """
    file = check_ending(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with style({"pdf.fonttype": 42, "svg.hashsalt": "fluxlab"}):
        write_atomic(
            file,
            lambda handle: figure.savefig(handle, format=file.suffix[1:], dpi=dpi, metadata=NO_DATES[file.suffix]),
        )
    return file


def check_ending(path: str | Path) -> Path:
    """Return the path of a figure. Raises UserError for an ending that `write_figure` does not write."""
    if Path(path).suffix not in NO_DATES:
        raise UserError(f"{path}: expected a name that ends in {', '.join(NO_DATES)}")
    return Path(path)
