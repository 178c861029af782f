"""Time one forward pass of the transformer against Diffusers: same weights, same process, alternating.

python benchmarks/forward.py [--family flux2] [--quick] [--device cuda] [--json FILE]

Prints the median times, the median ratio fluxlab / Diffusers (of neighbouring runs, so that other work on the machine
affects both), and the share of the machine's matmul rate, which is measured in the same process. On a CPU fluxlab's
weights are packed, as they are while a run samples. Both sides are compiled with fluxlab's options. It takes about 12
minutes on 2 quiet cores; `--quick`, without batch 16 at the large size, about 4.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxlab.checkpoints import save_transformer
from fluxlab.families import architecture_of, family_of
from fluxlab.model import Flux2Params, FluxParams
from fluxlab.model.compiling import compile_options
from fluxlab.model.packing import packed_weights

SMALL = FluxParams(64, 64, 768, 512, 192, 4.0, 3, 2, 4, (16, 24, 24), 10000, True, True)
LARGE = replace(SMALL, hidden_size=1024, num_heads=8, axes_dim=(16, 56, 56))
SMALL2 = Flux2Params(128, 128, 768, 192, 3.0, 3, 2, 4, (16, 16, 16, 16), 2000, True)
LARGE2 = replace(SMALL2, hidden_size=1024, num_heads=8, axes_dim=(32, 32, 32, 32))
FAMILIES = {"flux1": (SMALL, LARGE), "flux2": (SMALL2, LARGE2)}
SHAPES = {"small": (16, 16), "large": (128, 32)}  # text tokens, side of the image in tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AIMS = {"fp32": 0.9, "bf16": 0.75}
AGREE = {"fp32": 1e-4, "bf16": 0.1}  # largest difference over the output's spread


def pair_of_models(params: FluxParams | Flux2Params, dtype: torch.dtype, device: str) -> tuple[nn.Module, nn.Module]:
    """Return a random fluxlab model and a Diffusers model with the same weights."""
    import diffusers

    torch.manual_seed(0)
    architecture = architecture_of(params)
    flux, reference = architecture.build(params).eval(), getattr(diffusers, architecture.diffusers)
    with tempfile.TemporaryDirectory() as folder:
        save_transformer(flux, folder, layout="diffusers")
        theirs = reference.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False).eval()
    return flux.to(device, dtype), theirs.to(device)


def calls(
    flux: nn.Module, theirs: nn.Module, params: FluxParams, text: int, side: int, batch: int, dtype, device: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return both forward passes on the same inputs. Time and guidance are exact in bf16, which Diffusers rounds to."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(batch, *shape, generator=g).to(device, dtype)  # noqa: E731
    img, txt, family = draw(side * side, params.in_channels), draw(text, params.context_in_dim), family_of(params)
    pooled = [draw(width) for width in family.pooled(params)]
    txt_ids, img_ids = (part.to(device) for part in family.ids(text, [(side, side)]))
    t, guidance = torch.full((batch,), 0.5, device=device), torch.full((batch,), 4.0, device=device)

    def ours() -> Tensor:
        return flux(img, img_ids[None], txt, txt_ids[None], t, *pooled, guidance)

    def reference() -> Tensor:
        return theirs(img, txt, *pooled, t, img_ids, txt_ids, guidance, return_dict=False)[0]

    return ours, reference


def flops(params: FluxParams | Flux2Params, text: int, side: int, batch: int) -> float:
    """Return the floating-point operations of the matrix products over tokens: linear layers and attention."""
    tokens, image, width = text + side * side, side * side, params.hidden_size
    products = 3 if isinstance(params, Flux2Params) else 2  # of the MLP
    block = 4 + products * params.mlp_ratio  # q, k, v, output and MLP, in units of width²; equal in both kinds of block
    depth = params.depth + params.depth_single_blocks
    ends = image * (params.in_channels + params.out_channels) + text * params.context_in_dim
    return batch * (2 * tokens * block * depth * width**2 + 2 * ends * width + 4 * tokens**2 * width * depth)


def timed(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(a: Callable, b: Callable, device: str, seconds: float) -> tuple[float, float, float, int]:
    """Return the median seconds of a and b, the median of their ratios and the number of pairs."""
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 200):
        if len(times) % 2:
            later = timed(b, device)
            times.append((timed(a, device), later))
        else:
            times.append((timed(a, device), timed(b, device)))
    median = statistics.median
    return median(t for t, _ in times), median(t for _, t in times), median(x / y for x, y in times), len(times)


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of a large square product, the best of several."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def measure(
    family: str,
    batches: dict[str, Sequence[int]],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    seconds: float,
) -> list[dict]:
    """Measure every case. Print and return one row per case."""
    print(f"{'case':26} {'fluxlab':>11} {'Diffusers':>11} {'ratio':>6} {'aim':>5}  {'of matmul':>9} {'pairs':>5}")
    rows = []
    for size, dtype in product(batches, dtypes):
        params, (text, side) = FAMILIES[family][list(SHAPES).index(size)], SHAPES[size]
        flux, theirs = pair_of_models(params, DTYPES[dtype], device)
        rate = matmul_rate(DTYPES[dtype], device)
        for mode, batch in product(modes, batches[size]):
            torch.compiler.reset()  # a new batch would otherwise compile for any batch
            models = [flux, theirs]
            if mode == "compiled":
                options = compile_options("inductor", device)
                models = [torch.compile(m, fullgraph=True, options=options) for m in models]
            ours, reference = calls(*models, params, text, side, batch, DTYPES[dtype], device)
            with packed_weights(flux):
                for call in (ours, reference):
                    call()  # compiles
                a, b = ours().double(), reference().double()  # warms up
                time_a, time_b, ratio, pairs = take_turns(ours, reference, device, seconds)
            error = ((a - b).abs().max() / b.std()).item()
            if error > AGREE[dtype]:
                raise SystemExit(f"{size} {dtype} {mode} batch {batch}: outputs differ by {error:.1e} of their spread")
            share = flops(params, text, side, batch) / time_a / rate
            row = {"family": family, "size": size, "dtype": dtype, "mode": mode, "batch": batch, "device": device}
            row |= {"seconds": time_a, "diffusers_seconds": time_b, "ratio": ratio, "aim": AIMS[dtype]}
            row |= {"share_of_matmul": share, "matmul_flops": rate, "pairs": pairs, "error": error}
            rows.append(row)
            print(
                f"{size:5} {dtype} {mode:8} batch {batch:<3} {time_a * 1e3:8.1f} ms {time_b * 1e3:8.1f} ms {ratio:6.3f}"
                f" {AIMS[dtype]:5}  {share:9.0%} {pairs:5}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without batch 16 at the large size, and fewer runs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--family", default="flux1", choices=FAMILIES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--seconds", type=float, help="measuring time per case")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()

    batches = {size: (1,) if options.quick and size == "large" else (1, 16) for size in options.sizes}
    seconds = options.seconds or (2 if options.quick else 6)
    with torch.inference_mode():
        rows = measure(options.family, batches, options.modes, options.dtypes, options.device, seconds)
    for dtype in options.dtypes:
        rates = [row["matmul_flops"] for row in rows if row["dtype"] == dtype]
        missed = [row for row in rows if row["dtype"] == dtype and row["ratio"] > row["aim"]]
        names = ", ".join(f"{r['size']} {r['mode']} batch {r['batch']} by {r['ratio'] - r['aim']:.2f}" for r in missed)
        print(
            f"{dtype}: ratio <= {AIMS[dtype]} " + (f"missed: {names}" if missed else "met everywhere"),
            f"(matmul {max(rates) / 1e9:.0f} GFLOP/s)",
        )
    if options.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
