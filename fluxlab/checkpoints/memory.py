"""Memory of a device, and whether a network fits; and room for tensors that no file holds in one piece."""

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxlab.checkpoints.errors import CheckpointError

ALIGN = 64  # of each tensor's first byte, as PyTorch's own allocator: BLAS may round otherwise elsewhere


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return None
    found = [_meminfo("MemAvailable"), _container_room()]
    return min((size for size in found if size is not None), default=None)


def total_memory() -> int | None:
    """Bytes of main memory; what is mapped from files can use it all, as it can be dropped and read again."""
    found = [_meminfo("MemTotal"), _number(Path("/sys/fs/cgroup/memory.max"))]
    return min((size for size in found if size is not None), default=None)


def default_device() -> str:
    """Return the device that is used unless another is asked for: CUDA, else mps, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: "str | torch.device") -> torch.device:
    """`device` as a `torch.device` that exists here. Raises `CheckpointError` otherwise."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise CheckpointError(f"device {device!r}: not a device; expected cpu, cuda, cuda:1, mps …") from None
    backend = getattr(torch, device.type, None)
    there = {"cpu": True, "meta": False}.get(device.type, bool(backend and backend.is_available()))
    if there and device.index is not None and device.type == "cuda":
        there = device.index < torch.cuda.device_count()
    if not there:
        raise CheckpointError(
            f"device {str(device)!r}: there is none here (or this PyTorch cannot use it); try device='cpu'"
        )
    return device


def check_fits(bytes_by_dtype: dict[torch.dtype, int], device: torch.device, what: str, mapped: int = 0) -> None:
    """Raise `CheckpointError` if weights of so many bytes do not fit `device`, before any is read.

    `mapped` of the bytes stay mapped from files, which main memory as a whole must hold; the rest must find free
    memory. `what` names the checkpoint.
    """
    need = sum(bytes_by_dtype.values())
    free, total = free_memory(device), total_memory() if device.type == "cpu" and mapped else None
    for size, room, kind in ((need - mapped, free, "free"), (need, total, "in all")):
        if room is not None and size > room:
            small = sum(n * 2 // max(dtype.itemsize, 2) for dtype, n in bytes_by_dtype.items())
            help_ = [f"dtype=torch.bfloat16 needs {_gb(small)}"] if small < need else []
            help_ += ["close other programs" if kind == "free" else "use a machine with more memory"]
            help_ += ["pass another device"] if device.type != "cpu" else []
            help_ += ["pass check_memory=False to read weights from disk as they are used"] if mapped else []
            raise CheckpointError(
                f"{what}: does not fit {device}: {_gb(size)} needed, {_gb(room)} {kind}, {_gb(size - room)} short\n"
                f"What would help: {'; or '.join(help_)}."
            )


class Scratch:
    """Memory on the pages of an unlinked file, so that weights put together here are dropped and re-read like mapped
    ones, and do not count as the process's own. Freed with the last tensor. The folder is `FLUXLAB_SCRATCH`, else
    `TMPDIR`, else `/var/tmp`, which lies on a disk where `/tmp` may be memory. A private mapping: writing to a tensor
    never reaches the file, nor a forked process.
    """

    def __init__(self, size: int):
        disk = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
        folder = os.environ.get("FLUXLAB_SCRATCH") or os.environ.get("TMPDIR") or disk
        self._help = f"{folder}: no room for {_gb(size)} of scratch, needed to join a Diffusers folder's tensors"
        try:
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, "disk full")
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (outlives this function)
        except OSError as error:
            raise self._full(error) from None
        self._at: list[tuple[int, torch.dtype, tuple[int, ...]]] = []

    def add(self, parts: list[Tensor], shape: tuple[int, ...]) -> int:
        """Append tensors, one under the other, as one of `shape`. The number returned finds it in `tensors()`."""
        try:
            self._file.write(b"\0" * (-self._file.tell() % ALIGN))
            self._at.append((self._file.tell(), parts[0].dtype, shape))
            for part in parts:
                self._file.write(as_bytes(part))
        except OSError as error:
            raise self._full(error) from None
        return len(self._at) - 1

    def tensors(self) -> list[Tensor]:
        try:
            self._file.flush()
            pages = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise self._full(error) from None
        self._file.close()
        return [
            torch.frombuffer(pages, dtype=dtype, count=torch.Size(shape).numel(), offset=at).view(shape)
            for at, dtype, shape in self._at
        ]

    def _full(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._help} ({error.strerror})\nSet FLUXLAB_SCRATCH to a folder with room, or save the model as one "
            "BFL file, which needs none."
        )


def as_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy for a contiguous one in main memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = "SC_PAGE_SIZE", "SC_PHYS_PAGES"
        return (
            os.sysconf(names[0]) * os.sysconf(names[1]) if set(names) <= set(getattr(os, "sysconf_names", ())) else None
        )
    found = [line.split() for line in lines if line.startswith(f"{key}:")]
    return int(found[0][1]) * 1024 if found else None


def _container_room() -> int | None:
    """What a container's memory limit leaves, counting pages of files as free."""
    root = Path("/sys/fs/cgroup")
    limit, used = _number(root / "memory.max"), _number(root / "memory.current")
    if limit is None or used is None:
        return None
    stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    return limit - used + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not Linux, no cgroup v2, or "max"
        return None
