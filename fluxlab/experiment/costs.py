"""What a run costs, counted from sizes alone, and the words that tell it: FLOPs, their speed here, bytes, durations."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from fluxlab.checkpoints.stored import on_meta
from fluxlab.model import AutoEncoderParams, FluxParams
from fluxlab.model.layers import linear

EFFICIENCY = 0.5
"""Of the speed of one matrix product, what a run keeps. Measured on a CPU: 0.3 for 64 channels in bf16, 0.9 for 768."""


def forward_flops(p: FluxParams, text: int, image: int) -> float:
    """Of one forward of one sample: 2 · parameters · the tokens that meet them, and attention's two products."""
    d, tokens, blocks = p.hidden_size, text + image, p.depth + p.depth_single_blocks
    layers = tokens * blocks * (4 * d * d + 2 * d * int(d * p.mlp_ratio))  # the same in a single block and in a stream
    ends = image * d * (p.in_channels + p.out_channels) + text * d * p.context_in_dim
    once = d * d * (12 * p.depth + 3 * p.depth_single_blocks + 2)  # modulations: once a sample
    return 2 * (layers + ends + once) + 4 * tokens**2 * d * blocks


def decode_flops(p: AutoEncoderParams, height: int, width: int) -> int:
    """Of decoding one picture of so many pixels, counted on a network without weights."""
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        latents = torch.empty(1, p.z_channels, height // p.factor, width // p.factor, device="meta")
        on_meta(p).decode(latents, tile=None)
    return counted.get_total_flops()


def matmul_speed(p: FluxParams, tokens: int, dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """FLOP/s of a product like the model's, from 0.1 s of trying."""
    most = 4096 if device.type == "cuda" else 1024
    rows, width, out = (min(n, most) for n in (tokens, p.hidden_size, int(p.hidden_size * p.mlp_ratio)))
    x, weight = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, out))
    took, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.inference_mode():
        while len(took) < 4 or (sum(took) < 0.1 and len(took) < 100):  # the first ones set things up
            began = time.perf_counter()
            linear(x, weight, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * rows * width * out / min(took)


def gb(size: float) -> str:
    """Bytes as a user reads them."""
    unit, name = next(((n, name) for n, name in ((1e9, "GB"), (1e6, "MB")) if size >= n / 10), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"


def flop(count: float) -> str:
    """Floating point operations as a user reads them."""
    return f"{count / 1e12:.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """With two digits, in the unit that suits."""
    length, unit = next(((n, unit) for n, unit in ((3600, "h"), (60, "min")) if seconds >= 1.5 * n), (1, "s"))
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def number(count: int, word: str) -> str:
    """1 file, 2 files."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
