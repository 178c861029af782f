"""Measure how long `+exp=hello` takes, from the start of Python to the last file.

    python benchmarks/startup.py                 # about 1 min on 2 CPU cores: 5 rounds
    python benchmarks/startup.py --rounds 1 --no-file

Each round runs three processes, one after the other: without a text cache, with an empty one, and with one that has the
prompt. Files of the libraries are in the page cache after the first process, which does not count. The results are
printed, and written to `benchmarks/results/startup-<date>.json`.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AIMS = {"cold": 5.0, "warm": 3.5}
"""Seconds on 2 cores. cold: the text encoders are loaded. warm: the prompt is in the cache."""


def run(folder: Path, cache: str) -> float:
    """Return the seconds of one process."""
    words = ["+exp=hello", "tracking=none", f"cache={cache}", f"out={folder}"]
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-m", "fluxlab.run", *words], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return time.perf_counter() - start


def measure(rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Return the seconds of every process, by kind."""
    run(scratch / "first", str(scratch / "warm"))
    seconds: dict[str, list[float]] = {"no cache": [], "cold": [], "warm": []}
    for i in range(rounds):
        caches = {"no cache": "none", "cold": str(scratch / f"cold{i}"), "warm": str(scratch / "warm")}
        for kind, cache in caches.items():
            seconds[kind].append(run(scratch / f"{kind}{i}".replace(" ", "-"), cache))
    return seconds


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-file", action="store_true", help="do not write the JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(options.rounds, Path(scratch))
    for kind, times in seconds.items():
        aim = f", aim {AIMS[kind]:g} s" if kind in AIMS else ""
        print(f"{kind:<9} median {statistics.median(times):5.2f} s, least {min(times):5.2f} s{aim}")
    import torch

    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    record = {"command": "python benchmarks/startup.py", **machine, "aims": AIMS, "seconds": seconds}
    if not options.no_file:
        file = ROOT / "benchmarks" / "results" / f"startup-{datetime.date.today():%Y-%m-%d}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n")
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
