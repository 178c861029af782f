"""Measure what a program costs as a share of a forward pass: 1,152 tokens, hidden size 1024.

python benchmarks/programs.py [--rounds 9] [--depth 1 2] [--dtype float32]

Prints two shares of the unchanged forward pass, as medians of interleaved rounds: building the tables and masks of a
step (again at every step, as for a strength that changes), and the extra time of a forward pass that uses them. On a
busy machine, set OMP_NUM_THREADS=1 and --cpu-time to count the work of this process only.
"""

import argparse
import statistics
import time

import torch

from fluxlab.model import Flux, FluxParams
from fluxlab.positions import Context, Layout, Program, compile_programs
from fluxlab.sampling import image_ids, text_ids

TEXT, GRID, HEADS = 128, (32, 32), 8
FADE = {"strength": {"from": 1, "to": 0}}
LEFT = {"box": [0, 0, 1, 0.5], "unit": "fraction"}

PROGRAMS = {
    "unchanged": {},
    "scale": {"a": {"op": "scale", "factor": 1.2, **FADE}},
    "keys of a block": {"a": {"op": "zero", "side": "keys", "blocks": [0], **FADE}},
    "heads": {"a": {"op": "rotate", "degrees": 30, "heads": "0-3", **FADE}},
    "two groups": {"a": {"op": "scale", "factor": 0.5, "side": "keys", "seen_by": LEFT, **FADE}},
    "temperature": {"a": {"op": "temperature", "factor": 1.5, **FADE}},
    "mask": {"a": {"op": "mask", "from": "text", "to": "image", **FADE}},
    "all ids ops": {
        "a": {"op": "scale", "factor": 1.2, "origin": "centre", **FADE},
        "b": {"op": "rotate", "degrees": 10, "blocks": "double", **FADE},
        "c": {"op": "warp", "field": [[[0, 0], [1, 1]], [[1, 0], [0, 1]]], "blocks": "single", "side": "keys", **FADE},
        "d": {"op": "jitter", "std": 0.3, "heads": "0-1", **FADE},
        "e": {"op": "relocate", "tokens": "text", "to": {"box": [0, 0, 32, 32]}, **FADE},
    },
}


def median(times: list[float]) -> float:
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--depth", type=int, nargs=2, default=(1, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), options.device
    double, single = options.depth
    params = FluxParams(64, 64, 768, 512, 1024, 4.0, HEADS, double, single, (16, 56, 56), 10000, True, False)
    torch.manual_seed(0)
    flux = Flux(params).to(device, dtype).eval().requires_grad_(False)
    n = GRID[0] * GRID[1]
    img, txt, y = (torch.randn(1, *shape, device=device, dtype=dtype) for shape in ((n, 64), (TEXT, 512), (768,)))
    t = torch.full((1,), 0.5, device=device)
    ids = torch.cat((text_ids(1, TEXT), image_ids(1, *GRID)), 1).to(device)
    sigmas = [1 - i / 1000 for i in range(1001)]
    context = Context(ids, Layout(TEXT, GRID), params.axes_dim, params.theta, double, single, HEADS, sigmas)
    PROGRAMS["one for every block"] = {
        f"b{k}": {"op": "scale", "factor": 1 + k / 10, "blocks": [k], "side": "keys", **FADE}
        for k in range(double + single)
    }
    selected = {name: program for name, program in PROGRAMS.items() if options.only is None or name in options.only}
    selected.setdefault("unchanged", {})
    compiled = {name: compile_programs([Program.from_config(program)], context) for name, program in selected.items()}
    clock = time.process_time if options.cpu_time else time.perf_counter

    def timed(function, *arguments, **keywords):
        wait = torch.cuda.synchronize if device != "cpu" else lambda: None
        wait()
        start = clock()
        result = function(*arguments, **keywords)
        wait()
        return clock() - start, result

    build, run = ({name: [] for name in compiled} for _ in range(2))
    for i in range(options.rounds + 1):
        for name, programs in compiled.items():
            seconds, (rotary, mask) = timed(programs.at, sigmas[i + 1])
            build[name].append(seconds)
            with torch.inference_mode():
                seconds, _ = timed(flux, img, None, txt, None, t, y, rotary=rotary, mask=mask)
            run[name].append(seconds)
    base = median(run["unchanged"][1:])
    print(
        f"forward of {n + TEXT} tokens, hidden 1024, {double} + {single} blocks, {options.dtype}: {1000 * base:.0f} ms"
    )
    print(f"{'program':<24}{'tables':>10}{'forward':>10}")
    for name in compiled:
        tables, forward = median(build[name][1:]) / base, median(run[name][1:]) / base - 1
        print(f"{name:<24}{tables:>9.2%}{forward:>+10.2%}")


if __name__ == "__main__":
    main()
