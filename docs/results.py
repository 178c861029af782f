"""Run the experiments that README quotes on the embedded model: `python docs/results.py`, about 1 min on 2 CPU cores.

Writes `docs/results.json`: rows of each run's `summary.csv`. Run it when the embedded model changes, and after it
`python docs/tables.py`.
"""

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "fluxlab" / "assets" / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
RESULTS = ROOT / "docs" / "results.json"
QUOTED = {"step_window": ("ssim", "object")}
"""Experiment: metrics that are kept."""


def main() -> int:
    from fluxlab import run
    from fluxlab.files import sha256_of

    results: dict = {"weights": sha256_of(WEIGHTS)[:12]}
    with tempfile.TemporaryDirectory() as folder:
        for name, metrics in QUOTED.items():
            out = Path(folder) / name
            code = run.main([f"+exp={name}", "model=tiny", "device=cpu", "tracking=none", f"out={out}"])
            if code:
                return code
            results[name] = rows(out, metrics)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def rows(store: Path, metrics: Sequence[str]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return a store's summary: variant → metric → n, mean, low and high."""
    from fluxlab.experiment.reading import read_store

    found: dict = {}
    for row in read_store(store).summary:
        if row["metric"] in metrics:
            numbers = {key: row[key] for key in ("n", "mean", "low", "high")}
            finite = {key: None if math.isnan(value) else round(value, 6) for key, value in numbers.items()}
            found.setdefault(row["variant"], {})[row["metric"]] = finite
    return found


if __name__ == "__main__":
    sys.exit(main())
