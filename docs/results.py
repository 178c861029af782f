"""Run the experiments that README quotes on the embedded model: `python docs/results.py`, about 2 min on 2 CPU cores.

Writes `docs/results.json`: rows of each run's `summary.csv`. Run it when the embedded model changes, and after it
`python docs/tables.py`.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results.json"
QUOTED = {"step_window": ("ssim", "object", "shape", "word"), "layer_probe": ("ssim", "object", "shape", "word")}
"""Experiment: metrics that are kept."""


def summary(experiment: str, folder: Path) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Run an experiment and return its summary: variant → metric → n, mean, low and high."""
    from fluxlab import run
    from fluxlab.experiment.reading import read_store

    code = run.main([f"+exp={experiment}", "model=tiny", "device=cpu", "tracking=none", f"out={folder}"])
    if code:
        sys.exit(code)
    found: dict = {}
    for row in read_store(folder).summary:
        if row["metric"] in QUOTED[experiment]:
            numbers = {key: row[key] for key in ("n", "mean", "low", "high")}
            finite = {key: None if math.isnan(value) else round(value, 6) for key, value in numbers.items()}
            found.setdefault(row["variant"], {})[row["metric"]] = finite
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = {name: summary(name, Path(folder) / name) for name in QUOTED}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
