"""Weights packed for the matrix products of a CPU: in the order in which a product reads them.

A product packs its weight itself if nobody else did. In a forward of few tokens this takes up to a quarter of its time.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fluxlab.model.torch_ops import PACKED_BITS, pack_for_mkl, pack_for_onednn

PACK_BYTES = 1 << 30
"""Bytes of the largest model whose weights are kept packed, as a second copy."""

_storages: Counter[int] = Counter()  # addresses of storages, and in how many contexts their weights are packed
_packed: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # by address, elements and rows
_packing = False


@contextmanager
def packed_weights(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Keep the weights of a model on a CPU packed, if they have at most `PACK_BYTES`.

    A weight is packed at its first product, and the copies are freed at the end. Weights must not be changed in place
    inside. Results have the same bits.
    """
    global _packing
    weights = list(model.parameters())
    fits = sum(weight.nbytes for weight in weights) <= PACK_BYTES
    on = on and fits and all(weight.device.type == "cpu" for weight in weights)
    storages = Counter({weight.untyped_storage().data_ptr() for weight in weights} if on else ())
    _storages.update(storages)
    _packing = bool(_storages)
    try:
        yield
    finally:
        _storages.subtract(storages)
        for address in [address for address in storages if not _storages[address]]:
            del _storages[address]
        for key in [key for key, (weight, _) in _packed.items() if not _is_kept(weight)]:
            del _packed[key]
        _packing = bool(_storages)


def for_onednn(weight: Tensor) -> Tensor:
    """Return a weight `(N, K)` packed for `onednn_linear`, or itself if it is not kept or the bits would be others."""
    if not _packing or not PACKED_BITS[weight.dtype]:
        return weight
    key = (weight.data_ptr(), weight.numel(), 0)
    if key not in _packed:
        if not _is_kept(weight):
            return weight
        _packed[key] = (weight.detach(), pack_for_onednn(weight))  # with its storage, which keeps the address taken
    return _packed[key][1]


def for_mkl(weight: Tensor, rows: int) -> Tensor:
    """Return a weight `(N, K)` packed for `mkl_linear` with so many rows."""
    if not _packing:
        return pack_for_mkl(weight, rows)
    key = (weight.data_ptr(), weight.numel(), rows)
    if key not in _packed:
        if not _is_kept(weight):
            return pack_for_mkl(weight, rows)
        _packed[key] = (weight.detach(), pack_for_mkl(weight, rows))
    return _packed[key][1]


def _is_kept(weight: Tensor) -> bool:
    return weight.untyped_storage().data_ptr() in _storages
