"""The texts of a run, and what all kinds of text encoders need."""

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cache as once
from importlib.metadata import version
from pathlib import Path

import torch

from fluxlab.checkpoints.memory import free_memory

ROOM = 0.9
"""Share of the device's free memory that text encoders may take. The rest is for states, 0.2 GB for FLUX.1."""


@dataclass(frozen=True)
class Texts:
    """The prompts of a run, negative ones too, and how they are read. They are encoded before the transformer is
    loaded. max_sequence_length: None means the model's own. words: that a capture compares, encoded too but not checked
    as prompts are."""

    prompts: tuple[str, ...]
    max_sequence_length: int | None = None
    truncate: bool = False
    unknown_words: str = "error"
    words: tuple[str, ...] = ()


def fits(size: int, room: int | None, device: torch.device) -> bool:
    """Return whether `size` bytes of weights may be on the device. room: None means what is free on a GPU."""
    if room is None and device.type != "cpu":
        free = free_memory(device)
        room = None if free is None else int(ROOM * free)
    return room is None or size <= room


def computed_by(device: torch.device) -> list[str]:
    """Return what the last bits of a text encoder's output depend on, apart from its files and its input."""
    precision, libraries = torch.get_float32_matmul_precision(), _libraries()
    if device.type == "cpu":
        return [*libraries, precision, f"{torch.get_num_threads()} threads", *_processor()]
    if device.type == "cuda":
        return [*libraries, precision, torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"]
    return [*libraries, precision, device.type, platform.platform()]


@once  # `version` parses files, and this is asked for every prompt
def _libraries() -> list[str]:
    return [f"{package} {version(package)}" for package in ("torch", "transformers")]


@once
def _processor() -> list[str]:
    """The processor and the instructions that PyTorch, oneDNN and MKL may use of it."""
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    described = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        described += [line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features")]
    except OSError:  # not Linux
        pass
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    return [digest, torch.backends.cpu.get_cpu_capability(), *(f"{key}={os.environ.get(key)}" for key in limits)]
