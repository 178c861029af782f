"""Streams and events of the pretended GPU, which find what a real one would compute wrongly: accesses without an order.

Each stream counts its operations, and knows how far it has waited for the others (vector clocks). An operation that
reads memory must come after the last write to it, and one that writes after the last write and all reads. Memory that
is new may have been another tensor's, so its allocation counts as a write. The host is one more party: it may write to
pinned memory only after it has waited for the copies that read it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

HOST = -1


class RaceError(AssertionError):
    """Memory is used in two streams without an order between them."""


@dataclass
class _Accesses:
    writer: tuple[int, int]
    readers: dict[int, int] = field(default_factory=dict)


class Stream:
    """A stream of the pretended device. 0 is the one that computes."""

    def __init__(self, streams: "Streams"):
        self.number = len(streams.every)
        self.clock: dict[int, int] = {self.number: 0}
        streams.every.append(self)

    def wait_stream(self, other: "Stream") -> None:
        _merge(self.clock, other.clock)


class Event:
    """A point in a stream."""

    def __init__(self, streams: "Streams"):
        self._streams, self._clock = streams, {}

    def record(self, stream: Stream | None = None) -> None:
        self._clock = dict((stream or self._streams.current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        _merge((stream or self._streams.current).clock, self._clock)

    def synchronize(self) -> None:
        _merge(self._streams.host, self._clock)


class Streams:
    """All streams of a device, and who used which memory last. Memory is named by any hashable key."""

    def __init__(self):
        self.every: list[Stream] = []
        self.current = Stream(self)
        self.host: dict[int, int] = {}
        self.copies = 0
        """Operations in other streams than the first."""
        self._memory: dict[int, _Accesses] = {}

    def classes(self) -> tuple[type[Stream], type[Event]]:
        """Return what stands for `torch.cuda.Stream` and `torch.cuda.Event`: classes, since annotations name them."""
        made = {"__init__": lambda own, *_, **__: super(type(own), own).__init__(self)}
        return type("Stream", (Stream,), made), type("Event", (Event,), made)

    def event(self) -> Event:
        return Event(self)

    @contextlib.contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def allocated(self, key: int) -> None:
        """Note memory that the current stream has taken, and may have used as another tensor before."""
        self._memory[key] = _Accesses(self._now())

    def freed(self, key: int) -> None:
        self._memory.pop(key, None)

    def operation(self, reads: Iterable[int], writes: Iterable[int]) -> None:
        """Check and note one operation of the current stream. Raises `RaceError`."""
        here = self.current
        here.clock[here.number] += 1
        self.copies += here.number > 0
        writes = set(writes)
        for key in {*reads, *writes} & self._memory.keys():
            memory = self._memory[key]
            _check(here.clock, *memory.writer, "written", here.number)
            if key in writes:
                for stream, time in memory.readers.items():
                    _check(here.clock, stream, time, "read", here.number)
                self._memory[key] = _Accesses(self._now())
            else:
                memory.readers[here.number] = here.clock[here.number]

    def pinned(self, key: int) -> None:
        """Note pinned memory of the host."""
        self._memory[key] = _Accesses((HOST, 0))

    def host_writes(self, key: int) -> None:
        """Check that the host has waited for all that reads its memory. Raises `RaceError`."""
        memory = self._memory[key]
        for stream, time in memory.readers.items():
            _check(self.host, stream, time, "read", HOST)
        self._memory[key] = _Accesses((HOST, 0))

    def _now(self) -> tuple[int, int]:
        return self.current.number, self.current.clock[self.current.number]


def _check(clock: dict[int, int], stream: int, time: int, what: str, here: int) -> None:
    if stream != HOST and stream != here and clock.get(stream, 0) < time:
        name = "the host" if here == HOST else f"stream {here}"
        raise RaceError(f"{name} uses memory that stream {stream} has {what}, and does not wait for it")


def _merge(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)
