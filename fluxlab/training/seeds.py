"""Random draws of a training run. Each is a pure function of (seed, purpose, step), so that a resumed run needs no
generator state.
"""

import hashlib

import numpy as np
import torch


def derived(seed: int, purpose: str, step: int) -> int:
    """Return a 63-bit seed for one purpose at one step."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {step}".encode()).digest()[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, step: int) -> np.random.Generator:
    """Return a generator for scenes, captions and sizes."""
    return np.random.default_rng(derived(seed, purpose, step))


def torch_rng(seed: int, purpose: str, step: int) -> torch.Generator:
    """Return a CPU generator for noise and times. Draws are moved to the device, so that CPU and CUDA see the same."""
    return torch.Generator("cpu").manual_seed(derived(seed, purpose, step))
