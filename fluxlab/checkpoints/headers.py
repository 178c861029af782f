"""A network as the headers of its files describe it: sizes, parameters, dtypes."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxlab.checkpoints.casting import majority
from fluxlab.checkpoints.files import Entry
from fluxlab.checkpoints.networks import Params
from fluxlab.checkpoints.recognise import is_counter


@dataclass(frozen=True)
class Stored:
    """A network as the headers of its files describe it.

    parameters: how many the files hold of each dtype. dtype: what it is loaded as unless another is asked for.
    files: empty for a network that is still to be fetched. params: None for a text encoder.
    layer: parameters of a text encoder's largest layer.
    """

    files: tuple[Path, ...]
    tensors: int
    parameters: Counter
    dtype: torch.dtype
    params: Params | None = None
    layer: int = 0

    def size(self) -> int:
        """Return the bytes of its tensors in the files. An all-in-one file holds other networks too."""
        return sum(count * dtype.itemsize for dtype, count in self.parameters.items())

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Return the size in memory once loaded as `dtype`; None means the files' own."""
        return self.parameters.total() * (dtype or self.dtype).itemsize


def described(files: Iterable[Path], entries: Iterable[Entry], params: Params | None = None) -> Stored:
    """Return what the entries of some files say. params: None for a text encoder."""
    entries = list(entries)
    parameters: Counter = Counter()
    for entry in entries:
        if not is_counter(entry.name):
            parameters[entry.dtype] += math.prod(entry.shape)
    layers: Counter = Counter()
    for entry in entries if params is None else ():
        layers[re.sub(r"(\.\d+)\..*", r"\1", entry.name)] += math.prod(entry.shape)
    return Stored(tuple(files), len(entries), parameters, majority(entries), params, max(layers.values(), default=0))
