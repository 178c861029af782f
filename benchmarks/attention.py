"""Measure what attention maps cost: a run with them against the same run without, in fluxlab and in Diffusers.

python benchmarks/attention.py [--quick] [--device cuda] [--sizes 1152 4608] [--json FILE]

The maps are those of 128 text tokens, in every block and step, averaged over heads; the hidden size is 1024. fluxlab
uses a probe. Diffusers materialises the softmax, as tools that show its maps do. The maps of both are compared. Runs
alternate in one process, in reversed order every second round; ratios are medians over rounds. Peak memory is that of a
separate process (CPU) or of the allocator (CUDA). Targets: time ≤ 1.10 (limit 1.2), memory ≤ 1.1.

The default, 2 + 2 blocks and 2 steps, takes about 10 minutes on 2 quiet cores. `--quick` (1,152 tokens, 1 + 1 blocks)
takes about 1 minute. On a busy machine, set OMP_NUM_THREADS=1 and --cpu-time to count the work of this process only.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from forward import LARGE, calls, pair_of_models
from torch import Tensor, nn

from fluxlab.model import Flux, FluxParams
from fluxlab.positions import Context, Layout
from fluxlab.probes import Probe
from fluxlab.sampling import image_ids, text_ids

SIZES = {1152: (128, 32), 4608: (512, 64)}  # tokens: text, side of the image
COLUMNS = 128
WORDS = "word maps"
MAPS = {
    "kind": "map",
    "from": "image",
    "to": {"indices": list(range(COLUMNS)), "of": "text"},
    "average": ["heads"],
}
OTHERS = {
    "words": {"kind": "words", "words": ["w3", "w7", "w20"], "average": ["heads"]},
    "quadrants": {"kind": "quadrants"},
    "entropy": {"kind": "entropy", "average": ["heads"]},
    "distance": {"kind": "distance", "average": ["heads", "tokens"]},
    "logits": {"kind": "logits", "from": {"indices": [5]}, "to": {"box": [0, 0, 8, 8]}},
}


def context_of(params: FluxParams, text: int, side: int, steps: int, device: str) -> Context:
    from fluxlab.positions import Prompt

    ids = torch.cat((text_ids(1, text), image_ids(1, side, side)), 1).to(device)
    sizes = (params.axes_dim, params.theta, params.depth, params.depth_single_blocks, params.num_heads)
    words = [f"w{i}" for i in range(min(text, COLUMNS))]
    starts = [sum(len(word) + 1 for word in words[:i]) for i in range(len(words))]
    spans = tuple((start, start + len(word)) for start, word in zip(starts, words, strict=True))
    sigmas = [1 - i / steps for i in range(steps + 1)]
    return Context(ids, Layout(text, (side, side)), *sizes, sigmas, [Prompt(" ".join(words), spans)])


def our_runs(
    flux: nn.Module, arguments: tuple, context: Context, capture: dict | None
) -> tuple[Callable[[], object], Probe | None]:
    """Return a function that runs one forward pass per step, without text encoders and decoder, and its probe."""
    probe = capture and Probe({"max_mb": 1e5, **capture})

    def run() -> None:
        if probe:
            probe.begin(context, 1)
        for step in range(context.steps):
            flux(*arguments, taps=probe.taps(step) if probe else None)

    return run, probe


@contextmanager
def dense_maps(maps: list[Tensor], text: int):
    """Replace Diffusers' attention by an explicit softmax, `(B, N, H, d)` in and out, and append the maps to `maps`."""
    from diffusers.models.transformers import transformer_flux

    def attention(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        p = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        maps.append(p[:, :, text:, :COLUMNS].mean(1))
        return (p @ v).transpose(1, 2)

    fused = transformer_flux.dispatch_attention_fn
    transformer_flux.dispatch_attention_fn = attention
    try:
        yield
    finally:
        transformer_flux.dispatch_attention_fn = fused


def their_run(forward: Callable[[], Tensor], steps: int, text: int, with_maps: bool) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        maps: list[Tensor] = []
        for _ in range(steps):
            if with_maps:
                with dense_maps(maps, text):
                    forward()
            else:
                forward()
        return maps

    return run


def take_turns(runs: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of every run in every round. Rounds alternate in order, so that no run is always first."""
    now = time.process_time if options.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, done = time.perf_counter(), 0
    while done < options.rounds or time.perf_counter() - start < options.seconds:
        for name in list(runs)[:: -1 if done % 2 else 1]:
            before = now()
            runs[name]()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(now() - before)
        done += 1
        if done == 1:
            passed = time.perf_counter() - start
            left = max((options.rounds - 1) * passed, options.seconds - passed)
            print(f"{'':6} about {left / 60:.0f} min more of rounds", flush=True)
    return times


def time_of(tokens: int, options: argparse.Namespace, params: FluxParams) -> list[dict]:
    (text, side), device = SIZES[tokens], options.device
    dtype = getattr(torch, options.dtype)
    flux, theirs = pair_of_models(params, dtype, device)
    _, reference = calls(flux, theirs, params, text, side, 1, dtype, device)
    arguments = inputs(params, text, side, dtype, device)
    context = context_of(params, text, side, options.steps, device)
    captures = {WORDS: {"map": MAPS}, **({name: {name: OTHERS[name]} for name in options.others})}
    runs: dict[str, Callable[[], object]] = {"fluxlab": our_runs(flux, arguments, context, None)[0]}
    for name, capture in captures.items():
        runs[f"fluxlab, {name}"], probe = our_runs(flux, arguments, context, capture)
        runs[f"fluxlab, {name}"]()
        if name == WORDS:
            ours = probe.arrays["map"].values
    if not options.without_diffusers:
        for name, with_maps in (("Diffusers", False), (f"Diffusers, {WORDS}", True)):
            runs[name] = their_run(reference, options.steps, text, with_maps)
        check(ours, runs[f"Diffusers, {WORDS}"](), options, params, side)
    times = take_turns(runs, options)
    pairs = [(f"fluxlab, {name}", "fluxlab") for name in captures]
    if not options.without_diffusers:
        pairs += [(f"Diffusers, {WORDS}", "Diffusers"), (f"fluxlab, {WORDS}", f"Diffusers, {WORDS}")]
    return [compared(tokens, times, *pair) for pair in pairs]


def compared(tokens: int, times: dict[str, list[float]], this: str, that: str) -> dict:
    """Print and return the medians of two runs and of their ratio within a round."""
    ratio = statistics.median(a / b for a, b in zip(times[this], times[that], strict=True))
    this_s, that_s = (statistics.median(times[name]) for name in (this, that))
    print(
        f"{tokens:6} {this:20} {this_s:8.3f} s {that:20} {that_s:8.3f} s {ratio:6.3f} {len(times[this]):6}", flush=True
    )
    return {"of": this, "to": that, "seconds": [this_s, that_s], "ratio": ratio, "rounds": len(times[this])}


def check(ours, maps: list[Tensor], options: argparse.Namespace, params: FluxParams, side: int) -> None:
    """Exit with an error if the maps of the two differ."""
    blocks = params.depth + params.depth_single_blocks
    theirs = torch.stack(maps).float().cpu().reshape(options.steps, blocks, side, side, COLUMNS)
    error = (torch.from_numpy(ours)[0] - theirs).abs().max().item()
    bound = 1e-5 if options.dtype == "float32" else 1e-2
    if error > bound:
        raise SystemExit(f"the word maps of fluxlab and Diffusers differ by {error:.1e}")


def inputs(params: FluxParams, text: int, side: int, dtype: torch.dtype, device: str) -> tuple:
    """Return the inputs that `forward.calls` gives to both models."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(1, *shape, generator=g).to(device, dtype)  # noqa: E731
    img, txt, y = draw(side * side, params.in_channels), draw(text, params.context_in_dim), draw(params.vec_in_dim)
    t, guidance = torch.full((1,), 0.5, device=device), torch.full((1,), 4.0, device=device)
    return img, image_ids(1, side, side).to(device), txt, text_ids(1, text).to(device), t, y, guidance


def peak_of(tokens: int, of: str, with_maps: bool, options: argparse.Namespace, params: FluxParams) -> float:
    """Return the peak memory in MB of a separate process."""
    command = [sys.executable, __file__, "--peak", of, str(tokens), str(int(with_maps)), "--steps", str(options.steps)]
    command += ["--device", options.device, "--dtype", options.dtype, "--depth", *map(str, options.depth)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(of: str, tokens: int, with_maps: bool, options: argparse.Namespace, params: FluxParams) -> None:
    (text, side), device, dtype = SIZES[tokens], options.device, getattr(torch, options.dtype)
    if of == "fluxlab":
        model = Flux(params).eval().to(device, dtype)
        context = context_of(params, text, side, options.steps, device)
        run, _ = our_runs(
            model, inputs(params, text, side, dtype, device), context, {"map": MAPS} if with_maps else None
        )
    else:
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(
            in_channels=params.in_channels,
            num_layers=params.depth,
            num_single_layers=params.depth_single_blocks,
            attention_head_dim=params.hidden_size // params.num_heads,
            num_attention_heads=params.num_heads,
            joint_attention_dim=params.context_in_dim,
            pooled_projection_dim=params.vec_in_dim,
            guidance_embeds=params.guidance_embed,
            axes_dims_rope=params.axes_dim,
        )
        model = model.eval().to(device, dtype)
        _, reference = calls(None, model, params, text, side, 1, dtype, device)
        run = their_run(reference, options.steps, text, with_maps)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run()
    used = torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss()
    print(used / 1e6)


def peak_rss() -> int:
    """Return the peak resident memory in bytes. getrusage would include the memory of the parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), choices=SIZES, help="tokens")
    parser.add_argument("--depth", nargs=2, type=int, default=(2, 2), metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="minimum number at each size")
    parser.add_argument("--seconds", type=float, default=60, help="minimum duration at each size")
    parser.add_argument("--quick", action="store_true", help="1,152 tokens, two blocks, a few rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--others", nargs="*", default=[], choices=OTHERS, help="other requests to time")
    parser.add_argument("--without-diffusers", action="store_true")
    parser.add_argument("--without-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.depth, options.seconds = [1152], (1, 1), min(options.seconds, 10)
    double, single = options.depth
    params = replace(LARGE, depth=double, depth_single_blocks=single)
    rows = []
    with torch.inference_mode():
        if options.peak:
            print_peak(options.peak[0], int(options.peak[1]), options.peak[2] == "1", options, params)
            return
        print(f"hidden size {params.hidden_size}, {double} + {single} blocks, {options.steps} steps, {options.dtype}")
        print(f"{'tokens':>6} {'':20} {'':10} {'against':20} {'':10} {'ratio':>6} {'rounds':>6}", flush=True)
        for tokens in options.sizes:
            rows += [{"tokens": tokens, **row} for row in time_of(tokens, options, params)]
        for tokens in [] if options.without_memory else options.sizes:
            for of in ("fluxlab",) if options.without_diffusers else ("fluxlab", "Diffusers"):
                without, with_ = (peak_of(tokens, of, with_maps, options, params) for with_maps in (False, True))
                print(
                    f"{tokens:6} {f'{of}, {WORDS}':20} {with_:7.0f} MB {of:20} {without:7.0f} MB "
                    f"{with_ / without:6.3f}",
                    flush=True,
                )
                rows.append({"tokens": tokens, "of": of, "peak_mb": [without, with_], "peak_ratio": with_ / without})
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
