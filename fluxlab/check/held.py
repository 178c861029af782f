"""What a model's files hold, and whether all of it loads: a function a check, which raises or says what it found."""

import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from fluxlab import checkpoints
from fluxlab.checkpoints import CheckpointError, Found
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.manifest import NAME, verify_manifest
from fluxlab.checkpoints.stored import Stored, on_meta, stored
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.experiment.costs import gb, number
from fluxlab.files import sha256_of
from fluxlab.loading import load_row
from fluxlab.model import AUTOENCODERS, TRANSFORMERS
from fluxlab.pipeline import Pipeline


def files(row: ModelRow) -> tuple[str, tuple[Found, dict[str, Stored]]]:
    """What is where; a hub id is fetched first. Raises for what is missing or damaged."""
    found = checkpoints.find(row.path, row.variant)
    beside = {part: getattr(row, part) for part in ("autoencoder", "text")}
    at = {part: str(resolve(path, (part,), row.variant)) for part, path in beside.items() if path}
    parts = stored(replace(row, path=str(found.path), **at))
    kinds = {"pipeline": "a Diffusers folder", "originals": "original files", "transformer": "a transformer alone"}
    held = [
        f"{name} {gb(sum(file.stat().st_size for file in part.files))} in {number(len(part.files), 'file')}"
        for name, part in parts.items()
    ]
    return f"{found.path}: {kinds.get(found.kind, found.kind)}; {', '.join(held)}", (found, parts)


def hashes(path: Path, used: Iterable[Path]) -> tuple[str, None]:
    """Against the folder's manifest, or for what was fetched from a hub against the names that its cache gives files.

    Raises `CheckpointError` naming the files that differ. All bytes are read.
    """
    if (path / NAME).is_file():
        verify_manifest(path)
        return f"every file is what {NAME} says", None
    named = [file for file in used if re.fullmatch(r"[0-9a-f]{64}", file.resolve().name)]
    wrong = [str(file) for file in named if sha256_of(file) != file.resolve().name]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}: not what was published; delete and fetch again")
    if named:
        return f"{number(len(named), 'weight file')} as published", None
    return f"nothing to compare with: no {NAME}, and not from a hub; a flipped bit would not be seen", None


def loading(row: ModelRow, dtype: torch.dtype | None, device: torch.device) -> tuple[str, Pipeline]:
    """The pipeline, and what it took of time and memory."""
    start = time.perf_counter()
    pipe = load_row(row, dtype, device)
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} s on {pipe.device}, as {str(pipe.dtype)[6:]}; {memory(pipe.device)}", pipe


def memory(device: torch.device) -> str:
    """The most this process has held, in words; in main memory the pages of mapped files count too."""
    told = []
    if device.type == "cuda":
        told.append(f"{gb(torch.cuda.max_memory_allocated(device))} on the GPU at most")
    if sys.platform != "win32":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        told.append(f"{gb(most)} of main memory at most")
    return ", ".join(told) or "memory unknown"


def counts(network: torch.nn.Module, part: Stored) -> tuple[str, None]:
    """Parameters and tensors, in the original layout, against what the sizes ask for and what the files hold."""
    expected = on_meta(network.params).state_dict()
    held = network.state_dict()
    numbers = [sum(tensor.numel() for tensor in some.values()) for some in (held, expected)]
    numbers.append(part.parameters.total())
    shapes = [{name: tuple(tensor.shape) for name, tensor in some.items()} for some in (held, expected)]
    if len(set(numbers)) > 1 or shapes[0] != shapes[1]:
        raise UserError(
            f"{numbers[0]:,} parameters in {len(held)} tensors, {numbers[1]:,} in {len(expected)} expected, "
            f"{numbers[2]:,} in the files\nThe files are of another model than their config says; fetch them again."
        )
    same = [name for name, params in {**TRANSFORMERS, **AUTOENCODERS}.items() if params == network.params]
    size = f"the size of {', '.join(same)}" if same else "as its sizes ask for, which are not FLUX.1's"
    dtypes = " + ".join(sorted(str(dtype)[6:] for dtype in part.parameters))
    return f"{numbers[0]:,} parameters in {len(held)} tensors, {size}; stored as {dtypes}", None
