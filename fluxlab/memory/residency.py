"""The weights of one transformer: which are on the device, and how the others get there when they are needed."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fluxlab.checkpoints.casting import check_finite
from fluxlab.checkpoints.lora import Addition
from fluxlab.checkpoints.merge import merge
from fluxlab.memory.attaching import eager, empty_parameter, needs_modulations, set_parameter
from fluxlab.memory.costs import is_modulation
from fluxlab.memory.modulations import Conditions, KnownModulations, Steps
from fluxlab.memory.pages import MappedPages, let_go
from fluxlab.memory.plan import CPU_DEPTH, CPU_SLOTS, PINNED, SLOTS, Plan
from fluxlab.memory.ring import Engine, Reader, Ring, engine_for
from fluxlab.memory.source import Unit, WeightSource
from fluxlab.memory.turns import Turns
from fluxlab.model.protocols import Transformer

T = TypeVar("T")


class Residency:
    """Places the weights of a transformer according to a plan, and gives each block its weights while it is computed.

    Its `forward` does not know of it: it acts before and after a block. Weights of a block that is not being computed
    are on the meta device, or mapped from their file on a CPU.
    """

    def __init__(
        self,
        flux: Transformer,
        source: WeightSource,
        device: torch.device,
        engine: Engine | None = None,
        changes: Mapping[str, Sequence[Addition]] | None = None,
    ):
        """changes: what LoRAs add to weights that are read later, by name."""
        self.changes = changes or {}
        self.flux, self.source, self.device = flux, source, device
        self.engine = engine or engine_for(device)
        self.dtype = flux.img_in.weight.dtype
        self.plan: Plan | None = None
        self.turns: Turns | None = None
        self._current: int | None = None  # the block that has its weights for the moment
        self.blocks: list[nn.Module] = [*flux.double_blocks, *flux.single_blocks]
        self.mapped = not any(weight.is_meta for weight in flux.parameters())
        self._pages = [MappedPages(self._own(block).values()) for block in self.blocks] if self.mapped else []
        self._unchecked = set(range(len(source.units)))
        self._unchanged = set(self.changes)  # weights whose sum with a LoRA was not checked yet
        self._buffers: dict[int, Tensor] = {}
        self._ring: Ring | None = None
        self._cast: Tensor | None = None
        self._views: dict[Any, dict[str, nn.Parameter]] = {}
        self.known = KnownModulations(flux, self._modulation_weights)
        if not self.mapped:
            flux.register_forward_pre_hook(needs_modulations, with_kwargs=True)
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(eager(self._before(i)))
            block.register_forward_hook(eager(self._after(i)), always_call=True)

    def place(self, plan: Plan) -> None:
        """Load the blocks that are resident in `plan`, and let go of the others.

        A plan that has room for more blocks than are loaded changes nothing: reading them takes time, and the next
        batch may be larger again.
        """
        if self.mapped or (self.plan is not None and len(self._buffers) <= len(plan.resident)):
            self.plan = plan if self.plan is None else self.plan
            return
        self.release_ring()
        self.plan = plan
        for block in set(self._buffers) - set(plan.resident):
            self._remove(block)
        missing = [block for block in plan.resident if block not in self._buffers]
        if missing:
            self._load(missing)

    def _load(self, blocks: list[int]) -> None:
        reader = self._reader(blocks, depth=2)
        try:
            for _ in blocks:
                block, source = reader.get()
                buffer = self.engine.device(len(source))
                mark = self.engine.copy(buffer, source, None)
                reader.give_back(mark)
                self.engine.wait(mark)
                self._buffers[block] = buffer
                if not self._casts(self.source.units[block]):
                    self._give(block, self._parameters(("resident", block), self.source.units[block], buffer))
        finally:
            reader.close()

    def _reader(self, units: list[int], depth: int) -> Reader:
        sizes = [unit.size if i in set(units) else 0 for i, unit in enumerate(self.source.units)]
        return Reader(units, self._read, self.engine, sizes, depth)

    def _read(self, unit: int, buffer: Tensor, run: Callable) -> None:
        self.source.read(unit, buffer, run)
        if unit in self._unchecked:
            self.source.units[unit].check(buffer, self.dtype, self.source.path)
            self._unchecked.discard(unit)

    def release_ring(self) -> None:
        """Free the buffers of streamed blocks, for instance to decode. They come back when a block is needed."""
        self._leave()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._cast = None
        self._views = {key: views for key, views in self._views.items() if key[0] == "resident"}

    def together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run tasks that sample with this transformer, so that each block is loaded once for all of them."""
        if len(tasks) == 1:
            return [tasks[0]()]
        self.turns = Turns(len(self.blocks))
        try:
            return self.turns.run(tasks)
        finally:
            self.turns = None
            self._leave()

    def close(self) -> None:
        """Stop all reading and free all buffers."""
        self.release_ring()
        for block in list(self._buffers):
            self._remove(block)
        self.source.close()

    # --- before and after a block -----------------------------------------------------------------

    def _before(self, block: int) -> Callable:
        def before(module: nn.Module, args: tuple) -> None:
            if self.turns is not None:
                self.turns.arrive(block)
            if self._current != block:
                self._leave()
                self._enter(block)
                self._current = block

        return before

    def _after(self, block: int) -> Callable:
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if self._current == block and not (self.turns is not None and self.turns.awaited(block)):
                self._leave()

        return after

    def _enter(self, block: int) -> None:
        """Give a block its weights."""
        unit = self.source.units[block]
        if self.mapped:
            self._check_mapped(block)
            self._pages[(block + 1) % len(self._pages)].read_ahead()
        elif block in self._buffers:
            if self._casts(unit):
                self._give(block, self._upcast(unit, self._buffers[block]))
        else:
            if self._ring is None:
                self._ring = self._new_ring()
            slot, buffer = self._ring.take(block)
            casts = self._casts(unit)
            views = self._upcast(unit, buffer) if casts else self._parameters(("ring", slot), unit, buffer)
            self._give(block, views)

    def _leave(self) -> None:
        """Let go of the weights of the block that was computed last."""
        block, self._current = self._current, None
        if block is None:
            return
        if self.mapped:
            self._pages[block].let_go()
        elif block not in self._buffers:
            self._take_away(block)
            self._ring.give_back()
        elif self._casts(self.source.units[block]):
            self._take_away(block)

    def _new_ring(self) -> Ring:
        resident = set(self._buffers)
        streamed = [block for block in range(len(self.blocks)) if block not in resident]
        sizes = [unit.size for unit in self.source.units]
        on_cpu = self.device.type == "cpu"
        slots, depth = (CPU_SLOTS, CPU_DEPTH) if on_cpu else (SLOTS, PINNED)
        return Ring(streamed, self._read, sizes, self.engine, slots, depth)

    def _check_mapped(self, block: int) -> None:
        if block not in self._unchecked:
            return
        for name, weight in self._own(self.blocks[block]).items():
            full = f"{self.source.units[block].prefix}{name}"
            check_finite(weight, [(full, weight)], self.source.path)
        self._unchecked.discard(block)

    # --- parameters -------------------------------------------------------------------------------

    def _own(self, block: nn.Module) -> dict[str, Tensor]:
        return {name: weight for name, weight in block.named_parameters() if not is_modulation(name)}

    def _casts(self, unit: Unit) -> bool:
        """Return whether a unit is computed from a copy: it is stored in another dtype, or a LoRA changes it."""
        return any(w.dtype != self.dtype or f"{unit.prefix}{w.name}" in self.changes for w in unit.weights)

    def _changed(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with what LoRAs add to it."""
        if name not in self.changes:
            return weight
        changed = merge(weight, self.changes[name])
        if name in self._unchanged:
            check_finite(changed, [(name, weight)], self.source.path)
            self._unchanged.discard(name)
        return changed

    def _parameters(self, where: tuple, unit: Unit, buffer: Tensor) -> dict[str, nn.Parameter]:
        """Return a unit's tensors in a buffer as parameters, made once for each buffer and each order of tensors."""
        key = (*where, unit.signature)
        if key not in self._views:
            self._views[key] = {
                name: nn.Parameter(view, requires_grad=False) for name, view in unit.views(buffer).items()
            }
        return self._views[key]

    def _upcast(self, unit: Unit, buffer: Tensor) -> dict[str, nn.Parameter]:
        """Return a unit's tensors in the model's dtype, in a buffer that the next block overwrites."""
        if self._cast is None:
            self._cast = self.engine.device(max(u.size_as(self.dtype) for u in self.source.units[: len(self.blocks)]))
        wide = unit.as_dtype(self.dtype)
        views = self._parameters(("cast",), wide, self._cast)
        with torch.no_grad():
            for name, stored in unit.views(buffer).items():
                views[name].copy_(stored)
                if f"{unit.prefix}{name}" in self.changes:
                    views[name].copy_(self._changed(f"{unit.prefix}{name}", views[name].detach()))
        return views

    def _give(self, block: int, views: dict[str, nn.Parameter]) -> None:
        for name, parameter in views.items():
            set_parameter(self.blocks[block], name, parameter)

    def _take_away(self, block: int) -> None:
        """Leave tensors of the right shape without values. Computing with them raises an error."""
        for weight in self.source.units[block].weights:
            set_parameter(self.blocks[block], weight.name, empty_parameter(weight.shape, self.dtype))

    def _remove(self, block: int) -> None:
        self._take_away(block)
        del self._buffers[block]
        self._views = {key: views for key, views in self._views.items() if key[:2] != ("resident", block)}

    # --- modulations ------------------------------------------------------------------------------

    def modulations(self, key: Hashable, conditions: Callable[[], Conditions]) -> Steps:
        """Return the modulations of a batch, whose weights are read if no batch before it had the same conditions."""
        return self.known.of(key, conditions)

    def _modulation_weights(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        layers = list(self.flux.modulation_layers(self.flux.params))
        if self.mapped:
            for name in layers:
                layer = self.flux.get_submodule(name)
                check_finite(layer.weight, [(f"{name}.weight", layer.weight)], self.source.path)
                yield layer.weight, layer.bias
                let_go(layer.parameters())
            return
        units = list(range(self.source.modulations, len(self.source.units)))
        reader = self._reader(units, depth=1 if self.device.type == "cpu" else 2)
        try:
            names = iter(layers)
            for _ in units:
                unit, source = reader.get()
                buffer = self.engine.device(len(source))
                mark = self.engine.copy(buffer, source, None)
                reader.give_back(mark)
                self.engine.wait(mark)
                prefix, views = self.source.units[unit].prefix, self.source.units[unit].views(buffer)
                count = sum(name.endswith("weight") for name in views)
                for name in itertools.islice(names, count):
                    inner = name.removeprefix(prefix)
                    made = {
                        kind: self._changed(f"{name}.{kind}", views[f"{inner}.{kind}"].to(self.dtype))
                        for kind in ("weight", "bias")
                        if f"{inner}.{kind}" in views
                    }
                    yield made["weight"], made.get("bias")
        finally:
            reader.close()
