"""`Probe`: gives the model a tap for each block that a capture requests, and collects the results."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.model.attention import Attended, Tap
from fluxlab.model.rope import Rotary
from fluxlab.probes.arrays import Captured
from fluxlab.probes.requests import Capture
from fluxlab.probes.resolve import ResolvedRequest, check_budget, memory, resolve
from fluxlab.probes.sites import at_site
from fluxlab.select.layout import Context


class Probe:
    """Reads attention during one `generate(probe=…)`. Afterwards `arrays` has the results, until the next run.

    capture: a config, the name of a file in `configs/capture`, or a `Capture`. A probe does not change what the model
    computes: on the CPU, outputs are equal bit for bit. With `true_cfg`, it reads the forward pass of the prompt, not
    that of the negative prompt.
    """

    def __init__(self, capture: Capture | Mapping[str, Any] | str):
        self.capture = Capture.from_config(capture)
        self._context: Context | None = None
        self._requests: list[ResolvedRequest] = []
        self._values: list[dict[str, np.ndarray]] = []
        self._taps: list[Tap] = []
        self._step = 0
        self._missing_steps: set[int] = set()

    def begin(self, context: Context, samples: int) -> None:
        """Prepare for a run with `samples` samples in one batch. Requests that name words need `context.prompts`.

        Raises `UserError` for a word, step, block or head that the run does not have, and if results and working memory
        need more than `max_mb`.
        """
        self._context, self._values = None, []
        resolved = resolve(self.capture, context, samples)
        check_budget(memory(resolved, context), self.capture.max_mb)
        self._context, self._requests = context, resolved
        self._values = [request.empty() for request in resolved]
        self._taps = [self._tap(block) for block in range(context.blocks)]
        self._missing_steps = {step for request in resolved for step in request.steps}

    def taps(self, step: int) -> list[Tap | None] | None:
        """Return `taps` for one `Flux.forward`: one per block, None for a block whose attention is not requested.

        Returns None if attention is requested in no block. Raises `UserError` if the step was recorded before, because
        a second forward pass would add to the results of the first.
        """
        requested = [request for request in self._requests if step in request.steps]
        blocks = {block for request in requested if not request.measure.site for block in request.blocks}
        if requested and step not in self._missing_steps:
            raise UserError(f"probe: step {step} was recorded already; call begin() before another run")
        self._step = step
        self._missing_steps.discard(step)
        return [tap if block in blocks else None for block, tap in enumerate(self._taps)] if blocks else None

    def observers(self, tables: Sequence[tuple]) -> list[Callable[[str, Tensor], None] | None] | None:
        """Return a function that reads the sites of each block, None for a block without requested activations.

        Call it after `taps`, at the same step. tables: the rotary tables (queries, keys) of each block at this step.
        Returns None if activations are requested in no block.
        """
        requested = [request for request in self._requests if self._step in request.steps and request.measure.site]
        blocks = {block for request in requested for block in request.blocks}
        return (
            [self._observer(n, tables[n]) if n in blocks else None for n in range(len(self._taps))] if blocks else None
        )

    def _observer(self, block: int, tables: tuple) -> Callable[[str, Tensor], None]:
        def observe(name: str, x: Tensor) -> None:
            for request, values in zip(self._requests, self._values, strict=True):
                if request.measure.site == name and self._step in request.steps and block in request.blocks:
                    self._check_samples(request, len(x))
                    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                        _record(request, values, self._step, block, x, tables[name == "keys"])

        return observe

    def _check_samples(self, request: ResolvedRequest, samples: int) -> None:
        if samples != request.samples:
            raise UserError(f"probe: a batch of {samples}, but begin() was given {request.samples}")

    def _tap(self, block: int) -> Tap:
        def record(attended: Attended) -> None:
            with torch.no_grad(), torch.autocast(attended.q.device.type, enabled=False):
                for request, values in zip(self._requests, self._values, strict=True):
                    self._check_samples(request, len(attended.q))
                    if not request.measure.site and self._step in request.steps and block in request.blocks:
                        _record(request, values, self._step, block, attended)

        # A compiled model breaks its graph at a tap. Without one, the large import of torch._dynamo is not needed.
        return torch.compiler.disable(record) if "torch._dynamo" in sys.modules else record

    @property
    def arrays(self) -> dict[str, Captured]:
        """Results by the names of the requests, or `name.output` for a request with several outputs.

        Raises `UserError` before a run, and after a run that did not complete.
        """
        if self._context is None or self._missing_steps:
            raise UserError("probe.arrays: nothing captured yet, or the run did not complete; call generate(probe=…)")
        pairs = zip(self._requests, self._values, strict=True)
        return {
            request.output_name(output): request.label(output, values[output], self._context)
            for request, values in pairs
            for output in values
        }


def _record(
    request: ResolvedRequest,
    values: dict[str, np.ndarray],
    step: int,
    block: int,
    seen: Attended | Tensor,
    table: Rotary | None = None,
) -> None:
    """Add one kernel call, or the activations `(B, …)` of a site, to the results of a request."""
    average = request.request.average
    s = 0 if "steps" in average else request.steps.index(step)
    n = 0 if "blocks" in average else request.blocks.index(block)
    heads, measure = None, request.measure
    x = seen if measure.site else seen.q
    if measure.has_heads and len(request.heads) < x.shape[1]:
        heads = torch.tensor(request.heads, device=x.device)
    for b in range(request.samples):

        def add(output: str, index: tuple, value: Tensor, b: int = b) -> None:
            if "heads" in average:
                value = value.sum(0, keepdim=True)
            target = torch.from_numpy(values[output][b, s, n])
            where = tuple(i.to("cpu") if isinstance(i, Tensor) else i for i in (slice(None), *index))
            target[where] += (value * request.weight).to("cpu", torch.float32)

        measure.observe(at_site(measure, seen, b, heads, table) if measure.site else seen, b, heads, add)
