"""What `engine=ray` costs per batch over `engine=inline`, with one worker, without starting Ray and loading the model.

    python benchmarks/engines.py                  # a minute on 2 CPU cores

Both engines compute the same batches of one image in alternating rounds, into stores of their own. The last line is the
median over rounds of the difference per batch.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import fluxlab
from fluxlab import engines
from fluxlab.experiment.engine import Engine
from fluxlab.experiment.runner import every_batch
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import open_store
from fluxlab.experiment.versions import versions


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
    arguments = parser.parse_args()
    sampling = fluxlab.Sampling(steps=1, height=16, width=16, device="cpu")  # short batches: little noise
    experiment = fluxlab.make_experiment("a red cat", seeds=arguments.images, sampling=sampling)
    differences = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        engines.start({"name": "inline"}) as inline,
        engines.start({"name": "ray", "workers": 1}) as ray,
    ):
        settings = inline.settle(experiment, None, batch_tokens=1, threads=1)
        start = time.perf_counter()
        ray.check(experiment, settings, fixed=True)
        print(f"start of Ray and of a worker with the model: {time.perf_counter() - start:.1f} s")
        for n in range(-1, arguments.rounds):  # the first round warms up
            times = [
                per_batch(engine, experiment, settings, Path(scratch, f"{name}-{n}"))
                for name, engine in (("inline", inline), ("ray", ray))
            ]
            print(f"inline {1000 * times[0]:.1f} ms, ray {1000 * times[1]:.1f} ms per batch")
            differences += [times[1] - times[0]] if n >= 0 else []
    print(f"difference {1000 * median(differences):.1f} ms per batch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
