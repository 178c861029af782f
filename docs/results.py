"""Run the experiments that README and docs quote on the embedded model: `python docs/results.py`, about 14 min on 2 CPU
cores. `python docs/results.py step_window` runs one of them, `--runs FOLDER` keeps the run folders and resumes them.

Writes `docs/results.json`: rows of each run's `summary.csv`, or of the table of its figure. Run it when the embedded
model changes, and after it `python docs/tables.py`.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "fluxlab" / "assets" / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
RESULTS = ROOT / "docs" / "results.json"
QUOTED = {
    "step_window": ("ssim", "object"),
    "freeflux_probe": ("psnr",),
    "trace": (),
    **dict.fromkeys(("dose_response", "dose_edits", "step_roles"), ("ssim", "psnr")),
}
"""Experiment: metrics that are kept. Of `trace`, what `experiments.tracetable` reads in the images instead."""


def main(arguments: Sequence[str]) -> int:
    from fluxlab import run
    from fluxlab.files import sha256_of

    parser = argparse.ArgumentParser("results")
    parser.add_argument(
        "experiments", nargs="*", metavar="experiment", help=f"some of {', '.join(QUOTED)}; default: all"
    )
    parser.add_argument("--runs", type=Path, help="where the run folders are; default: a temporary folder")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.experiments if name not in QUOTED]:
        parser.error(f"{unknown[0]}: not quoted, expected some of {', '.join(QUOTED)}")
    results: dict = {"weights": sha256_of(WEIGHTS)[:12]}
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if before.get("weights") == results["weights"]:
        results |= before
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.experiments or QUOTED:
            out = (asked.runs or Path(temporary)) / name
            words = ["model=tiny", "device=cpu", "tracking=none", f"out={out}", *overrides(name)]
            code = run.main([f"+exp={name}", *words])
            if code:
                return code
            results[name] = transfers(out) if name == "trace" else rows(out, QUOTED[name])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def overrides(name: str) -> list[str]:
    """Return what differs from the experiment's file: FreeFlux's probe gets the prompts of `trace`."""
    import yaml

    if name != "freeflux_probe":
        return []
    trace = yaml.safe_load((ROOT / "configs" / "exp" / "trace.yaml").read_text())
    return [f"prompts={json.dumps(trace['prompts'])}", f"steps={trace['steps']}"]


def rows(store: Path, metrics: Sequence[str]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return a store's summary: variant → metric → n, mean, low and high."""
    from fluxlab.experiment.reading import read_store

    found: dict = {}
    for row in read_store(store).summary:
        if row["metric"] in metrics and not row["variant"].startswith("by_"):  # FreeFlux's keys that move
            numbers = {key: row[key] for key in ("n", "mean", "low", "high")}
            finite = {key: None if math.isnan(value) else round(value, 6) for key, value in numbers.items()}
            found.setdefault(row["variant"], {})[row["metric"]] = finite
    return found


def transfers(store: Path) -> dict[str, dict[str, dict[str, float | int]]]:
    """Return how many images of a trace have the source's attribute: "text → image, block 0" → attribute → numbers.

    Patches of a part of the steps are left out.
    """
    sys.path.insert(0, str(ROOT))
    from experiments.tracetable import patches, table_rows
    from fluxlab.experiment.reading import read_store

    run = read_store(store)
    every = [patch for patch in patches(run) if patch.kind != "steps"]
    names, found = {patch.variant: f"{patch.quadrant}, {patch.where}" for patch in every}, {}
    for row in table_rows(run, every):
        if row["variant"] in names:
            ends = {"mean": "source", "low": "source_low", "high": "source_high"}
            numbers = {"n": row["n"], **{key: round(row[column], 6) for key, column in ends.items()}}
            found.setdefault(names[row["variant"]], {})[row["attribute"]] = numbers
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
