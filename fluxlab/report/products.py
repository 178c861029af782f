"""The pictures that every finished store gets."""

from pathlib import Path

from fluxlab.experiment.reading import Run
from fluxlab.report.grid import write_grid

GRID_FILE = "grid.png"


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
