"""Where weights are kept: on the device, or streamed from their files. It never changes a bit of an image."""

from fluxlab.memory.plan import ModelSizes, Plan, Room, Workload, make_plan
from fluxlab.memory.request import Memory

__all__ = ["Memory", "ModelSizes", "Plan", "Room", "Workload", "make_plan"]
