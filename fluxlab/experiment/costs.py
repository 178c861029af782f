"""The cost of a run from sizes alone: FLOPs, speed, bytes and durations, and how they are written."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from fluxlab.checkpoints.stored import on_meta
from fluxlab.families import Family
from fluxlab.memory.costs import gb, is_modulation, modulation_width, one_block
from fluxlab.model.linear import linear
from fluxlab.model.protocols import AutoEncoderSizes, TransformerSizes

__all__ = ["EFFICIENCY", "decode_flops", "duration", "flop", "forward_flops", "gb", "matmul_speed", "number"]

EFFICIENCY = 0.5
"""Speed of a run as a share of the speed of one matrix product. On a CPU: 0.3 for 64 channels in bf16, 0.9 for 768."""


def forward_flops(p: TransformerSizes, text: int, image: int) -> float:
    """Return the FLOPs of one forward of one sample with so many text and image tokens.

    2 · parameters · tokens for every layer, and attention's two matrix products.
    """
    d, tokens, blocks = p.hidden_size, text + image, p.depth + p.depth_single_blocks
    streams = 1 if p.depth_single_blocks else 2  # a token goes through as many weights in single and double blocks
    model = on_meta(one_block(p, streams == 2))
    (block,) = [*model.double_blocks, *model.single_blocks]
    matrices = [weight for name, weight in block.named_parameters() if weight.ndim == 2 and not is_modulation(name)]
    layers = tokens * blocks * sum(weight.numel() for weight in matrices) // streams
    ends = image * d * (p.in_channels + p.out_channels) + text * d * p.context_in_dim
    modulations = d * modulation_width(p)  # once per sample
    return 2 * (layers + ends + modulations) + 4 * tokens**2 * d * blocks


def decode_flops(family: Family, p: AutoEncoderSizes, height: int, width: int) -> int:
    """Return the FLOPs of decoding one image of height × width pixels, counted on a network without weights."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        rows, cols = (n // family.pixels_per_token(p) for n in (height, width))
        tokens = torch.empty(1, rows * cols, family.channels(p), device="meta")
        on_meta(p).decode(family.unpack(tokens, rows, cols), stripe=None)
    return counter.get_total_flops()


def matmul_speed(p: TransformerSizes, tokens: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Return the FLOP/s of a matrix product of the model's sizes, measured for 0.1 s."""
    limit = 4096 if device.type == "cuda" else 1024
    rows, width, out = (min(n, limit) for n in (tokens, p.hidden_size, int(p.hidden_size * p.mlp_ratio)))
    x, weight = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, out))
    times, threads_before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        while len(times) < 4 or (sum(times) < 0.1 and len(times) < 100):  # the first calls include set-up
            start = time.perf_counter()
            linear(x, weight, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    torch.set_num_threads(threads_before)
    return 2 * rows * width * out / min(times)


def flop(count: float) -> str:
    """Return a number of floating point operations as text: `74.4 TFLOP`."""
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """Return a duration with two digits as text: `12 s`, `3.5 min`, `2 h`."""
    length, unit = next(((n, unit) for n, unit in ((3600, "h"), (60, "min")) if seconds >= 1.5 * n), (1, "s"))
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def number(count: int, word: str) -> str:
    """Return a count with its noun: `1 file`, `2 files`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
