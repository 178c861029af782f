"""Where the weights of a transformer lie in its files, block by block, and how their bytes are read."""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fluxlab.checkpoints.casting import check_finite
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.keys import Recipe
from fluxlab.checkpoints.networks import OpenNetwork
from fluxlab.checkpoints.read import OpenWeights
from fluxlab.memory.costs import aligned, is_modulation
from fluxlab.model.protocols import TransformerSizes

CHUNK = 32 << 20
"""Bytes of one read. Several threads read the chunks of a block."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file: `size` from `offset`, for a buffer's byte `at`."""

    path: Path
    offset: int
    size: int
    at: int


@dataclass(frozen=True)
class Weight:
    """A tensor in a buffer: its name inside the unit, shape, dtype as stored, and first byte."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    at: int

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """Weights that are read together: a block without its modulations, or modulations, those of one block together.

    prefix: of the weights' full names. size: bytes of the buffer that holds them.
    """

    prefix: str
    weights: tuple[Weight, ...]
    spans: tuple[Span, ...]
    size: int
    _cast: dict[torch.dtype, "Unit"] = field(default_factory=dict, repr=False, compare=False)

    @property
    def signature(self) -> tuple[Weight, ...]:
        """Units with equal signatures lie in a buffer in the same way."""
        return self.weights

    def as_dtype(self, dtype: torch.dtype) -> "Unit":
        """Return the same weights in another dtype, in a buffer of their own. They cannot be read from a file."""
        if dtype not in self._cast:
            weights, at = [], 0
            for weight in self.weights:
                weights.append(replace(weight, dtype=dtype, at=at))
                at += aligned(weights[-1].size)
            self._cast[dtype] = Unit(self.prefix, tuple(weights), (), at)
        return self._cast[dtype]

    def size_as(self, dtype: torch.dtype) -> int:
        """Return the bytes of a buffer for these weights in another dtype."""
        return self.as_dtype(dtype).size

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors in a buffer of bytes, by name."""
        return {w.name: buffer[w.at : w.at + w.size].view(w.dtype).view(w.shape) for w in self.weights}

    def check(self, buffer: Tensor, dtype: torch.dtype, where: Path) -> None:
        """Raise `CheckpointError` for a weight that is not finite, or would not be in `dtype`."""
        for name, weight in self.views(buffer).items():
            cast = weight if weight.dtype == dtype else weight.to(dtype)
            check_finite(cast, [(f"{self.prefix}{name}", weight)], where)


class WeightSource:
    """The units of a transformer in its open files.

    Blocks are numbered from 0, double blocks first. The units from `modulations` on have the modulations: those of each
    block, or each layer that blocks share, and those of the final layer.
    """

    def __init__(
        self,
        net: OpenNetwork,
        recipe: Recipe,
        shapes: Mapping[str, tuple[int, ...]],
        params: TransformerSizes,
    ):
        self.path, self.params = net.path, params
        self._files: dict[Path, int] = {}
        offsets: dict[str, tuple[Path, int]] = {}
        for path in net.files:
            offsets |= {name: (path, at) for name, at in tensor_offsets(path).items()}
        at = {name: offsets[entry.name] for name, entry in net.entries.items()}
        names = [f"double_blocks.{i}." for i in range(params.depth)]
        names += [f"single_blocks.{i}." for i in range(params.depth_single_blocks)]
        self.blocks = self.modulations = len(names)
        groups = {prefix: [name for name in shapes if name.startswith(prefix)] for prefix in names}
        self.units = [_unit(prefix, False, inside, net, recipe, shapes, at) for prefix, inside in groups.items()]
        layers = net.architecture.build.modulation_layers(params)
        of_layers = dict.fromkeys(
            next((p for p in names if layer.startswith(p)), f"{layer.rpartition('.')[0]}.") for layer in layers
        )
        for prefix in of_layers:
            inside = [name for name in shapes if name.startswith(prefix)]
            self.units.append(_unit(prefix, True, inside, net, recipe, shapes, at))

    @property
    def stored_blocks(self) -> tuple[int, ...]:
        """Bytes of each block without its modulations, as its files have it."""
        return tuple(unit.size for unit in self.units[: self.blocks])

    def read(self, unit: int, buffer: Tensor, run=None) -> None:
        """Fill a buffer on the host with the bytes of a unit. `run` maps a function over chunks, in threads."""
        memory = memoryview(buffer.numpy())
        chunks = [
            Span(s.path, s.offset + i, min(CHUNK, s.size - i), s.at + i)
            for s in self.units[unit].spans
            for i in range(0, s.size, CHUNK)
        ]

        def fill(chunk: Span) -> None:
            _read_exactly(self._file(chunk.path), memory[chunk.at : chunk.at + chunk.size], chunk.offset, chunk.path)

        for _ in (run or map)(fill, chunks):
            pass

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        self.close()


def is_mapped(opened: OpenWeights) -> bool:
    """Return whether a CPU computes blocks from the pages of their file: every tensor in one piece, and no cast."""
    in_one_piece = all(len(parts) == 1 and parts[0][1] is None for parts in opened.recipe.values())
    return in_one_piece and all(opened.target.keeps(entry) for entry in opened.net.entries.values())


def tensor_offsets(path: Path) -> dict[str, int]:
    """Return the first byte of each tensor in a safetensors file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {name: 8 + size + value["data_offsets"][0] for name, value in header.items() if name != "__metadata__"}


def _unit(
    prefix: str,
    modulation: bool,
    names: Sequence[str],
    net: OpenNetwork,
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    offsets: Mapping[str, tuple[Path, int]],
) -> Unit:
    weights, spans, at = [], [], 0
    for name in names:
        if is_modulation(name) != modulation:
            continue
        sources = [(net.entries[had], offsets[had], rows) for had, rows in recipe[name]]
        dtype = sources[0][0].dtype
        weights.append(Weight(name.removeprefix(prefix), shapes[name], dtype, at))
        position = at
        for entry, (path, first), rows in sources:
            if entry.dtype != dtype:
                raise CheckpointError(
                    f"{path}: {name} is stored in parts of {dtype} and {entry.dtype}, which cannot be streamed; use "
                    "memory=resident"
                )
            row = torch.Size(entry.shape[1:]).numel() * dtype.itemsize
            start, stop = rows or (0, entry.shape[0])
            spans.append(Span(path, first + start * row, (stop - start) * row, position))
            position += (stop - start) * row
        assert position == at + weights[-1].size
        at += aligned(weights[-1].size)
    return Unit(prefix, tuple(weights), tuple(spans), at)


def _read_exactly(file: int, memory: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], offset + done)
        if count == 0:
            raise OSError(f"{path}: ends before byte {offset + len(memory)}; it was changed while it is used")
        done += count
