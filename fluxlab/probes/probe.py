"""The probe itself: what it was asked, settled against a run; taps for its blocks; the arrays that come of it."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.errors import UserError, join
from fluxlab.model.attention import Attended, Tap
from fluxlab.probes import measures, queries
from fluxlab.probes.arrays import Captured
from fluxlab.probes.outputs import Axes, Measure, Place
from fluxlab.probes.requests import KINDS, Capture, Request
from fluxlab.probes.stream import chunk_bytes
from fluxlab.select.layout import Context
from fluxlab.select.where import resolve_blocks, resolve_heads, resolve_steps

MEASURES = {
    "words": measures.words,
    "regions": measures.regions,
    "map": measures.every_pair,
    "quadrants": measures.quadrants,
    "entropy": queries.entropy,
    "distance": queries.distance,
    "peak": queries.peak,
    "similarity": queries.similarity,
    "logits": measures.logits,
}
assert set(MEASURES) == set(KINDS)


@dataclass(frozen=True, eq=False)
class Watch:
    """A request settled against a run: which steps, blocks and heads (numbers), and what is made of them."""

    request: Request
    measure: Measure
    steps: tuple[int, ...]
    blocks: tuple[int, ...]
    heads: tuple[int, ...]
    samples: int

    @property
    def kept(self) -> tuple[int, int, int, int]:
        """Sizes of the axes sample, step, block, head; an averaged one is 1."""
        sizes = {"steps": self.steps, "blocks": self.blocks, "heads": self.heads}
        return (self.samples, *(1 if key in self.request.average else len(of) for key, of in sizes.items()))

    @property
    def share(self) -> float:
        """What one (step, block, head) counts for in a mean."""
        sizes = {"steps": self.steps, "blocks": self.blocks, "heads": self.heads}
        return 1 / math.prod(len(of) for key, of in sizes.items() if key in self.request.average)

    @property
    def bytes(self) -> int:
        """Of the results, in fp32."""
        return sum(4 * math.prod((*self.kept, *axes.shape)) for axes in self.measure.outputs.values())

    def name(self, output: str) -> str:
        return f"{self.request.name}.{output}" if output else self.request.name


def settle(capture: Capture, context: Context, samples: int) -> list[Watch]:
    """A capture against a run. `UserError` naming the path of what the run does not have: a word, a step, a block."""
    if context.prompts is not None and len(context.prompts) != samples:
        context = replace(context, prompts=[*context.prompts] * samples)
    watches = []
    for request in capture.requests:
        place = Place(context, samples, request.path)
        arguments = {**request.arguments, "average": "tokens" in request.average}
        steps = resolve_steps(request.steps, context.sigmas, join(request.path, "steps"))
        blocks = resolve_blocks(request.blocks, context.double, context.single, join(request.path, "blocks"))
        heads = resolve_heads(request.heads, context.heads, join(request.path, "heads"))
        watches.append(
            Watch(
                request,
                MEASURES[request.kind](arguments, place),
                tuple(i for i, asked in enumerate(steps) if asked),
                tuple(sorted(blocks)),
                tuple(range(context.heads) if heads is None else sorted(heads)),
                samples,
            )
        )
    return watches


WORKING = "working memory"
"""No request has this name."""


def memory(watches: list[Watch], context: Context) -> dict[str, int]:
    """Bytes of each request's results, and under `WORKING` what is held while a block attends."""
    working = 0
    if watches:  # a stretch of p, and q and k of one sample, widened to fp32 or picked by heads
        turned = 2 * 4 * context.layout.tokens * sum(context.axes_dim) * context.heads
        working = chunk_bytes(context.ids.device) + turned + max(watch.measure.scratch for watch in watches)
    return {**{watch.request.name: watch.bytes for watch in watches}, WORKING: working}


class Probe:
    """Looks on at attention in one `generate(probe=…)`, and holds what it saw: `arrays`, until the next.

    capture: a config, the name of one in `configs/capture`, or a `Capture`. What a probe sees changes nothing: outputs
    are equal to the bit on the CPU. With `true_cfg` it sees the forward of the prompt, not of the negative one.
    """

    def __init__(self, capture: Capture | Mapping[str, Any] | str):
        self.capture = Capture.from_config(capture)
        self._context: Context | None = None
        self._watches: list[Watch] = []
        self._values: list[dict[str, np.ndarray]] = []
        self._taps: list[Tap] = []
        self._step = 0
        self._unseen: set[int] = set()

    def begin(self, context: Context, samples: int) -> None:
        """Get ready for a run of `samples` in one batch; `context` has their prompts where a request names words.

        Raises `UserError` for what this run does not have, and where results and working memory pass the budget.
        """
        self._context, self._values = None, []
        watches = settle(self.capture, context, samples)
        _check_budget(memory(watches, context), self.capture.max_mb)
        self._context, self._watches = context, watches
        self._values = [_empty(watch) for watch in watches]
        self._taps = [self._tap(block) for block in range(context.blocks)]
        self._unseen = {step for watch in watches for step in watch.steps}

    def taps(self, step: int) -> list[Tap | None] | None:
        """`taps=` of `Flux.forward` at one step, for one forward: one a block, None where nobody asked.

        Raises `UserError` for a step that was looked at already: a second forward would add to what the first gave.
        """
        asked = {block for watch in self._watches if step in watch.steps for block in watch.blocks}
        if asked and step not in self._unseen:
            raise UserError(f"probe: step {step} was looked at already; begin() starts afresh")
        self._step = step
        self._unseen.discard(step)
        return [tap if block in asked else None for block, tap in enumerate(self._taps)] if asked else None

    def _tap(self, block: int) -> Tap:
        def look(seen: Attended) -> None:
            with torch.no_grad(), torch.autocast(seen.q.device.type, enabled=False):
                for watch, values in zip(self._watches, self._values, strict=True):
                    if len(seen.q) != watch.samples:
                        raise UserError(f"probe: a batch of {len(seen.q)}, but begin() was told {watch.samples}")
                    if self._step in watch.steps and block in watch.blocks:
                        _observe(watch, values, self._step, block, seen)

        # A compiled model leaves its graph to be looked at; without one, nothing so large need be imported.
        return torch.compiler.disable(look) if "torch._dynamo" in sys.modules else look

    @property
    def arrays(self) -> dict[str, Captured]:
        """What was seen, by the names of the requests (`name.offset` where one gives several).

        Raises `UserError` before a run, and for one that broke off.
        """
        if self._context is None or self._unseen:
            raise UserError("probe.arrays: nothing was captured yet, or the run broke off; generate(probe=…) first")
        pairs = zip(self._watches, self._values, strict=True)
        return {
            watch.name(output): _labelled(watch, output, values[output], self._context)
            for watch, values in pairs
            for output in values
        }


def _check_budget(needed: Mapping[str, int], max_mb: float) -> None:
    total = sum(needed.values()) / 1e6
    if total > max_mb:
        largest = sorted(needed.items(), key=lambda item: -item[1])[:4]
        listed = ", ".join(f"{name} {size / 1e6:.3g}" for name, size in largest)
        raise UserError(
            f"capture.max_mb: {max_mb:g}, but {math.ceil(total)} MB are needed ({listed}).\n"
            "Raise it, average over heads, or ask for fewer blocks, steps or tokens."
        )


def _empty(watch: Watch) -> dict[str, np.ndarray]:
    """Zeros (pages that the system hands out as they are written); NaN where a sample has nothing."""
    values = {
        name: np.zeros((*watch.kept, *axes.flat), dtype=np.float32) for name, axes in watch.measure.outputs.items()
    }
    for sample, index in watch.measure.blank:
        for array in values.values():
            array[sample][(slice(None),) * 3 + index] = np.nan
    return values


def _observe(watch: Watch, values: dict[str, np.ndarray], step: int, block: int, seen: Attended) -> None:
    average = watch.request.average
    s = 0 if "steps" in average else watch.steps.index(step)
    n = 0 if "blocks" in average else watch.blocks.index(block)
    heads = None
    if len(watch.heads) < seen.q.shape[1]:
        heads = torch.tensor(watch.heads, device=seen.q.device)
    for b in range(watch.samples):

        def add(output: str, index: tuple, value: Tensor, b: int = b) -> None:
            if "heads" in average:
                value = value.sum(0, keepdim=True)
            target = torch.from_numpy(values[output][b, s, n])
            where = tuple(i.to("cpu") if isinstance(i, Tensor) else i for i in (slice(None), *index))
            target[where] += (value * watch.share).to("cpu", torch.float32)

        watch.measure.observe(seen, b, heads, add)


def _labelled(watch: Watch, output: str, values: np.ndarray, context: Context) -> Captured:
    axes: Axes = watch.measure.outputs[output]
    numbers = {"step": watch.steps, "block": watch.blocks, "head": watch.heads}
    own = [axis for axis in numbers if f"{axis}s" not in watch.request.average]
    coords: dict[str, Any] = {"sample": (("sample",), list(range(watch.samples)))}
    coords |= {axis: ((axis,), list(numbers[axis])) for axis in own}
    if "step" in own:
        coords["sigma"] = (("step",), [float(context.sigmas[step]) for step in watch.steps])
    if "block" in own:
        streams = ["double" if block < context.double else "single" for block in watch.blocks]
        coords["stream"] = (("block",), streams)
    averaged = [i for i, axis in enumerate(numbers, 1) if axis not in own]
    values = values.reshape(*watch.kept, *axes.shape).squeeze(tuple(averaged))
    about = {"request": watch.request.to_config(), "unit": watch.measure.unit}
    return Captured(values, ("sample", *own, *axes.names), {**coords, **axes.coords}, about)
