"""Modulations that are known in advance: shifts, scales and gates depend on time, guidance and pooled text only.

In FLUX.1 each block has its own. In FLUX.2 all blocks of a kind share them, and there is no pooled text.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.memory.costs import modulation_width
from fluxlab.memory.plan import KEPT
from fluxlab.model.layers import Modulations
from fluxlab.model.linear import linear, uses_onednn
from fluxlab.model.protocols import Transformer

Weights = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
"""Returns weight and bias of every modulation on the device, one by one, in the order of `modulation_layers`."""


Inputs = tuple[Tensor | None, ...]
"""Of the model's `conditioning`: timesteps `(B,)`, in FLUX.1 the pooled text `(B, V)`, and guidance `(B,)`."""


@dataclass(frozen=True)
class Conditions:
    """What the modulations of one batch depend on.

    forwards: a key for each forward that is known in advance. inputs: returns what one depends on. rows: samples of
    all these forwards.
    """

    forwards: tuple[Hashable, ...]
    inputs: Callable[[Hashable], Inputs]
    rows: int


@torch.no_grad()
def tables(flux: Transformer, vectors: Sequence[Tensor], weights: Weights) -> list[Tensor]:
    """Return all modulations `(B, W)` of each conditioning vector `(B, D)`.

    Each layer's weights are needed once. The result has the bits of a forward with that vector. Where a row of a
    product does not depend on the number of rows, there is one product a layer; elsewhere one a vector.
    """
    counts = [len(vector) for vector in vectors]
    column, rows = 0, [vector.new_empty(len(vector), modulation_width(flux.params)) for vector in vectors]
    if uses_onednn(vectors[0], vectors[0]):
        vectors, rows = [torch.cat(list(vectors))], [torch.cat(rows)]
    activated = [F.silu(vector) for vector in vectors]
    for weight, bias in weights():
        for x, row in zip(activated, rows, strict=True):
            row[:, column : column + len(weight)] = linear(x, weight, bias)
        column += len(weight)
    assert column == modulation_width(flux.params)
    return [part for row in rows for part in row.split(counts if len(rows) == 1 else [len(row)])]


class KnownModulations:
    """The tables of a run, made for several batches at a time, because each time reads 27 % of the weights.

    They are kept on the host. A batch's own are on the device while it is sampled.
    """

    def __init__(self, flux: Transformer, weights: Weights):
        self._flux, self._weights = flux, weights
        self._coming: dict[Hashable, Callable[[], Conditions]] = {}
        self._tables: dict[Hashable, dict[Hashable, Tensor]] = {}
        self.made = 0
        """How often the weights were read."""

    def announce(self, key: Hashable, conditions: Callable[[], Conditions]) -> None:
        """Note that a batch will be sampled with these conditions, so that its tables are made with those of others."""
        if key not in self._tables:
            self._coming[key] = conditions

    def of(self, key: Hashable, conditions: Callable[[], Conditions]) -> "Steps":
        """Return the modulations of a batch, by forward."""
        return Steps(self, key, conditions)

    def get(self, key: Hashable, conditions: Callable[[], Conditions], now: Hashable) -> Mapping[Hashable, Tensor]:
        """Return the tables of a batch on the host, among them the one of the forward `now`."""
        if now not in self._tables.get(key, {}):
            self._make(key, conditions, now)
        return self._tables[key]

    def _make(self, key: Hashable, conditions: Callable[[], Conditions], now: Hashable) -> None:
        first = conditions()
        if now in first.forwards:
            self._tables.clear()
            wanted = self._group(key, first)
        else:  # a time that is not in the schedule
            wanted = {key: replace(first, forwards=(now,))}
        pairs = [(each, forward) for each, made in wanted.items() for forward in made.forwards]
        vectors = [self._flux.conditioning(*wanted[each].inputs(forward)) for each, forward in pairs]
        self.made += 1
        for (each, forward), table in zip(pairs, tables(self._flux, vectors, self._weights), strict=True):
            self._tables.setdefault(each, {})[forward] = table.cpu()

    def _group(self, key: Hashable, first: Conditions) -> dict[Hashable, Conditions]:
        """Return the conditions of a batch, and of batches to come as long as all tables are within the limit."""
        group, size = {key: first}, self._bytes(first)
        self._coming.pop(key, None)
        for each in list(self._coming):
            made = self._coming[each]()
            size += self._bytes(made)
            if size > KEPT:
                break
            group[each] = made
            del self._coming[each]
        return group

    def _bytes(self, conditions: Conditions) -> int:
        return conditions.rows * modulation_width(self._flux.params) * self._flux.img_in.weight.element_size()


class Steps:
    """The modulations of one batch. `at(now)` returns those of a forward."""

    def __init__(self, known: KnownModulations, key: Hashable, conditions: Callable[[], Conditions]):
        self._known, self._key, self._conditions = known, key, conditions
        self._on_device: dict[Hashable, Tensor] = {}

    def at(self, now: Hashable) -> list[Modulations]:
        """Return the modulations of each block and of the final layer in one forward."""
        flux = self._known._flux
        if now not in self._on_device:
            made = self._known.get(self._key, self._conditions, now)
            self._on_device = {forward: table.to(flux.img_in.weight.device) for forward, table in made.items()}
        return flux.split_modulations(self._on_device[now], flux.params)
