"""Measure what interventions and captured activations cost: 1,152 tokens, hidden size 1024, two blocks.

python benchmarks/interventions.py [--rounds 9] [--dtype float32] [--cpu-time]

Prints medians of interleaved rounds. `inject` is a batch of source and target, as a multiple of the two samples
computed one after the other. Captured activations are a multiple of the forward pass without them. On a busy machine,
set OMP_NUM_THREADS=1 and --cpu-time to count the work of this process only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fluxlab import batching
from fluxlab.model import Flux, FluxParams
from fluxlab.positions import Layout, Program, compile_interventions, compile_programs
from fluxlab.probes import Probe

TEXT, GRID = 128, (32, 32)
INJECTED = {
    "keys and values": {"what": ["keys", "values"]},
    "keys and values of a box": {"what": ["keys", "values"], "tokens": {"box": [0, 0, 32, 16]}},
    "keys before rotation": {"what": "keys", "rotation": "before"},
    "residual": {"what": "residual"},
    "all sites": {"what": "all"},
    "appended, one block": {"what": ["keys", "values"], "mode": "append", "tokens": "image", "blocks": 1},
}
CAPTURED = {
    "one site, mean over tokens": {"site": "residual", "average": ["tokens"]},
    "one site, image tokens": {"site": "residual", "tokens": "image"},
    "keys before rotation, one head": {"site": "keys", "rotation": "before", "heads": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = Flux(FluxParams(64, 64, 768, 1024, 1024, 4.0, 8, 1, 1, (16, 56, 56), 10000, True, False)).to(dtype)
    context = batching.context(
        model.params, Layout(TEXT, GRID), (1.0, 0.0), None, torch.device("cpu"), torch.float32, (64, 64), 512
    )
    table = compile_programs([Program()], context).at(1.0).rotary
    tables = [(table, table)] * context.blocks
    inputs = [torch.randn(2, n, c, dtype=dtype) for n, c in ((GRID[0] * GRID[1], 64), (TEXT, 1024))]
    pooled = torch.randn(2, 768, dtype=dtype)

    def forward(rows: slice, **more: object) -> None:
        x, txt, y = inputs[0][rows], inputs[1][rows], pooled[rows]
        model(x, None, txt, None, torch.ones(len(x)), y, rotary=table, **more)

    def injected(edit: dict) -> Callable[[], None]:
        programs = [Program(), Program.from_config({"a": {"op": "inject", "source": 0, **edit}})]
        interventions = compile_interventions(programs, context, 2)
        return lambda: forward(slice(0, 2), sites=interventions.at(0, 1.0, tables))

    def captured(request: dict) -> Callable[[], None]:
        def run() -> None:
            probe = Probe({"max_mb": 4000, "a": {"kind": "activation", **request}})
            probe.begin(context, 1)
            taps = probe.taps(0)
            sites = batching.block_sites(None, probe, 0, 1.0, table, context.blocks)
            forward(slice(0, 1), taps=taps, sites=sites)

        return run

    def apart() -> None:
        forward(slice(0, 1))
        forward(slice(1, 2))

    with torch.inference_mode():
        rows = [("inject: " + name, apart, injected(edit)) for name, edit in INJECTED.items()]
        rows += [("capture: " + name, lambda: forward(slice(0, 1)), captured(one)) for name, one in CAPTURED.items()]
        times: dict[str, list[float]] = {name: [] for name, *_ in rows}
        for round_ in range(options.rounds + 1):
            for name, plain, changed in rows:
                spent = []
                for run in (plain, changed):
                    start = clock()
                    run()
                    spent.append(clock() - start)
                if round_:  # the first includes set-up
                    times[name].append(spent[1] / spent[0])
    for name, ratios in times.items():
        print(f"{name:<42} {statistics.median(ratios):.3f} ×")


if __name__ == "__main__":
    main()
