"""A capture resolved against a run: steps, blocks and heads as numbers, shapes of the results, memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.errors import UserError, join
from fluxlab.probes.arrays import Captured
from fluxlab.probes.outputs import Axes, Measure, ProbeContext
from fluxlab.probes.registry import PROBES
from fluxlab.probes.requests import Capture, Request
from fluxlab.probes.stream import chunk_bytes
from fluxlab.select.layout import Context
from fluxlab.select.where import resolve_blocks, resolve_heads, resolve_steps

WORKING = "working memory"
"""The key of `memory` that is not the name of a request. It contains a space, which names cannot."""


@dataclass(frozen=True, eq=False)
class ResolvedRequest:
    """A request with its measure, and the steps, blocks and heads of this run as numbers."""

    request: Request
    measure: Measure
    steps: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    samples: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Lengths of the axes sample, step, block and head, in front of the measure's own. Averaged ones have 1."""
        lengths = {"steps": len(self.steps), "blocks": len(self.blocks), "heads": len(self.heads)}
        return (self.samples, *(1 if key in self.request.average else length for key, length in lengths.items()))

    @property
    def weight(self) -> float:
        """The weight of one (step, block, head) in the average."""
        lengths = {"steps": len(self.steps), "blocks": len(self.blocks), "heads": len(self.heads)}
        return 1 / math.prod(length for key, length in lengths.items() if key in self.request.average)

    @property
    def bytes(self) -> int:
        """Size of the results in fp32."""
        return sum(4 * math.prod((*self.shape, *axes.shape)) for axes in self.measure.outputs.values())

    def heads_on(self, context: Context) -> Tensor | None:
        """Return the heads as integers on the device of the model, None for all of them."""
        device = context.device or context.ids.device
        whole = len(self.heads) == context.heads or not self.measure.has_heads
        return None if whole else torch.tensor(self.heads).to(device)

    def output_name(self, output: str) -> str:
        return f"{self.request.name}.{output}" if output else self.request.name

    def empty(self) -> dict[str, np.ndarray]:
        """Return an array of zeros for each output. Entries that a sample does not have are NaN."""
        arrays = {
            name: np.zeros((*self.shape, *axes.flat), dtype=np.float32) for name, axes in self.measure.outputs.items()
        }
        for sample, index in self.measure.blank:
            for array in arrays.values():
                array[sample][(slice(None),) * 3 + index] = np.nan
        return arrays

    def label(self, output: str, values: np.ndarray, context: Context) -> Captured:
        """Return the results of an output with their axes and labels."""
        axes: Axes = self.measure.outputs[output]
        numbers = {"step": self.steps, "block": self.blocks, "head": self.heads}
        kept = [axis for axis in numbers if f"{axis}s" not in self.request.average]
        kept = [axis for axis in kept if axis != "head" or self.measure.has_heads]
        coords: dict[str, Any] = {"sample": (("sample",), list(range(self.samples)))}
        coords |= {axis: ((axis,), list(numbers[axis])) for axis in kept}
        if "step" in kept:
            coords["sigma"] = (("step",), [float(context.sigmas[step]) for step in self.steps])
        if "block" in kept:
            streams = ["double" if block < context.double else "single" for block in self.blocks]
            coords["stream"] = (("block",), streams)
        averaged = tuple(i for i, axis in enumerate(numbers, 1) if axis not in kept)
        values = values.reshape(*self.shape, *axes.shape).squeeze(averaged)
        about = {"request": self.request.to_config(), "unit": self.measure.unit}
        return Captured(values, ("sample", *kept, *axes.names), {**coords, **axes.coords}, about)


def resolve(capture: Capture, context: Context, samples: int) -> list[ResolvedRequest]:
    """Resolve a capture against a run with `samples` samples per batch.

    Raises `UserError` with the path of a word, step, block or head that the run does not have.
    """
    if context.prompts is not None and len(context.prompts) != samples:
        context = replace(context, prompts=[*context.prompts] * samples)
    resolved = []
    for request in capture.requests:
        steps = resolve_steps(request.steps, context.sigmas, join(request.path, "steps"))
        blocks = resolve_blocks(request.blocks, context.double, context.single, join(request.path, "blocks"))
        heads = resolve_heads(request.heads, context.heads, join(request.path, "heads"))
        probe_context = ProbeContext(context, samples, request.path, request.average, tuple(sorted(blocks)))
        measure = PROBES[request.kind].measure(probe_context, request.arguments)
        if not measure.has_heads and heads is not None:
            raise UserError(f"{join(request.path, 'heads')}: {request.heads}, but {measure.site} has no heads")
        resolved.append(
            ResolvedRequest(
                request,
                measure,
                tuple(i for i, selected in enumerate(steps) if selected),
                tuple(sorted(blocks)),
                tuple(range(context.heads) if heads is None else sorted(heads)) if measure.has_heads else (0,),
                samples,
            )
        )
    return resolved


def memory(resolved: Sequence[ResolvedRequest], context: Context) -> dict[str, int]:
    """Return bytes by request name for the results of a batch, and under `WORKING` for what one block allocates."""
    working = 0
    if resolved:  # a chunk of attention weights; q and k of one sample in fp32, or copied by head; the largest scratch
        turned = 2 * 4 * context.layout.tokens * sum(context.axes_dim) * context.heads
        scratch = max(one.measure.scratch for one in resolved)
        working = chunk_bytes(context.device or context.ids.device) + turned + scratch
    return {**{one.request.name: one.bytes for one in resolved}, WORKING: working}


def check_budget(needed: Mapping[str, int], max_mb: float) -> None:
    """Raise `UserError` if the bytes in `needed` sum to more than `max_mb`."""
    total = sum(needed.values()) / 1e6
    if total > max_mb:
        largest = sorted(needed.items(), key=lambda item: -item[1])[:4]
        listed = ", ".join(f"{name} {size / 1e6:.3g}" for name, size in largest)
        raise UserError(
            f"capture.max_mb: {max_mb:g}, but {math.ceil(total)} MB are needed ({listed}).\n"
            "Raise it, average over heads, or request fewer blocks, steps or tokens."
        )
