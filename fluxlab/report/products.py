"""The files that every finished run folder gets: `grid.png`, attention images, `report.html`."""

from pathlib import Path

from fluxlab.drawing.grid import write_grid
from fluxlab.experiment.reading import Run
from fluxlab.report.attention.pictures import write_pictures
from fluxlab.report.page import REPORT_FILE, write_report
from fluxlab.report.parts import divide

GRID_FILE, PAGE_FILE = "grid.png", REPORT_FILE


def grid(run: Run) -> Path:
    """Write `grid.png`: one row per variant, the baseline first; one column per (prompt, seed).

    A large run is reduced to its first prompts: those of the first page of `report.html`.
    """
    first = divide([run], PAGE_FILE)[0]
    ((_, run),) = first.runs([run])
    rows = [(name, run.describe(name)) for name in run.variants]
    title = run.record["name"] + (f": {run.record['caption']}" if run.record["caption"] else "")
    if first.label:
        title += f" ({first.label})"
    return write_grid(
        run.path / GRID_FILE,
        rows,
        run.places,
        lambda row, column: run.image(run.variants[row], *run.places[column]),
        title,
    )


def page(run: Run) -> Path:
    """Write `report.html`, and the attention images that it shows if the run captured attention."""
    write_pictures(run)
    return write_report([run], run.path / PAGE_FILE)
