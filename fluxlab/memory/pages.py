"""Let go of the pages of weights that are mapped from a file, so that they do not count as memory of the process."""

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/maps")
_PAGE = mmap.PAGESIZE


class MappedPages:
    """The pages under tensors that are mapped from files. Other tensors, and other systems than Linux, have none.

    The tensors must not have been written to: what is let go is read from the file again.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self._ranges = _merged(_file_ranges(tensors))

    @property
    def size(self) -> int:
        """Bytes of these pages."""
        return sum(end - start for start, end in self._ranges)

    def let_go(self) -> None:
        """Drop the pages from the process. They stay in the page cache, and are mapped again when they are touched."""
        self._advise(mmap.MADV_DONTNEED)

    def read_ahead(self) -> None:
        """Ask the system to read the pages from disk, without waiting and without mapping them."""
        self._advise(mmap.MADV_WILLNEED)

    def _advise(self, advice: int) -> None:
        for start, end in self._ranges:
            _madvise(start, end - start, advice)


def let_go(tensors: Iterable[Tensor]) -> None:
    """Drop the pages under tensors that are mapped from files. Nothing happens to others."""
    MappedPages(tensors).let_go()


def _file_ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    spans = [
        (t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes() - t.storage_offset() * t.element_size())
        if not t.is_contiguous()
        else (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
        for t in tensors
        if t.device.type == "cpu" and t.numel()
    ]
    if not spans or not _MAPS.exists():
        return []
    maps = _file_maps()
    starts = [start for start, _ in maps]
    ranges = []
    for start, end in spans:
        i = bisect_right(starts, start) - 1
        if i >= 0 and end <= maps[i][1]:
            ranges.append((start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE))
    return ranges


def _file_maps() -> list[tuple[int, int]]:
    """Return the private mappings of files, sorted. Adjacent ones of one file count as one: parts may be writable."""
    maps: list[tuple[int, int]] = []
    last = None
    for line in _MAPS.read_text().splitlines():
        span, permissions, offset, device, inode = line.split(None, 5)[:5]
        if inode == "0" or "p" not in permissions:
            last = None
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        at = (device, inode, int(offset, 16))
        if last is not None and maps[-1][1] == start and last == (device, inode, at[2]):
            maps[-1] = (maps[-1][0], end)
        else:
            maps.append((start, end))
        last = (device, inode, at[2] + end - start)
    return maps


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _madvise(start: int, size: int, advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.madvise(start, size, advice) != 0:
        raise OSError(ctypes.get_errno(), "madvise")
