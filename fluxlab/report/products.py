"""What every finished store gets to be looked at."""

from pathlib import Path

from fluxlab.drawing.grid import write_grid
from fluxlab.experiment.reading import Run
from fluxlab.report.attention.pictures import write_pictures
from fluxlab.report.page import write_report

GRID_FILE, PAGE_FILE = "grid.png", "report.html"


def grid(run: Run) -> Path:
    """Write `grid.png`: variants × (prompt, seed), the baseline first."""
    rows = [(name, run.describe(name)) for name in run.variants]
    title = run.record["name"] + (f": {run.record['caption']}" if run.record["caption"] else "")
    return write_grid(
        run.path / GRID_FILE,
        rows,
        run.places,
        lambda row, column: run.image(run.variants[row], *run.places[column]),
        title,
    )


def page(run: Run) -> Path:
    """Write the pictures of attention, where a run has captured it, and `report.html`, which shows them."""
    write_pictures(run)
    return write_report([run.path], run.path / PAGE_FILE)
