"""Weights packed for the matrix products of a CPU: in the order in which a product reads them.

A product packs its weight itself if nobody else did. In a forward of few tokens this takes up to a quarter of its time.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fluxlab.model.torch_ops import PACKED_BITS, pack_for_mkl, pack_for_onednn

PACK_BYTES = 1 << 30
"""Bytes of the largest model whose weights are kept packed, as a second copy."""

UNPACKED = (1024, 1 << 20)
"""From as many rows and elements of a weight on, oneDNN's bf16 products are as fast if it is not packed."""

_storages: Counter[int] = Counter()  # addresses of storages, and in how many contexts their weights are packed
_packed: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # by address, elements and rows
_lists: dict[tuple[int, ...], list[Tensor]] = {}  # what `all_packed` returned


def can_be_packed(model: nn.Module) -> bool:
    """Return whether all weights of a model are on a CPU, and have at most `PACK_BYTES`."""
    weights = list(model.parameters())
    return sum(weight.nbytes for weight in weights) <= PACK_BYTES and all(w.device.type == "cpu" for w in weights)


@contextmanager
def packed_weights(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Keep the weights of a model packed, if they can be.

    A weight is packed at its first product, and the copies are freed at the end. Weights must not be changed in place
    inside. Results have the same bits.
    """
    on = on and can_be_packed(model)
    storages = Counter({weight.untyped_storage().data_ptr() for weight in model.parameters()} if on else ())
    _storages.update(storages)
    try:
        yield
    finally:
        _storages.subtract(storages)
        for address in [address for address in storages if not _storages[address]]:
            del _storages[address]
        _lists.clear()
        for key in [key for key, (weight, _) in _packed.items() if not _is_kept(weight)]:
            del _packed[key]


def for_onednn(weight: Tensor, rows: int) -> Tensor:
    """Return a weight `(N, K)` packed for `onednn_linear`.

    Returns the weight itself if it is not kept, the bits would be others, or the product would not be faster.
    """
    large = rows >= UNPACKED[0] and weight.numel() >= UNPACKED[1] and weight.dtype == torch.bfloat16
    if not _storages or not PACKED_BITS[weight.dtype] or large:
        return weight
    key = (weight.data_ptr(), weight.numel(), 0)
    if key in _packed:
        return _packed[key][1]
    return _keep(key, weight, pack_for_onednn(weight)) if _is_kept(weight) else weight


def for_mkl(weight: Tensor, rows: int) -> Tensor:
    """Return a weight `(N, K)` packed for `mkl_linear` with so many rows."""
    key = (weight.data_ptr(), weight.numel(), rows)
    if key in _packed:
        return _packed[key][1]
    packed = pack_for_mkl(weight, rows)
    return _keep(key, weight, packed) if _is_kept(weight) else packed


def all_packed(weights: list[Tensor], rows: list[int], mkl: list[bool]) -> list[Tensor]:
    """Return each weight `(N, K)` packed for a product with so many rows, by MKL or by oneDNN."""
    key = (*(weight.data_ptr() for weight in weights), *(weight.numel() for weight in weights), *rows, *mkl)
    if key in _lists:
        return _lists[key]
    packed = [(for_mkl if by else for_onednn)(*of) for *of, by in zip(weights, rows, mkl, strict=True)]
    if all(map(_is_kept, weights)):
        _lists[key] = packed
    return packed


def _is_kept(weight: Tensor) -> bool:
    return weight.untyped_storage().data_ptr() in _storages


def _keep(key: tuple[int, int, int], weight: Tensor, packed: Tensor) -> Tensor:
    _packed[key] = (weight.detach(), packed)  # with the weight's storage, so that its address is not given to another
    return packed
