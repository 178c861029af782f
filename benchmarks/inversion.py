"""Measure how exactly inversion returns: image → noise → image on a random model.

Prints the PSNR of the latents for several numbers of velocity evaluations per step.

python benchmarks/inversion.py [--steps 50]
"""

import argparse
import math

import torch

from fluxlab.model import Flux, FluxParams
from fluxlab.sampling import euler, image_ids, invert, schedule, text_ids


def model(seed: int = 0) -> Flux:
    torch.manual_seed(seed)
    params = FluxParams(16, 16, 24, 32, 64, 4.0, 2, 2, 2, (4, 14, 14), 10000, True, False)
    return Flux(params).eval().requires_grad_(False)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the PSNR in dB, with the range of `a` as the peak."""
    return 20 * math.log10((a.max() - a.min()).item() / (a - b).square().mean().sqrt().item())


def round_trip(steps: int, iterations: int, seed: int = 0) -> float:
    flux, g = model(seed), torch.Generator().manual_seed(seed)
    txt, y, image = (torch.randn(shape, generator=g) for shape in ((1, 8, 32), (1, 24), (1, 64, 16)))

    def velocity(x, t):
        return flux(x, image_ids(1, 8, 8), txt, text_ids(1, 8), torch.full((1,), t), y)

    times = schedule(steps, 64)
    return psnr(image, euler(velocity, invert(velocity, image, times, iterations), times))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    with torch.inference_mode():
        for iterations in (1, 2, 3, 5):
            worst = min(round_trip(steps, iterations, seed) for seed in range(3))
            print(f"{steps} steps, {iterations} velocities per step: {worst:6.1f} dB (worst of 3 seeds)")
