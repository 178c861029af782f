"""The measurements of `benchmarks.gpu`. Each runs in a process of its own, and prints one row of JSON at a time.

python -m benchmarks.gpu_parts PART [--tiny] [--device cuda] [--seconds 5]

A part is a function that yields rows: `case`, `result` as text, and the same as plain numbers.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.forward import flops
from benchmarks.gpu_models import (
    DEV,
    TINY,
    Case,
    arguments,
    compile_blocks,
    diffusers_twin,
    random_flux,
    their_call,
)
from fluxlab.experiment.versions import commit
from fluxlab.model import AUTOENCODERS, AutoEncoder, AutoEncoderParams
from fluxlab.probes import Probe

Rows = Iterator[dict]

AGREE = 0.3
"""Root mean square difference of two outputs over their spread, from which they are not of one model.

57 blocks of random weights in bf16 amplify rounding. Unrelated outputs have √2.
"""

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "safetensors")
TINY_DECODER = AutoEncoderParams(32, 3, 32, 3, (1, 2), 1, 4, 0.36, 0.12)


def card(options: argparse.Namespace) -> Rows:
    """What the machine is, and the rate of its matrix products: of a large square, and of the model's largest."""
    case = case_of(options)
    yield {"case": "machine", "result": name_of(options.device), "machine": machine(options.device)}
    p = case.params
    tokens, width, out = case.text + case.side**2, p.hidden_size, int(p.hidden_size * p.mlp_ratio)
    square = 256 if options.tiny else 8192
    for name, (m, k, n) in {"square": (square,) * 3, "MLP, batch 1": (tokens, width, out)}.items():
        rate = matmul_rate(m, k, n, case.dtype, options.device, options.seconds / 4)
        yield {
            "case": f"{short(case.dtype)} matmul, {name}",
            "result": f"{m} × {k} × {n}: {rate / 1e12:.3g} TFLOP/s",
            "flops": rate,
        }


def forward(options: argparse.Namespace, compiled: bool = False) -> Rows:
    """One forward of our transformer and of Diffusers' on the same weights, in turns."""
    case, device = case_of(options), options.device
    flux = random_flux(case, device)
    theirs = diffusers_twin(flux)
    rate = matmul_rate(*(256 if options.tiny else 8192,) * 3, case.dtype, device, options.seconds / 4)
    mode = "compiled" if compiled else "eager"
    if compiled:
        compile_blocks(flux, theirs, "eager" if options.tiny else "inductor")
    for batch in (1,) if options.tiny and compiled else (1, 4):
        given = arguments(case, batch, device)
        calls = {"fluxlab": lambda given=given: flux(*given), "Diffusers": their_call(theirs, given)}
        outputs, first, peaks = first_calls(calls, device)
        error = difference(outputs["fluxlab"], outputs["Diffusers"])
        times = take_turns(calls, device, options.seconds)
        ours, reference = (statistics.median(times[name]) for name in calls)
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        share = flops(case.params, case.text, case.side, batch) / ours / rate
        row = {
            "case": f"{case.pixels}² px, batch {batch}, {mode}",
            "result": f"{seconds(ours)}, Diffusers {seconds(reference)}, ratio {ratio:.3f}, {share:.0%} of matmul, "
            f"peak {memory(peaks['fluxlab'])}, Diffusers {memory(peaks['Diffusers'])}",
            "seconds": ours,
            "diffusers_seconds": reference,
            "ratio": ratio,
            "share_of_matmul": share,
            "matmul_flops": rate,
            "first_call_seconds": first,
            "peak_bytes": peaks,
            "error": error,
            "pairs": len(times["fluxlab"]),
        }
        yield row
        if not error < AGREE:  # NaN too
            raise SystemExit(f"{row['case']}: outputs differ from Diffusers' by {error:.2g} of their spread")


def compiled(options: argparse.Namespace) -> Rows:
    """`forward` with compiled blocks."""
    yield from forward(options, compiled=True)


def maps(options: argparse.Namespace) -> Rows:
    """A forward with the word maps of all blocks, against one without."""
    case, device = case_of(options), options.device
    flux, given, blocks = random_flux(case, device), arguments(case, 1, device), case.context.blocks
    for capture, request in {"words": {"kind": "words"}, "words, mean of heads": {"average": ["heads"]}}.items():
        probe = Probe({"max_mb": 1e5, "words": {"kind": "words", **request}})

        def with_maps(probe: Probe = probe) -> Tensor:
            probe.begin(case.context, 1)
            return flux(*given, taps=probe.taps(0))

        calls = {"with": with_maps, "without": lambda: flux(*given)}
        outputs, _, peaks = first_calls(calls, device)
        times = take_turns(calls, device, options.seconds)
        with_, without = (statistics.median(times[name]) for name in calls)
        ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
        same = torch.equal(*outputs.values())
        yield {
            "case": f"{capture}, {blocks} blocks",
            "result": f"{seconds(with_)}, without {seconds(without)}, ratio {ratio:.3f}, peak {memory(peaks['with'])}, "
            f"without {memory(peaks['without'])}, output {'equal to the bit' if same else 'NOT equal'}",
            "seconds": with_,
            "seconds_without": without,
            "ratio": ratio,
            "peak_bytes": peaks,
            "equal": same,
        }


def limited(options: argparse.Namespace) -> Rows:
    """Forward with word maps, then decoding, in a process that may take no more than a card of `--limit` GiB has."""
    case, device = case_of(options), options.device
    context = limit(options.limit, device)
    flux, given = random_flux(case, device), arguments(case, 1, device)
    probe = Probe({"max_mb": 1e5, "words": {"kind": "words", "average": ["heads"]}})
    probe.begin(case.context, 1)
    reset_peak(device)
    x = flux(*given, taps=probe.taps(0))
    used = peak(device)
    left = None if used is None else options.limit * 2**30 - context - used
    yield {
        "case": f"{options.limit} GB, transformer resident",
        "result": f"{case.pixels}² px, batch 1, word maps: peak {memory(used)}, {memory(left)} to spare",
        "peak_bytes": used,
        "spare_bytes": left,
        "context_bytes": context,
        "limit_gib": options.limit,
    }
    del flux, given, probe, x
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    p = TINY_DECODER if options.tiny else AUTOENCODERS["flux1"]
    autoencoder = AutoEncoder(p).to(device, case.dtype).eval().requires_grad_(False)
    z = torch.randn(1, p.z_channels, 2 * case.side, 2 * case.side, device=device, dtype=case.dtype)
    reset_peak(device)
    took = timed(lambda: autoencoder.decode(z), device)
    again = timed(lambda: autoencoder.decode(z), device)
    yield {
        "case": f"{options.limit} GB, decoder",
        "result": f"{case.pixels}² px: {seconds(again)}, peak {memory(peak(device))}",
        "seconds": again,
        "first_call_seconds": took,
        "peak_bytes": peak(device),
    }


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    "card": card,
    "forward": forward,
    "maps": maps,
    "limited": limited,
    "compiled": compiled,
}


def case_of(options: argparse.Namespace) -> Case:
    return TINY if options.tiny else DEV


def machine(device: str) -> dict:
    """Return the card, the driver and the versions of what the numbers depend on."""
    found = {"card": name_of(device), "python": platform.python_version(), "commit": commit(), "cpu": processor()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    return found


def name_of(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def processor() -> str:
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def limit(gib: float, device: str) -> int:
    """Let this process allocate what a card of `gib` GiB has besides the CUDA context. Return the context's bytes."""
    if device != "cuda":
        return 0
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    if gib * 2**30 > total:
        raise SystemExit(f"this card has {total / 2**30:.1f} GiB")
    torch.cuda.set_per_process_memory_fraction((gib * 2**30 - context) / total)
    return context


def matmul_rate(m: int, k: int, n: int, dtype: torch.dtype, device: str, duration: float) -> float:
    """Return the FLOP/s of a product of random matrices, the median of several."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    times, end = [], time.perf_counter() + duration
    while len(times) < 4 or (time.perf_counter() < end and len(times) < 100):
        times.append(timed(lambda: a @ b, device))
    return 2 * m * k * n / statistics.median(times[1:])


def take_turns(calls: dict[str, Callable[[], object]], device: str, duration: float) -> dict[str, list[float]]:
    """Return the seconds of each call, in rounds of alternating order: at least 3 of them, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, end = 0, time.perf_counter() + duration
    while rounds < 4 or (time.perf_counter() < end and rounds < 200):
        for name in list(calls)[:: -1 if rounds % 2 else 1]:
            times[name].append(timed(calls[name], device))
        rounds += 1
    return {name: values[1:] for name, values in times.items()}


def first_calls(
    calls: dict[str, Callable[[], Tensor]], device: str
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, int | None]]:
    """Return the output, the seconds and the peak memory of each call's first run."""
    outputs, times, peaks = {}, {}, {}
    for name, call in calls.items():
        reset_peak(device)
        start = time.perf_counter()
        outputs[name] = call()
        synchronize(device)
        times[name], peaks[name] = time.perf_counter() - start, peak(device)
    return outputs, times, peaks


def timed(call: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def difference(a: Tensor, b: Tensor) -> float:
    """Return the root mean square difference over the spread of b."""
    return ((a.float() - b.float()).square().mean().sqrt() / b.float().std()).item()


def seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def memory(value: int | None) -> str:
    return "?" if value is None else f"{value / 1e9:.2f} GB"


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial on the CPU")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=5, help="measuring time of each case")
    parser.add_argument("--limit", type=int, default=24, help="GiB of the card that is imitated (part limited)")
    options = parser.parse_args()
    with torch.inference_mode():
        for row in PARTS[options.part](options):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
