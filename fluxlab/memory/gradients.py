"""Bytes of a gradient through all steps and blocks, counted on tensors without data."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxlab.families import Family, architecture_of
from fluxlab.memory.costs import activation_bytes, gb, one_block
from fluxlab.model.protocols import AutoEncoderSizes, TransformerSizes
from fluxlab.model.rope import Rotary
from fluxlab.model.sites import Site


@dataclass(frozen=True)
class GradientMemory:
    """Bytes of a gradient, weights left out.

    latents: of all steps. states: the hidden states between the blocks, of one step, or of all steps where a score
    needs them at once. block: the activations of one block and what its backward pass needs. tables: rotary tables.
    kept: the activations of all blocks and steps, if none are computed again. decoder: what decoding keeps, for a
    score of images.
    """

    latents: int
    states: int
    block: int
    tables: int
    kept: int
    decoder: int = 0

    @property
    def checkpointed(self) -> int:
        """The peak if activations are computed again."""
        return self.latents + self.tables + max(self.states + self.block, self.decoder)

    @property
    def whole(self) -> int:
        """The peak if all activations are kept."""
        return self.latents + self.tables + self.kept + self.decoder

    def with_decoder(self, size: int) -> "GradientMemory":
        return replace(self, decoder=size)

    def describe(self, keep: bool) -> str:
        """Return the plan as a line. keep: whether activations are kept."""
        if keep:
            return f"{gb(self.whole)} with all activations kept ({gb(self.checkpointed)} if computed again)"
        decoder = f", decoder {gb(self.decoder)}" if self.decoder else ""
        return (
            f"{gb(self.checkpointed)}, activations computed again: hidden states between blocks {gb(self.states)}, one "
            f"block {gb(self.block)}, latents of all steps {gb(self.latents)}{decoder} ({gb(self.whole)} if kept)"
        )


def gradient_memory(
    p: TransformerSizes,
    batch: int,
    text: int,
    image: int,
    steps: int,
    dtype: torch.dtype,
    *,
    every_step: bool = False,
) -> GradientMemory:
    """Return the memory of a gradient through `steps` forwards of `batch` samples.

    text, image: tokens. every_step: the score reads all steps at once, so that none is computed again as a whole.
    """
    size, exact = dtype.itemsize, max(4, dtype.itemsize)
    double, single = (saved_bytes(p, batch, text, image, dtype, of_double) for of_double in (True, False))
    hidden = batch * (text + image) * p.hidden_size * size
    states = (p.depth + p.depth_single_blocks + 1) * hidden
    # gradients of a block's inputs and outputs are as large as what its forward holds at a time
    block = max(double, single) + activation_bytes(p, batch, text + image, size)
    return GradientMemory(
        latents=(steps + 1) * batch * image * p.in_channels * exact,
        states=states * (steps if every_step else 1),
        block=block,
        tables=2 * (text + image) * sum(p.axes_dim) // 2 * exact,
        kept=steps * (p.depth * double + p.depth_single_blocks * single),
    )


@lru_cache
def saved_bytes(p: TransformerSizes, batch: int, text: int, image: int, dtype: torch.dtype, double: bool) -> int:
    """Return the bytes that autograd keeps of one block, its inputs and weights left out, with fused attention."""
    if not (p.depth if double else p.depth_single_blocks):
        return 0
    found: dict[int, int] = {}
    with FakeTensorMode(), torch.enable_grad():
        model = architecture_of(p).build(one_block(p, double))
        for module in model.modules():  # `to` cannot change the dtype of such tensors
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
        (block,) = [*model.double_blocks, *model.single_blocks]
        tokens, exact = text + image, torch.promote_types(dtype, torch.float32)
        table = Rotary(*(torch.empty(1, 1, tokens, sum(p.axes_dim) // 2, dtype=exact) for _ in range(2)))
        given = [torch.empty(batch, n, p.hidden_size, dtype=dtype) for n in ((image, text) if double else (tokens,))]
        gain = torch.empty(p.num_heads, sum(p.axes_dim) // 2, dtype=exact).requires_grad_()
        inputs, vec = [x.requires_grad_() for x in given], torch.empty(batch, p.hidden_size, dtype=dtype)
        held, outside = [], {_id(x) for x in (*inputs, vec, *table, gain, *model.parameters())}

        def pack(x: Tensor) -> Tensor:
            if _id(x) not in outside:
                found[_id(x)] = x.untyped_storage().nbytes()
            held.append(x)  # so that no storage takes the place of another
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            block(*inputs, model.modulations(vec)[0], (table, table), None, None, _Gains(gain))
    return sum(found.values())


@lru_cache
def decoder_bytes(family: Family, p: AutoEncoderSizes, batch: int, rows: int, cols: int, dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps of decoding `rows` × `cols` tokens, weights left out."""
    found: dict[int, int] = {}
    with FakeTensorMode(), torch.enable_grad():
        model = architecture_of(p).build(p).requires_grad_(False)
        tokens = torch.empty(batch, rows * cols, family.channels(p)).requires_grad_()
        held, outside = [], {_id(w) for w in (*model.parameters(), *model.buffers())}

        def pack(x: Tensor) -> Tensor:
            if _id(x) not in outside:
                found[_id(x)] = x.untyped_storage().nbytes()
            held.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.decode(family.unpack(tokens, rows, cols), stripe=None)
    return sum(found.values()) * dtype.itemsize // 4


def _id(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Gains(Site):
    """What attribution does at the queries."""

    def __init__(self, gain: Tensor):
        self.gain = gain

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return x * self.gain[:, None].repeat_interleave(2, -1).to(x.dtype) if name == "queries" else x


def keeps(needed: GradientMemory, free: int | None, memory_gb: float | None) -> bool:
    """Return whether all activations fit: into `memory_gb`, by default into half of what is free."""
    limit = memory_gb * 1e9 if memory_gb is not None else None if free is None else free / 2
    return limit is not None and needed.whole <= limit
