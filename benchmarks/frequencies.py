"""Measure a batch of 16 programs with different frequency ops against 16 baselines.

python benchmarks/frequencies.py [--rounds 7] [--steps 20] [--model tiny] [--enlarge 1.5]

Prints the time of a whole sampling run of each batch, tables included, as medians of interleaved rounds, and their
ratio. The bound is 1.15. On a busy machine, set OMP_NUM_THREADS=1 and --cpu-time to count this process only.
"""

import argparse
import statistics
import time

import torch

import fluxlab
from fluxlab.settings import Sampling

EDITS = [
    {"op": "pi"},
    {"op": "ntk"},
    {"op": "yarn"},
    {"op": "dype"},
    {"op": "dype", "method": "ntk"},
    {"op": "dype", "method": "pi"},
    {"op": "dype", "variant": "comfyui"},
    {"op": "riflex"},
    {"op": "imax"},
    {"op": "theta", "value": 2000},
    {"op": "band", "periods": [0, 16]},
    {"op": "band", "periods": [0, 16], "rule": "drop", "axes": "row"},
    {"op": "gain", "factor": 1.2, "to": 0.8, "side": "keys"},
    {"op": "pi", "factor": 2, "heads": [0]},
    {"op": "yarn", "strength": {"from": 1, "to": 0}},
    {"op": "ntk", "tokens": "image"},
]
PROMPT = "A cat holding a sign that says hello world"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--enlarge", type=float, default=1.5)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    pipe = fluxlab.load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    settings = Sampling(steps=options.steps, enlarge=options.enlarge)
    batches = {"16 baselines": None, "16 frequency ops": [{"a": edit} for edit in EDITS]}
    seeds, clock = list(range(len(EDITS))), time.process_time if options.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(options.rounds + 1):  # the first round includes set-up
        for name, programs in batches.items():
            start = clock()
            latents = pipe.sample([PROMPT] * len(EDITS), seeds, programs, settings, output="latent")
            latents.sum().item()
            times[name].append(clock() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<18}{seconds:>8.2f} s")
    base, changed = medians.values()
    print(f"ratio {changed / base:.3f} (at most 1.15): {options.model}, {options.steps} steps, {options.dtype}")


if __name__ == "__main__":
    main()
