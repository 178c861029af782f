"""A transformer that is streamed: makes the plan of what is asked of it, and places its weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from fluxlab.checkpoints.memory import free_memory, total_memory
from fluxlab.memory.plan import SPARE, ModelSizes, Plan, Room, Workload, make_plan
from fluxlab.memory.request import Memory
from fluxlab.memory.residency import Residency

T = TypeVar("T")


@dataclass
class Streaming:
    """The placement of a loaded model. room: of the device, before anything of the model was on it."""

    residency: Residency
    sizes: ModelSizes
    memory: Memory
    room: Room

    def prepare(self, work: Workload) -> Plan:
        """Place the weights so that `work` fits, and return the plan. Raises `UserError` if it cannot fit."""
        self.residency.place(make_plan(self.sizes, work, self.memory, self.room, streams=True))
        return self.residency.plan

    def before_decoding(self) -> None:
        """Free what the decoder may need: the buffers of streamed blocks."""
        self.residency.release_ring()
        if self.residency.device.type == "cuda":
            torch.cuda.empty_cache()

    def together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks that sample with the transformer, so that a streamed block is loaded once for all of them."""
        return self.residency.together(tasks)


def room_of(device: torch.device) -> Room:
    """Return the room of a device now: its free memory, less what stays free on a GPU; on a CPU all."""
    if device.type == "cpu":  # pages of files can be dropped: they may take all of it
        return Room("cpu", total_memory(), resident_bytes())
    free = free_memory(device)
    return Room(device.type, None if free is None else max(0, free - SPARE))


def resident_bytes() -> int:
    """Return the bytes of this process in main memory, pages of files included. 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0
