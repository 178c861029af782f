"""The dtype that a network is loaded in, and weights that are not finite."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import COMPUTE_DTYPES, FLOAT8, Entry


def dtype_for(
    entries: Iterable[Entry], dtype: torch.dtype | None, device: torch.device, where: Path | str
) -> torch.dtype:
    """Return the dtype to load a network in: `dtype` if it is given, else the one that the files decide.

    Raises `CheckpointError` for a dtype that networks are not computed in, or that the device does not have.
    """
    if dtype is not None and dtype not in COMPUTE_DTYPES.values():
        names = ", ".join(str(known) for known in COMPUTE_DTYPES.values())
        raise CheckpointError(f"dtype {dtype}: weights can be read as {names}")
    chosen = dtype or majority(entries)
    if chosen == torch.float64 and device.type == "mps":
        raise CheckpointError(f"{where}: float64 weights, which device mps does not have; pass dtype=torch.float32")
    return chosen


def majority(entries: Iterable[Entry]) -> torch.dtype:
    """Return the dtype of most parameters; float8 counts as bfloat16, and of equal counts the wider dtype wins.

    What a config.json says (`dtype`, `torch_dtype`) does not count: the files are what was trained.
    """
    counts: Counter[torch.dtype] = Counter()
    for entry in entries:
        if entry.dtype is not None:
            dtype = torch.bfloat16 if entry.dtype in FLOAT8.values() else entry.dtype
            counts[dtype] += torch.Size(entry.shape).numel()
    order = list(COMPUTE_DTYPES.values())  # wider first, and float16 before bfloat16, which has fewer digits
    return max(counts, key=lambda dtype: (counts[dtype], -order.index(dtype)), default=torch.float32)


def check_finite(weight: Tensor, sources: Iterable[tuple[str, Tensor]], where: Path | str) -> None:
    """Raise `CheckpointError` unless all of `weight` is finite. sources: names and tensors that it was loaded from.

    The message names the tensor and a value, and says whether the file holds it or a cast made it infinite.
    """
    if _finite(weight):
        return
    for name, source in sources:
        values = source.detach().cpu()
        values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32).flatten()
        odd = values[~values.isfinite()]
        if len(odd):
            raise CheckpointError(
                f"{where}: tensor {name} holds {len(odd):,} values that are not finite (the first is {odd[0]}); "
                "the file is damaged, or was saved after its training had diverged: get another copy"
            )
        largest = values[values.abs().argmax()]
        if not largest.to(weight.dtype).isfinite():
            raise CheckpointError(
                f"{where}: tensor {name} holds {largest:.6g}, which becomes infinite in {_short(weight.dtype)} "
                f"(at most {torch.finfo(weight.dtype).max:.6g}); load it with dtype=bfloat16 or float32"
            )


def _finite(weight: Tensor) -> bool:
    """Whether all is finite, in one pass and without a copy: `isfinite` would need a byte per value."""
    if weight.numel() == 0:
        return True
    low, high = torch.aminmax(weight.detach())
    return bool(low.isfinite() and high.isfinite())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
