"""Checks of a model's files and of loading them: each raises, or returns what it measured."""

import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from fluxlab import checkpoints
from fluxlab.check.results import Result
from fluxlab.checkpoints import CheckpointError
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.manifest import NAME, verify_manifest
from fluxlab.checkpoints.recognise import is_counter
from fluxlab.checkpoints.stored import Stored, on_meta, stored
from fluxlab.config import ModelRow
from fluxlab.errors import UserError
from fluxlab.experiment.costs import gb, number
from fluxlab.families import architecture_of
from fluxlab.files import sha256_of
from fluxlab.loading import load_row
from fluxlab.model import AutoEncoder
from fluxlab.model.protocols import Transformer
from fluxlab.pipeline import Pipeline

_KINDS = {"pipeline": "a Diffusers folder", "originals": "single files", "transformer": "a transformer"}


def files(row: ModelRow) -> Result:
    """Return what is where, and (what was found, its parts by name). A hub id is fetched first.

    Raises `CheckpointError` for what is missing or damaged.
    """
    found = checkpoints.find(row.path, row.variant)
    others = {part: getattr(row, part) for part in ("autoencoder", "text")}
    local = {part: str(resolve(path, (part,), row.variant)) for part, path in others.items() if path}
    parts = stored(replace(row, path=str(found.path), **local))
    sizes = [f"{name} {gb(part.size())} in {number(len(part.files), 'file')}" for name, part in parts.items()]
    return Result(f"{found.path}: {_KINDS.get(found.kind, found.kind)}; {', '.join(sizes)}", (found, parts))


def hashes(path: Path, used: Iterable[Path]) -> Result:
    """Compare files with the folder's manifest, or if they were fetched from a hub with the names in its cache.

    All bytes are read. Raises `CheckpointError` naming the files that differ.
    """
    if (path / NAME).is_file():
        verify_manifest(path)
        return Result(f"every file is what {NAME} says")
    named = [file for file in used if re.fullmatch(r"[0-9a-f]{64}", file.resolve().name)]
    wrong = [str(file) for file in named if sha256_of(file) != file.resolve().name]
    if wrong:
        raise CheckpointError(f"{', '.join(wrong)}: not what was published; delete and fetch again")
    if named:
        return Result(f"{number(len(named), 'weight file')} as published")
    return Result(f"nothing to compare with: no {NAME}, and not from a hub; a flipped bit would not be noticed")


def loading(row: ModelRow, dtype: torch.dtype | None, device: torch.device) -> Result:
    """Load the pipeline and measure time and memory. All weights are read and must be finite."""
    start = time.perf_counter()
    pipe: Pipeline = load_row(row, dtype, device, cache="none")
    # they are loaded for the first prompt otherwise
    pipe.text.load()
    seconds = time.perf_counter() - start
    return Result(f"{seconds:.1f} s on {pipe.device}, as {str(pipe.dtype)[6:]}; {memory(pipe.device)}", pipe)


def memory(device: torch.device) -> str:
    """Return the most memory that this process has used. In main memory the pages of mapped files count too."""
    used = []
    if device.type == "cuda":
        used.append(f"{gb(torch.cuda.max_memory_allocated(device))} on the GPU at most")
    if sys.platform != "win32":
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        used.append(f"{gb(most)} of main memory at most")
    return ", ".join(used) or "memory unknown"


def counts(network: Transformer | AutoEncoder, part: Stored) -> Result:
    """Compare the parameters of a loaded network with those that its sizes imply, and with those in the files."""
    expected = on_meta(network.params).state_dict()
    loaded = network.state_dict()
    numbers = [
        sum(tensor.numel() for name, tensor in state.items() if not is_counter(name)) for state in (loaded, expected)
    ]
    numbers.append(part.parameters.total())
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (loaded, expected)]
    if len(set(numbers)) > 1 or shapes[0] != shapes[1]:
        raise UserError(
            f"{numbers[0]:,} parameters in {len(loaded)} tensors, {numbers[1]:,} in {len(expected)} expected, "
            f"{numbers[2]:,} in the files\nThe files are of another model than their config says; fetch them again."
        )
    published = architecture_of(network.params).published
    same = [name for name, params in published.items() if params == network.params]
    size = f"the size of {', '.join(same)}" if same else "as its sizes imply, which are not published ones"
    dtypes = " + ".join(sorted(str(dtype)[6:] for dtype in part.parameters))
    return Result(f"{numbers[0]:,} parameters in {len(loaded)} tensors, {size}; stored as {dtypes}")
