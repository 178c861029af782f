"""Measure peak memory and time of decoding one large image with FLUX.1's autoencoder (random weights).

python benchmarks/decode.py [--size 2048] [--tile auto] [--dtype float32]
"""

import argparse
import resource
import time

import torch

from fluxlab.model import AUTOENCODERS, AutoEncoder


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, tile: int | str | None, dtype: torch.dtype) -> tuple[float, float]:
    """Return seconds, and the peak memory in GB above what was resident before."""
    model = AutoEncoder(AUTOENCODERS["flux1"]).to(dtype).eval().requires_grad_(False)
    side = size // model.params.factor
    z = torch.randn(1, model.params.z_channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, start = peak_bytes(), time.perf_counter()
    with torch.inference_mode():
        image = model.decode(z, tile)
    assert image.shape == (1, 3, size, size)
    assert image.isfinite().all()
    return time.perf_counter() - start, (peak_bytes() - before) / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=2048, help="pixels per side")
    parser.add_argument("--tile", default="auto", help="latent pixels per side, auto or none")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    tile = {"auto": "auto", "none": None}.get(options.tile) if not options.tile.isdigit() else int(options.tile)
    seconds, gigabytes = measure(options.size, tile, getattr(torch, options.dtype))
    print(f"{options.size}² {options.dtype} tile={options.tile}: {seconds:.0f} s, {gigabytes:.2f} GB above the weights")
