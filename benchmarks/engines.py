"""What `engine=ray` costs per batch over `engine=inline`, with one worker, without starting Ray and loading the model.

    python benchmarks/engines.py                  # a minute on 2 CPU cores

Both engines compute the same batches of one image in alternating rounds, into stores of their own. The last line is the
median over rounds of the difference per batch and of the ratio.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import fluxlab
from fluxlab import engines
from fluxlab.experiment.engine import Engine
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import open_store
from fluxlab.experiment.versions import versions
from fluxlab.experiment.work import every_batch


def per_batch(engine: Engine, experiment: Experiment, settings, folder: Path) -> float:
    """Return the seconds per batch of one round."""
    with open_store(folder) as store:
        store.write_experiment(experiment, settings, versions(), "benchmarks/engines.py")
        batches = every_batch(experiment, settings)
        start = time.perf_counter()
        ended = list(engine.compute(experiment, settings, store, batches))
        seconds = time.perf_counter() - start
        assert len(ended) == len(batches)
    return seconds / len(batches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    arguments = parser.parse_args()
    sampling = fluxlab.Sampling(steps=1, height=16, width=16, device="cpu")  # short batches: little noise
    experiment = fluxlab.make_experiment("a red cat", seeds=arguments.images, sampling=sampling)
    rounds = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        engines.start({"name": "inline"}) as inline,
        engines.start({"name": "ray", "workers": 1}) as ray,
    ):
        settings = inline.settle(experiment, None, batch_tokens=1, threads=1)
        start = time.perf_counter()
        ray.check(experiment, settings, fixed=True)
        started = time.perf_counter() - start
        print(f"start of Ray and of a worker with the model: {started:.1f} s")
        for n in range(-1, arguments.rounds):  # the first round warms up
            times = [
                1000 * per_batch(engine, experiment, settings, Path(scratch, f"{name}-{n}"))
                for name, engine in (("inline", inline), ("ray", ray))
            ]
            print(f"inline {times[0]:.1f} ms, ray {times[1]:.1f} ms per batch", flush=True)
            rounds += [times] if n >= 0 else []
    difference = median(with_ray - alone for alone, with_ray in rounds)
    ratio = median(with_ray / alone for alone, with_ray in rounds)
    print(f"difference {difference:.1f} ms per batch, ratio {ratio:.2f}")
    if arguments.json:
        results = {
            "fluxlab": fluxlab.__version__,
            "processors": os.cpu_count(),
            "start_s": round(started, 1),
            "ms_per_batch": [{"inline": round(a, 2), "ray": round(b, 2)} for a, b in rounds],
            "difference_ms": round(difference, 2),
            "ratio": round(ratio, 3),
        }
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
