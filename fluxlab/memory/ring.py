"""Blocks that are read from files in threads and copied to the device while others are computed."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

READERS = 4
"""Threads that read a block's chunks."""

Mark = Any
"""A point in the work of a device. None: reached already."""


class Engine(Protocol):
    """How bytes get to a device. Tests replace it by one whose copies are late."""

    def host(self, size: int) -> Tensor:
        """Return a buffer of bytes on the host."""

    def device(self, size: int) -> Tensor:
        """Return a buffer of bytes on the device."""

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Start to copy to the device once `after` is reached. Returns the mark of its end."""

    def wait(self, mark: Mark) -> None:
        """Let the computation wait for a copy."""

    def computed(self) -> Mark:
        """Return the mark of all computation that was started so far."""

    def finish(self, mark: Mark) -> None:
        """Wait on the host until a copy is done."""


class DirectEngine:
    """Copies at once. For the CPU, mps, and whatever has no streams."""

    def __init__(self, device: torch.device):
        self._device = device

    @torch.inference_mode(False)  # threads outside of inference mode could not write to its tensors
    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    @torch.inference_mode(False)
    def device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        target.copy_(source)

    def wait(self, mark: Mark) -> None:
        pass

    def computed(self) -> Mark:
        return None

    def finish(self, mark: Mark) -> None:
        pass


class CudaEngine:
    """Copies from pinned memory on a stream of its own."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @torch.inference_mode(False)
    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @torch.inference_mode(False)
    def device(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        buffer.record_stream(self._stream)  # its memory is not given to others while a copy may still run
        return buffer

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        after = after or self.computed()  # kernels of its last owner may still read the memory of a new buffer
        with torch.cuda.stream(self._stream):
            after.wait(self._stream)
            target.copy_(source, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self._stream)
        return mark

    def wait(self, mark: Mark) -> None:
        mark.wait(torch.cuda.current_stream(self._device))

    def computed(self) -> Mark:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def finish(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()


def engine_for(device: torch.device) -> Engine:
    """Return the engine of a device."""
    return CudaEngine(device) if device.type == "cuda" else DirectEngine(device)


class Reader:
    """Reads units in a given order into a few buffers on the host, ahead of their use.

    read(unit, buffer, run) fills a buffer; `run` maps a function over its chunks in threads. An error of a read is
    raised by `get`.
    """

    def __init__(
        self,
        order: Iterable[int],
        read: Callable[[int, Tensor, Callable], None],
        engine: Engine,
        sizes: Sequence[int],
        depth: int,
    ):
        self._order, self._read, self._engine, self._sizes = iter(order), read, engine, sizes
        self._ahead = ThreadPoolExecutor(1, "read-ahead")  # one block after the other
        self._chunks = ThreadPoolExecutor(READERS, "read-chunk")
        self._reads: deque[tuple[int, Tensor, Future]] = deque()
        largest = max(sizes)
        for _ in range(depth):
            self._submit(engine.host(largest), None)

    def _submit(self, buffer: Tensor, mark: Mark) -> None:
        unit = next(self._order, None)
        if unit is None:
            return
        part = buffer[: self._sizes[unit]]

        def fill() -> None:
            self._engine.finish(mark)  # a copy may still read the buffer
            self._read(unit, part, self._chunks.map)

        self._reads.append((unit, buffer, self._ahead.submit(fill)))

    @property
    def next(self) -> int | None:
        """The unit that `get` returns next; None at the end."""
        return self._reads[0][0] if self._reads else None

    @property
    def ready(self) -> bool:
        """Whether `get` would not wait."""
        return bool(self._reads) and self._reads[0][2].done()

    def get(self) -> tuple[int, Tensor]:
        """Return the next unit and its bytes. Pass the buffer to `give_back` afterwards."""
        unit, buffer, read = self._reads.popleft()
        read.result()
        self._last = buffer
        return unit, buffer[: self._sizes[unit]]

    def give_back(self, mark: Mark) -> None:
        """Let the buffer that `get` returned last be filled again once `mark` is reached."""
        self._submit(self._last, mark)

    def close(self) -> None:
        """Stop reading, and wait for reads that have started."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._chunks.shutdown(wait=True, cancel_futures=True)
        self._reads.clear()


class Ring:
    """Streamed blocks, taken in the same order again and again.

    A buffer on the device is copied to only when the computation that read it is done, and computed from only when its
    copy is done. Blocks may be taken from any place on: reading then starts again there.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        read: Callable[[int, Tensor, Callable], None],
        sizes: Sequence[int],
        engine: Engine,
        slots: int,
        depth: int,
    ):
        self._blocks, self._read, self._engine, self._depth = tuple(blocks), read, engine, depth
        self._sizes = [size if i in set(blocks) else 0 for i, size in enumerate(sizes)]
        largest = max(self._sizes)
        self._slots = [engine.device(largest) for _ in range(slots)]
        self._free: deque[tuple[int, Mark]] = deque((slot, None) for slot in range(slots))
        self._copied: deque[tuple[int, int, Mark]] = deque()  # block, slot, end of its copy
        self._taken: int | None = None
        self._reader: Reader | None = None

    def _start(self, block: int) -> None:
        if self._reader is not None:
            self._reader.close()
        while self._copied:
            _, slot, mark = self._copied.popleft()
            self._engine.wait(mark)
            self._free.append((slot, self._engine.computed()))
        self._reader = Reader(_cycle(self._blocks, block), self._read, self._engine, self._sizes, self._depth)

    def _copy_next(self) -> None:
        block, source = self._reader.get()
        slot, mark = self._free.popleft()
        done = self._engine.copy(self._slots[slot][: len(source)], source, mark)
        self._copied.append((block, slot, done))
        self._reader.give_back(done)

    def take(self, block: int) -> tuple[int, Tensor]:
        """Return the number of a buffer on the device, and a block's bytes in it.

        What is computed from now on may read them until `give_back`.
        """
        coming = self._copied[0][0] if self._copied else self._reader.next if self._reader else None
        if coming != block:
            self._start(block)
        if not self._copied:
            self._copy_next()
        _, self._taken, mark = self._copied.popleft()
        self._engine.wait(mark)
        self._copy_ahead()
        return self._taken, self._slots[self._taken][: self._sizes[block]]

    def give_back(self) -> None:
        """Let the buffer of the block that was taken last be used again, after what was computed so far."""
        self._free.append((self._taken, self._engine.computed()))
        self._taken = None
        self._copy_ahead()

    def _copy_ahead(self) -> None:
        while self._free and self._reader.ready:
            self._copy_next()

    def close(self) -> None:
        """Stop reading and free all buffers."""
        if self._reader is not None:
            self._reader.close()
        for _, _, mark in self._copied:
            self._engine.wait(mark)
        self._copied.clear()
        self._slots.clear()


def _cycle(blocks: Sequence[int], first: int) -> Iterator[int]:
    return itertools.islice(itertools.cycle(blocks), blocks.index(first), None)
