"""What a large store costs: seconds per stage at 1,000, 10,000 and 100,000 cells, and the peak of memory.

    python benchmarks/scale.py                      # 1,000 cells, a minute on 2 CPU cores
    python benchmarks/scale.py --cells 1000 10000   # about 10 minutes

The cells are 25 variants × prompts × 4 seeds. Their images are made without a model: noise of 16 × 16 pixels. Stages:
list (cells and their keys), write (images and JSON), check (which cells are complete, every file read), measure, draw
(grid and page), seal (hash every file), resume (the run's own command on the finished store, in a process of its own,
with imports), check again (by size and time). Each size runs in a process of its own. Times are linear if the
microseconds per cell are equal in all rows.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import fluxlab
from fluxlab.engines import Inline
from fluxlab.experiment import effects, runner
from fluxlab.experiment.cells import Settings
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store, open_store
from fluxlab.experiment.versions import versions
from fluxlab.loading import load_row
from fluxlab.report.products import grid, page

VARIANTS, SEEDS, SIDE = 25, 4, 16


def overrides(cells: int) -> list[str]:
    """Return the keys of the run whose store is made, as on the command line."""
    prompts = [f"a red cat {i}" for i in range(cells // VARIANTS // SEEDS)]
    dose = [f"+variants.x{i}={{a: {{op: scale, factor: {0.5 + i / 16}}}}}" for i in range(VARIANTS - 1)]
    fixed = [f"seeds={SEEDS}", "steps=1", f"height={SIDE}", f"width={SIDE}", "unknown_words=allow", "device=cpu"]
    return ["+exp=hello", *fixed, f"prompts={json.dumps(prompts)}", *dose, "tracking=none", "threads=1"]


def experiment_of(cells: int) -> Experiment:
    """Return the experiment of `overrides`."""
    from fluxlab.compose import compose
    from fluxlab.run import RunConfig, read

    return read(compose("config", RunConfig, "schema", overrides(cells)))


def write(experiment: Experiment, settings: Settings, store: Store) -> None:
    """Write an image for every cell that the store lacks."""
    for batch in runner.every_batch(experiment, settings):
        for cell in batch.cells:
            seed = int.from_bytes(hashlib.sha256(cell.key.encode()).digest()[:8])
            pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            store.put(cell, Image.fromarray(pixels), {"height": SIDE, "width": SIDE}, batch.folder)


def stages(cells: int, folder: Path, only_check: bool) -> dict[str, float]:
    """Return the seconds of every stage, and the peak of memory in MB as `memory`."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable):
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    experiment = experiment_of(cells)
    settings = Inline(load_row).settle(experiment, None, None, 1)

    def complete(store: Store) -> bool:
        batches = runner.every_batch(experiment, settings)
        return all(runner.is_done(store, experiment, cell, batch.folder) for batch in batches for cell in batch.cells)

    timed("list", lambda: runner.every_batch(experiment, settings))
    out = folder / "run"
    with open_store(out) as store:
        store.write_experiment(experiment, settings, versions(), "benchmarks/scale.py")
        timed("write", lambda: write(experiment, settings, store))
        assert timed("check", lambda: complete(store))
        if not only_check:
            timed("measure", lambda: effects.measure(experiment, settings, store))
            run = read_store(out, check=False)
            timed("draw", lambda: (grid(run), page(run)))
        timed("seal", store.seal)
    with open_store(out) as store:
        assert timed("check again", lambda: complete(store))
    if not only_check:
        command = [sys.executable, "-m", "fluxlab.run", *overrides(cells), f"out={out}"]
        timed("resume", lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        seconds["page, MB"] = (out / "report.html").stat().st_size / 1e6
    seconds["memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1000], help="multiples of 100")
    parser.add_argument("--only-check", action="store_true", help="leave out measuring, drawing and the resumed run")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(stages(arguments.one, Path(folder), arguments.only_check)))
        return 0
    print(f"fluxlab {fluxlab.__version__}")
    for cells in arguments.cells:
        command = [sys.executable, __file__, "--one", str(cells), *(["--only-check"] if arguments.only_check else [])]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        parts = json.loads(lines[-1])
        print(f"{cells:,} cells")
        for name, value in parts.items():
            each = "" if "MB" in name else f"{1e6 * value / cells:10.0f} µs per cell"
            print(f"  {name:<12} {value:8.2f}{'' if 'MB' in name else ' s'}{each}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
