"""What a large store costs: seconds and peak of memory per stage, at 1,000, 10,000 and 100,000 synthetic cells.

    python benchmarks/scale.py                             # 1,000 cells, a minute on 2 CPU cores
    python benchmarks/scale.py --cells 1000 10000 100000   # 9 minutes
    python benchmarks/scale.py --cells 100 --side 1024     # what metrics take at the size of FLUX.1
    python benchmarks/scale.py --cells 1000 10000 100000 --json benchmarks/results/scale-<date>.json

The cells are 25 variants × prompts × 4 seeds. Their images are made without a model: noise of 16 × 16 pixels, or
of another size. Stages:
list (cells, keys and batches), write (images and JSON, without waiting for the disk), check (which cells are complete,
every file read), plan (what `plan=true` prints), measure, draw (grid and pages), seal (hash every file), check again
(by size and time), begin (what a new run checks before its first image), resume (the run's own command on the finished
store, in a process of its own, with imports).

Each size runs in a process of its own. A stage is linear if its microseconds of CPU time per cell are equal at all
sizes. MB are the peak of the process during the stage, libraries and what earlier stages have left included.
"""

import argparse
import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

import fluxlab
from fluxlab.engines import Inline
from fluxlab.experiment import effects
from fluxlab.experiment.cells import Settings
from fluxlab.experiment.plan import plan
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store, open_store
from fluxlab.experiment.versions import versions
from fluxlab.experiment.work import every_batch, is_done, unused_images
from fluxlab.loading import load_row
from fluxlab.report.products import grid, page

VARIANTS, SEEDS = 25, 4


def overrides(cells: int, side: int) -> list[str]:
    """Return the keys of the run whose store is made, as on the command line."""
    prompts = [f"a red cat {i}" for i in range(cells // VARIANTS // SEEDS)]
    dose = [f"+variants.x{i}={{a: {{op: scale, factor: {0.5 + i / 16}}}}}" for i in range(VARIANTS - 1)]
    fixed = [f"seeds={SEEDS}", "steps=1", f"height={side}", f"width={side}", "unknown_words=allow", "device=cpu"]
    return ["+exp=hello", *fixed, f"prompts={json.dumps(prompts)}", *dose, "tracking=none", "threads=1"]


def experiment_of(cells: int, side: int) -> Experiment:
    """Return the experiment of `overrides`."""
    from fluxlab.compose import compose
    from fluxlab.run import RunConfig, read

    return read(compose("config", RunConfig, "schema", overrides(cells, side)))


def _no_wait(file: int) -> None:
    """Stand in for fsync. A mock would keep a record of every call."""


def write(experiment: Experiment, settings: Settings, store: Store) -> None:
    """Write an image for every cell that the store lacks."""
    side = settings.height
    for batch in every_batch(experiment, settings):
        for cell in batch.cells:
            seed = int.from_bytes(hashlib.sha256(cell.key.encode()).digest()[:8])
            pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
            store.put(cell, Image.fromarray(pixels), {"height": side, "width": side}, batch.folder)


def stages(cells: int, side: int, folder: Path, only_check: bool) -> dict[str, dict[str, float]]:
    """Return what every stage took: `seconds`, of which the processor worked `cpu`, and as `mb` the peak of memory."""
    taken: dict[str, dict[str, float]] = {}

    def timed(name: str, work: Callable):
        _reset_peak()
        start, used = time.perf_counter(), time.process_time()
        result = work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
        taken[name] = {"seconds": round(seconds, 3), "cpu": round(cpu, 3), "mb": _peak("self")}
        return result

    experiment = timed("start", lambda: experiment_of(cells, side))
    engine = Inline(load_row)
    settings = engine.settle(experiment_of(100, side), None, None, 1)  # they do not depend on the prompts

    def complete(store: Store) -> bool:
        batches = every_batch(experiment, settings)
        return all(is_done(store, experiment, cell, batch.folder) for batch in batches for cell in batch.cells)

    def begin(store: Store) -> None:
        engine.check(experiment, settings, fixed=False)
        unused_images(experiment, settings, store)

    def drawn(out: Path) -> None:
        run = read_store(out, check=False)
        grid(run)
        page(run)

    timed("list", lambda: sum(len(batch.cells) for batch in every_batch(experiment, settings)))
    out = folder / "run"
    with open_store(out) as store:
        store.write_experiment(experiment, settings, versions(), "benchmarks/scale.py")
        with mock.patch("fluxlab.files.os.fsync", _no_wait):  # 4 waits per cell, which a run spreads over days
            timed("write", lambda: write(experiment, settings, store))
        assert timed("check", lambda: complete(store))
        if not only_check:
            timed("plan", lambda: plan(experiment, out))
            timed("measure", lambda: effects.measure(experiment, settings, store))
            timed("draw", lambda: drawn(out))
        timed("seal", store.seal)
    with open_store(out) as store:
        assert timed("check again", lambda: complete(store))
    if not only_check:
        with open_store(folder / "new") as store:
            timed("begin", lambda: begin(store))
        command = [sys.executable, "-m", "fluxlab.run", *overrides(cells, side), f"out={out}"]
        before = os.stat(out / "manifest.jsonl").st_mtime_ns
        taken["resume"] = _of_process(command)
        assert os.stat(out / "manifest.jsonl").st_mtime_ns == before  # nothing was missing
        pages = [out / "report.html", *out.glob("report-pages/*.html")]
        taken["pages"] = {"number": len(pages), "largest_mb": round(max(p.stat().st_size for p in pages) / 1e6, 1)}
    return taken


def _reset_peak() -> None:
    """Let the peak of this process start again from what it has now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _peak(process: int | str) -> int:
    """Return the most memory that a process has had, in MB; 0 for one that has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM")), 0)


def _of_process(command: list[str]) -> dict[str, float]:
    start, used, peak = time.perf_counter(), _cpu_of_children(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _peak(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    seconds, cpu = time.perf_counter() - start, _cpu_of_children() - used
    return {"seconds": round(seconds, 3), "cpu": round(cpu, 3), "mb": peak}


def _cpu_of_children() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def shown(name: str, values: dict[str, float], cells: int) -> str:
    """Return a line about a stage."""
    if "seconds" not in values:
        return f"  {name:<12} {values['number']} of up to {values['largest_mb']} MB"
    each = 1e6 * values["cpu"] / cells
    times = f"{values['seconds']:8.2f} s, CPU {values['cpu']:8.2f} s {each:10.0f} µs per cell"
    return f"  {name:<12} {times} {values['mb']:8.0f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1000], help="multiples of 100")
    parser.add_argument("--side", type=int, default=16, help="pixels of an image's side")
    parser.add_argument("--only-check", action="store_true", help="leave out measuring, drawing and the resumed run")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(stages(arguments.one, arguments.side, Path(folder), arguments.only_check)))
        return 0
    print(f"fluxlab {fluxlab.__version__}")
    results = {}
    for cells in arguments.cells:
        command = [sys.executable, __file__, "--one", str(cells), "--side", str(arguments.side)]
        command += ["--only-check"] if arguments.only_check else []
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        results[cells] = json.loads(lines[-1])
        print(f"{cells:,} cells of {arguments.side}² pixels")
        for name, values in results[cells].items():
            print(shown(name, values, cells), flush=True)
        if arguments.json:
            facts = {
                "fluxlab": fluxlab.__version__,
                "processors": os.cpu_count(),
                "python": sys.version.split()[0],
                "side": arguments.side,
            }
            arguments.json.write_text(json.dumps({**facts, "cells": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
