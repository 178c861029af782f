"""Tokens that a probe picks, found anew at each step by a forward pass of the program without the edits of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxlab.positions import Context, Program
from fluxlab.positions.picked import (
    acting,
    check_readable,
    example,
    has_picks,
    measured,
    picks,
    with_tokens,
    without_picks,
)
from fluxlab.probes import Probe
from fluxlab.select.picked import key_of, picked
from fluxlab.select.where import resolve_blocks

Compile = Callable[[Sequence[Program] | None], Any]
"""Returns what a forward pass needs of the programs of a batch."""

Measure = Callable[[Tensor, float, Any, Sequence[int], Probe], None]
"""Computes a forward pass of some samples of the batch at time t, with what `Compile` returned, observed by a probe."""

MAX_MB = 1e6
"""The probes of this module keep one number per token. Their working memory is bounded in any case."""


class Steady:
    """Programs of which all tokens are known: the same at every step."""

    def __init__(self, programs: Sequence[Program] | None, make: Compile):
        self._compiled = make(programs)

    def at(self, x: Tensor, t: float, step: int, parts: Sequence[Sequence[int]], measure: Measure) -> Any:
        return self._compiled


class Picking:
    """The programs of a batch, some with tokens that a probe picks. Call `at` at each step."""

    def __init__(self, programs: Sequence[Program], samples: int, context: Context, make: Compile):
        self._programs = [programs[b % len(programs)] for b in range(samples)]
        self._context, self._make = context, make
        for program in programs:
            check_readable(program)
            _check_blocks(program, context)
        base = [without_picks(program) for program in self._programs]
        self._whole = any(edit.acts_on == "activations" for program in base for edit in program.edits)
        make([example(program, context.layout) for program in self._programs])  # raises what a step would raise
        self._base = make(base)
        self._last: tuple[Sequence[Program], Any] | None = None

    def at(self, x: Tensor, t: float, step: int, parts: Sequence[Sequence[int]], measure: Measure) -> Any:
        """Return what `make` returns for the programs at time t, with the tokens that `x` leads to.

        x: the latents of the batch. parts: the samples that are computed, in the groups of one forward each.
        """
        selections = [acting(program, self._context.sigmas, step, t) for program in self._programs]
        if not any(selections):
            return self._base
        computed = {b for part in parts for b in part}
        attention: dict[tuple[int, str], Tensor] = {}
        for part in parts:
            attention |= self._attention(x, t, step, {b: measured(selections[b]) for b in part}, measure)
        programs = []
        for b, (program, mine) in enumerate(zip(self._programs, selections, strict=True)):
            tokens = {
                key_of(one): picked(one, self._context.layout, step, attention.get((b, _read(one))))
                for one in (mine if b in computed else ())
            }
            programs.append(with_tokens(program, tokens))
        if self._last is None or self._last[0] != programs:
            self._last = programs, self._make(programs)
        return self._last[1]

    def _attention(
        self, x: Tensor, t: float, step: int, selections: Mapping[int, Sequence[Mapping]], measure: Measure
    ) -> dict[tuple[int, str], Tensor]:
        """Return the attention that the tokens of each sample's selections receive, fp64 `(n,)`."""
        asked = {b: [_read(one) for one in mine] for b, mine in selections.items()}
        if not any(asked.values()):
            return {}
        # injected activations come from other samples of the batch
        samples = [b for b in asked if asked[b] or self._whole]
        reads = dict.fromkeys(read for mine in asked.values() for read in mine)
        requests = {read: f"r{i}" for i, read in enumerate(reads)}
        probe = Probe(_capture(requests, step))
        probe.begin(self._context, len(samples))
        measure(x, t, self._base, samples, probe)
        arrays = probe.arrays
        values = {read: torch.from_numpy(arrays[name].values).double() for read, name in requests.items()}
        return {(b, read): values[read][i].flatten() for i, b in enumerate(samples) for read in asked[b]}


def _read(selection: Mapping[str, Any]) -> str:
    """Return a key of what is read of attention for a selection, whatever is picked of it."""
    return key_of({"of": selection["of"], "from": selection.get("from"), "blocks": selection.get("blocks")})


def _capture(requests: Mapping[str, str], step: int) -> dict[str, Any]:
    capture: dict[str, Any] = {"max_mb": MAX_MB}
    for read, name in requests.items():
        parts = json.loads(read)
        where = {"from": parts["from"], "tokens": parts["of"], "blocks": parts["blocks"], "steps": [step]}
        capture[name] = {"kind": "incoming", **where, "average": ["blocks", "heads"]}
    return capture


def _check_blocks(program: Program, context: Context) -> None:
    for edit in program.edits:
        for path, selection in picks(edit):
            if "blocks" in selection:
                resolve_blocks(selection["blocks"], context.double, context.single, f"{path}.blocks")


def edits_of(
    programs: Sequence[Program] | None, samples: int, context: Callable[[], Context], make: Compile
) -> "Steady | Picking":
    """Return the programs of a batch, `Picking` if a probe picks tokens for one of them."""
    if programs and any(map(has_picks, programs)):
        return Picking(programs, samples, context(), make)
    return Steady(programs, make)
