"""The memory of a device, whether a network fits, and scratch space for tensors that no file holds in one piece."""

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
from fluxlab.config import ModelRow

ALIGN = 64  # of each tensor's first byte, as PyTorch's own allocator: BLAS may round otherwise elsewhere


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes on `device`; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return None
    sizes = [_meminfo("MemAvailable"), _container_room()]
    return min((size for size in sizes if size is not None), default=None)


def total_memory() -> int | None:
    """Return the bytes of main memory. Pages mapped from files can use all of it: they can be dropped and re-read."""
    sizes = [_meminfo("MemTotal"), _number(Path("/sys/fs/cgroup/memory.max"))]
    return min((size for size in sizes if size is not None), default=None)


def default_device() -> str:
    """Return the default device: CUDA if there is one, else mps, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def dtype_of(name: str | None, row: ModelRow) -> torch.dtype | None:
    """Return the torch dtype of a name, else that of the model's row; None for weights that stay as stored."""
    name = name or row.dtype
    return getattr(torch, name) if name else None


def check_device(device: "str | torch.device") -> torch.device:
    """Return `device` as a `torch.device`. Raises `CheckpointError` if this machine does not have it."""
    try:
        device = torch.device(device)
    except RuntimeError:
        raise CheckpointError(f"device {device!r}: not a device; expected cpu, cuda, cuda:1, mps, …") from None
    backend = getattr(torch, device.type, None)
    exists = {"cpu": True, "meta": False}.get(device.type, bool(backend and backend.is_available()))
    if exists and device.index is not None and device.type == "cuda":
        exists = device.index < torch.cuda.device_count()
    if not exists:
        raise CheckpointError(
            f"device {str(device)!r}: this machine has none, or this PyTorch cannot use it; try device='cpu'"
        )
    return device


def check_fits(bytes_by_dtype: dict[torch.dtype, int], device: torch.device, what: str, mapped: int = 0) -> None:
    """Raise `CheckpointError` if weights of these sizes do not fit `device`, before any are read.

    mapped: bytes that stay mapped from files. They must fit main memory as a whole, the others must fit free memory.
    what: names the checkpoint in the message.
    """
    need = sum(bytes_by_dtype.values())
    free, total = free_memory(device), total_memory() if device.type == "cpu" and mapped else None
    for size, room, kind in ((need - mapped, free, "free"), (need, total, "in all")):
        if room is not None and size > room:
            small = sum(n * 2 // max(dtype.itemsize, 2) for dtype, n in bytes_by_dtype.items())
            remedies = [f"dtype=torch.bfloat16 needs {_gb(small)}"] if small < need else []
            remedies += ["close other programs" if kind == "free" else "use a machine with more memory"]
            remedies += ["pass another device"] if device.type != "cpu" else []
            remedies += ["pass check_memory=False to read weights from disk as they are used"] if mapped else []
            raise CheckpointError(
                f"{what}: does not fit {device}: {_gb(size)} needed, {_gb(room)} {kind}, {_gb(size - room)} short\n"
                f"What would help: {'; or '.join(remedies)}."
            )


class Scratch:
    """Memory on the pages of an unlinked file.

    Weights that are joined in it can be dropped and re-read like mapped ones, and do not count as memory of the
    process. It is freed with the last tensor. The folder is `FLUXLAB_SCRATCH`, else `TMPDIR`, else `/var/tmp`, which is
    on a disk where `/tmp` may be memory. The mapping is private: writing to a tensor changes neither the file nor a
    forked process.
    """

    def __init__(self, size: int, purpose: str = "to join a Diffusers folder's tensors"):
        disk = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()
        folder = os.environ.get("FLUXLAB_SCRATCH") or os.environ.get("TMPDIR") or disk
        self._help = f"{folder}: no room for {_gb(size)} of scratch, needed {purpose}"
        try:
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, "disk full")
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (outlives this function)
        except OSError as error:
            raise self._full(error) from None
        self._at: list[tuple[int, torch.dtype, tuple[int, ...]]] = []

    def add(self, parts: list[Tensor], shape: tuple[int, ...]) -> int:
        """Append tensors, one below the other, as one of `shape`. Returns its index in `tensors()`."""
        try:
            self._file.write(b"\0" * (-self._file.tell() % ALIGN))
            self._at.append((self._file.tell(), parts[0].dtype, shape))
            for part in parts:
                self._file.write(as_bytes(part))
        except OSError as error:
            raise self._full(error) from None
        return len(self._at) - 1

    def tensors(self) -> list[Tensor]:
        """Return the tensors that were added. Nothing can be added afterwards."""
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
    """Return the bytes of a tensor, without a copy if it is contiguous and in main memory."""
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
    matches = [line.split() for line in lines if line.startswith(f"{key}:")]
    return int(matches[0][1]) * 1024 if matches else None


def _container_room() -> int | None:
    """The memory that a container's limit leaves. Pages of files count as free."""
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
