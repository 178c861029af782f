"""`Probe`: gives the model a tap for each block that a capture requests, and collects the results."""

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxlab.errors import UserError, join
from fluxlab.model.attention import Attended, Tap
from fluxlab.model.rope import Rotary
from fluxlab.probes.arrays import Captured
from fluxlab.probes.requests import Capture
from fluxlab.probes.resolve import ResolvedRequest, check_budget, memory, resolve
from fluxlab.probes.sites import at_site
from fluxlab.probes.stream import Places
from fluxlab.select.layout import Context

MOST_WAITING = 64 << 20
"""Bytes of values that may wait in main memory until the GPU has copied them and they are added."""


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
        self._heads: list[Tensor | None] = []
        self._values: list[dict[str, np.ndarray]] = []
        self._incoming = _Incoming()
        self._taps: list[Tap] = []
        self._step = 0
        self._rows: Sequence[int | None] | None = None
        self._missing_steps: set[int] = set()
        self._compared: set[str] = set()

    def begin(self, context: Context, samples: int) -> None:
        """Prepare for a run with `samples` samples in one batch. Requests that name words need `context.prompts`.

        Raises `UserError` for a word, step, block or head that the run does not have, and if results and working memory
        need more than `max_mb`.
        """
        self._context, self._values = None, []
        resolved = resolve(self.capture, context, samples)
        check_budget(memory(resolved, context), self.capture.max_mb)
        self._context, self._requests = context, resolved
        self._heads = [request.heads_on(context) for request in resolved]
        self._values, self._incoming = [request.empty() for request in resolved], _Incoming()
        self._taps = [self._tap(block) for block in range(context.blocks)]
        self._missing_steps, self._compared = {step for request in resolved for step in request.steps}, set()

    @property
    def reads_attention(self) -> list[str]:
        """The requests that read attention, or queries and keys as it reads them, after `begin`."""
        return [
            r.request.name for r in self._requests if r.measure.concepts or r.measure.site in ("", "queries", "keys")
        ]

    @property
    def concepts(self) -> dict[tuple[str, ...], str]:
        """The words that requests compare, after `begin`, each with the path in the config."""
        return {r.measure.concepts: join(r.request.path, "words") for r in self._requests if r.measure.concepts}

    def depth(self, words: tuple[str, ...], step: int) -> int:
        """Return the number of blocks through which the words must go at a step: 0 if nothing is requested there."""
        requests = [r for r in self._requests if r.measure.concepts == words and step in r.steps]
        return max((1 + block for request in requests for block in request.blocks), default=0)

    def taps(self, step: int) -> list[Tap | None] | None:
        """Return `taps` for one `Flux.forward`: one per block, None for a block whose attention is not requested.

        Returns None if attention is requested in no block. Raises `UserError` if the step was recorded before, because
        a second forward pass would add to the results of the first.
        """
        requested = [request for request in self._requests if step in request.steps]
        blocks = {block for request in requested if not request.measure.site for block in request.blocks}
        if requested and step not in self._missing_steps:
            raise UserError(f"probe: step {step} was recorded already; call begin() before another run")
        self._step, self._rows = step, None
        self._missing_steps.discard(step)
        return [tap if block in blocks else None for block, tap in enumerate(self._taps)] if blocks else None

    def serve(self, rows: Sequence[int | None]) -> None:
        """Note, before a forward of the step, which row of it each sample is; None for a sample of another forward.

        Without a call each sample is its own row. Equal samples may share a row, and a step may have several forwards.
        """
        self._rows = None if list(rows) == list(range(len(rows))) else rows

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
            for request, heads, values in zip(self._requests, self._heads, self._values, strict=True):
                if request.measure.site == name and self._step in request.steps and block in request.blocks:
                    self._check_samples(request, len(x))
                    self._compared.add(name)
                    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                        table = tables[name == "keys"]
                        _record(request, heads, values, self._incoming, self._step, block, x, self._rows, table)

        return observe

    def _check_samples(self, request: ResolvedRequest, samples: int) -> None:
        samples = samples if self._rows is None else len(self._rows)
        if samples != request.samples:
            raise UserError(f"probe: a batch of {samples}, but begin() was given {request.samples}")

    def _tap(self, block: int) -> Tap:
        def record(attended: Attended) -> None:
            with torch.no_grad(), torch.autocast(attended.q.device.type, enabled=False):
                for request, heads, values in zip(self._requests, self._heads, self._values, strict=True):
                    self._check_samples(request, len(attended.q))
                    if not request.measure.site and self._step in request.steps and block in request.blocks:
                        _record(request, heads, values, self._incoming, self._step, block, attended, self._rows)

        # A compiled model breaks its graph at a tap. Without one, the large import of torch._dynamo is not needed.
        return torch.compiler.disable(record) if "torch._dynamo" in sys.modules else record

    @property
    def arrays(self) -> dict[str, Captured]:
        """Results by the names of the requests, or `name.output` for a request with several outputs.

        Raises `UserError` before a run, after a run that did not complete, and for `concepts` outside of a pipeline.
        """
        if self._context is None or self._missing_steps:
            raise UserError("probe.arrays: nothing captured yet, or the run did not complete; call generate(probe=…)")
        for request in self._requests:
            if request.measure.concepts and request.measure.site not in self._compared:
                raise UserError(f"{request.request.path}: concepts need the text encoders; use generate(probe=…)")
        self._incoming.finish()
        pairs = zip(self._requests, self._values, strict=True)
        return {
            request.output_name(output): request.label(output, values[output], self._context)
            for request, values in pairs
            for output in values
        }


def _record(
    request: ResolvedRequest,
    heads: Tensor | None,
    values: dict[str, np.ndarray],
    incoming: "_Incoming",
    step: int,
    block: int,
    seen: Attended | Tensor,
    rows: Sequence[int | None] | None,
    table: Rotary | None = None,
) -> None:
    """Add one kernel call, or the activations `(B, …)` of a site, to the results of a request.

    rows: of the samples, as in `Probe.serve`.
    """
    average, measure = request.request.average, request.measure
    s = 0 if "steps" in average else request.steps.index(step)
    n = 0 if "blocks" in average else request.blocks.index(block)
    compares = request.request.kind == "similarity"  # with another sample, so that it needs all of them
    if compares and rows is not None:
        if None in rows:
            raise UserError(f"{request.request.path}: similarity compares samples of one forward, leave at_once out")
        seen = _map_rows(seen, lambda x: x[torch.tensor(rows).to(x.device)], rows)
    for b in range(request.samples):
        row = b if rows is None else rows[b]
        if row is None:
            continue

        def add(output: str, index: tuple, value: Tensor, b: int = b) -> None:
            if "heads" in average:
                value = value.sum(0, keepdim=True)
            target = torch.from_numpy(values[output][b, s, n])
            where = tuple(_on_host(i) for i in (slice(None), *index))
            incoming.add(target, where, (value * request.weight).to(torch.float32))

        if measure.site:
            measure.observe(at_site(measure, seen, row, heads, table), b, heads, add)
        else:
            measure.observe(seen if compares or row == b else _as_sample(seen, row, b), b, heads, add)


def _as_sample(attended: Attended, row: int, b: int) -> Attended:
    """Return a row of a kernel call as its sample b. Views only: all samples up to b are the same row."""
    return _map_rows(attended, lambda x: x[row : row + 1].expand(b + 1, *x.shape[1:]), [row] * (b + 1))


def _map_rows(attended: Attended, change: Callable[[Tensor], Tensor], rows: Sequence[int]) -> Attended:
    """Return a kernel call with other samples: `change` of each tensor, which are its `rows`.

    A mask that serves all samples stays.
    """
    mask, factors = attended.mask, attended.factors
    if mask is not None and mask.ndim == 4 and len(mask) > 1:
        mask = change(mask)
    q, k, lse = (change(x) for x in attended[:3])
    return Attended(q, k, lse, mask, attended.queries, factors and tuple(factors[row] for row in rows))


def _on_host(index: Any) -> Any:
    if isinstance(index, Places):
        return index.on_host
    return index.to("cpu") if isinstance(index, Tensor) else index


class _Incoming:
    """Adds values to arrays in main memory, in order. Values on a GPU are added while it computes the next blocks."""

    def __init__(self):
        self._waiting: deque[tuple[torch.cuda.Event, Tensor, tuple, Tensor]] = deque()
        self._bytes = 0

    def add(self, target: Tensor, where: tuple, value: Tensor) -> None:
        if value.device.type != "cuda":
            target[where] += value.to("cpu")
            return
        copied = value.to("cpu", non_blocking=True)  # into pinned memory
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((event, target, where, copied))
        self._bytes += copied.nbytes
        self.finish(MOST_WAITING)

    @torch.inference_mode()  # the targets were made in this mode, and `arrays` is read outside of it
    def finish(self, most: int = 0) -> None:
        """Add the oldest values until at most `most` bytes wait."""
        while self._waiting and self._bytes > most:
            event, target, where, copied = self._waiting.popleft()
            event.synchronize()
            target[where] += copied
            self._bytes -= copied.nbytes
