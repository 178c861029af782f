"""Measure peak memory and time of decoding one large image with FLUX.1's autoencoder at its real size (random weights).

    python -m benchmarks.decode                                    # 2048², fp32: some minutes on 2 CPU cores
    python -m benchmarks.decode --size 1024 --stripe none --dtype bfloat16

Prints the largest resident memory of the process (RSS), and writes `benchmarks/results/decode-<date>.json`. Exits with
1 if it is above `--limit-gb`.
"""

import argparse
import datetime
import json
import platform
import resource
import sys
import time
from pathlib import Path

import torch

from fluxlab.model import AUTOENCODERS, AutoEncoder


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, stripe: int | str | None, dtype: torch.dtype) -> dict[str, float]:
    """Return seconds, and the peak of this process in GB: all of it, and above what was resident before."""
    model = AutoEncoder(AUTOENCODERS["flux1"]).to(dtype).eval().requires_grad_(False)
    side = size // model.params.factor
    z = torch.randn(1, model.params.z_channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, start = peak_bytes(), time.perf_counter()
    with torch.inference_mode():
        image = model.decode(z, stripe)
    assert image.shape == (1, 3, size, size)
    assert image.isfinite().all()
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_gb": peak_bytes() / 1e9, "above_gb": (peak_bytes() - before) / 1e9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="pixels per side")
    parser.add_argument("--stripe", default="auto", help="rows computed at a time, auto or none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit-gb", type=float, default=16.0)
    parser.add_argument("--no-file", action="store_true", help="do not write the JSON file")
    options = parser.parse_args()
    stripe = int(options.stripe) if options.stripe.isdigit() else {"auto": "auto", "none": None}[options.stripe]
    found = measure(options.size, stripe, getattr(torch, options.dtype))
    print(
        f"{options.size}² {options.dtype} stripe={options.stripe}: {found['seconds']:.0f} s, "
        f"{found['above_gb']:.2f} GB above the weights, {found['peak_gb']:.2f} GB in all, "
        f"limit {options.limit_gb:g} GB"
    )
    if not options.no_file:
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        record = {"command": "python -m benchmarks.decode", **machine, **vars(options), **found}
        file = Path(__file__).parent / "results" / f"decode-{datetime.date.today():%Y-%m-%d}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"benchmarks/results/{file.name}")
    return int(found["peak_gb"] > options.limit_gb)


if __name__ == "__main__":
    sys.exit(main())
