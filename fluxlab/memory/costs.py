"""Bytes of weights and activations, from sizes alone. Weights are exact. Activations are those of a device."""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from fluxlab.families import architecture_of, family_of
from fluxlab.model.autoencoder import STRIPE, WHOLE, AttnBlock
from fluxlab.model.linear import MKL_FIRST
from fluxlab.model.packing import PACK_BYTES
from fluxlab.model.protocols import AutoEncoderSizes, TransformerSizes

ALIGN = 256
"""Bytes at which each tensor of a block starts in its buffer. Matrix products on a GPU want at least 16."""

_MODULATION = re.compile(r"(?:^|\.)\w*_?(?:mod|modulation)(?:_img|_txt)?\.")
"""Of the names of weights whose products depend on time, guidance and pooled text only."""


def is_modulation(name: str) -> bool:
    """Return whether a parameter of a transformer computes shifts, scales and gates."""
    return _MODULATION.search(name) is not None


def aligned(size: int) -> int:
    """Return `size` rounded up to `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


def buffer_bytes(counts: Iterable[int], itemsize: int) -> int:
    """Return the size of a buffer of tensors with so many elements each."""
    return sum(aligned(count * itemsize) for count in counts)


def one_block(p: TransformerSizes, double: bool) -> TransformerSizes:
    """Return the sizes of a transformer with one double or one single block."""
    return replace(p, depth=int(double), depth_single_blocks=int(not double))


def _on_meta(p: TransformerSizes | AutoEncoderSizes) -> nn.Module:
    with torch.device("meta"):
        return architecture_of(p).build(p)


@lru_cache
def block_counts(p: TransformerSizes, double: bool) -> tuple[int, ...]:
    """Return the number of elements of each tensor of a block, without its modulations; () for no such block."""
    if not (p.depth if double else p.depth_single_blocks):
        return ()
    model = _on_meta(one_block(p, double))
    (block,) = [*model.double_blocks, *model.single_blocks]
    return tuple(weight.numel() for name, weight in block.named_parameters() if not is_modulation(name))


@lru_cache
def end_counts(p: TransformerSizes) -> tuple[int, ...]:
    """Return the number of elements of each tensor outside of the blocks, without modulations."""
    ends = _on_meta(_without_blocks(p))
    return tuple(weight.numel() for name, weight in ends.named_parameters() if not is_modulation(name))


def _without_blocks(p: TransformerSizes) -> TransformerSizes:
    return replace(p, depth=0, depth_single_blocks=0)


def modulation_width(p: TransformerSizes) -> int:
    """Return the number of shifts, scales and gates of one sample at one time: of all blocks and the final layer."""
    return sum(architecture_of(p).build.modulation_layers(p).values()) * p.hidden_size


@lru_cache
def modulation_count(p: TransformerSizes) -> int:
    """Return the number of parameters that compute the modulations."""

    def count(sizes: TransformerSizes) -> int:
        return sum(weight.numel() for name, weight in _on_meta(sizes).named_parameters() if is_modulation(name))

    total = shared = count(_without_blocks(p))
    for blocks, double in ((p.depth, True), (p.depth_single_blocks, False)):
        if blocks:
            total += blocks * (count(one_block(p, double)) - shared)
    return total


def transformer_bytes(p: TransformerSizes, itemsize: int) -> int:
    """Return the bytes of all weights of a transformer."""
    blocks = p.depth * sum(block_counts(p, True)) + p.depth_single_blocks * sum(block_counts(p, False))
    return (blocks + sum(end_counts(p)) + modulation_count(p)) * itemsize


def packed_bytes(p: TransformerSizes, itemsize: int, device: str) -> int:
    """Return the bytes of the packed copies of all weights (`packed_weights`) of a transformer that is resident.

    Those of MKL count twice: they are made between activations, where malloc then cannot join what is freed. Measured
    with the embedded model.
    """
    size = transformer_bytes(p, itemsize)
    copies = 2 if MKL_FIRST and itemsize == 4 else 1
    return copies * size if device == "cpu" and size <= PACK_BYTES else 0


def activation_bytes(p: TransformerSizes, batch: int, tokens: int, itemsize: int) -> int:
    """Return the largest memory of one forward, its inputs left out, with a fused attention kernel.

    In FLUX.1 it is reached at the end of a single block: residual before and after, joint projection, GELU of the MLP,
    their concatenation, attention and its input in the model's dtype; q and k in fp32. In FLUX.2 it is reached in the
    MLP of a double block, whose SwiGLU has four maps. MLPs count `mlp_ratio` each.
    """
    single = itemsize * (8 + 3 * p.mlp_ratio) + 2 * max(4, itemsize)
    double = itemsize * (10 + architecture_of(p).build.mlp_maps * p.mlp_ratio)
    return int(batch * tokens * p.hidden_size * max(single, double))


def sample_bytes(p: TransformerSizes, text: int, tokens: int, size: int) -> int:
    """Return what a sample has besides activations: text of its prompt and a copy in the batch, rotary tables, and four
    copies of latents and velocity in fp32."""
    latents = (tokens - text) * p.in_channels
    return 2 * text * p.context_in_dim * size + 4 * (tokens * p.hidden_size // p.num_heads + 4 * latents)


def waiting_bytes(p: TransformerSizes, batch: int, tokens: int, itemsize: int) -> int:
    """Return the memory of a batch that waits between two blocks: its residual, and the one that it replaces."""
    return 2 * batch * tokens * p.hidden_size * itemsize


@lru_cache
def autoencoder_counts(p: AutoEncoderSizes) -> int:
    """Return the number of parameters of an autoencoder."""
    return sum(weight.numel() for weight in _on_meta(p).parameters())


def decode_bytes(p: AutoEncoderSizes, batch: int, height: int, width: int, itemsize: int) -> int:
    """Return the largest memory of decoding, its weights left out. `AutoEncoder.decode` says when it uses stripes."""
    pixels, latents = height * width, height * width // p.factor**2
    each = 3 * _width(p) * pixels * itemsize
    at_once = min(batch, max(1, int(WHOLE // each)))
    middle = _attention_bytes(at_once, latents, itemsize) + 5 * at_once * p.ch * p.ch_mult[-1] * latents * itemsize
    images = p.out_ch * (batch + at_once) * pixels * itemsize
    maps = _maps(p, at_once * pixels, itemsize) if each <= WHOLE else _striped(p, height, width, itemsize)
    return max(maps, middle) + images


def _striped(p: AutoEncoderSizes, height: int, width: int, itemsize: int) -> int:
    """The maps of the widest residual block: input, what is between its convolutions, output. Then one stripe of
    its input in fp32, before and after the norm, and in the model's dtype."""
    widths = [p.ch * mult for mult in (*p.ch_mult, p.ch_mult[-1])]
    found = []
    for level, (before, after) in enumerate(zip(widths[1:], widths, strict=False)):
        rows, cols = height >> level, width >> level
        maps = (before + (1 if before == after else 2) * after) * rows * cols * itemsize
        found.append(maps + before * min(rows, STRIPE + 2) * cols * (8 + 2 * itemsize))
    return max(found)


def _attention_bytes(batch: int, latents: int, itemsize: int) -> int:
    """Scores in the middle of the decoder, before and after the softmax, of as many queries as are computed at once."""
    return 2 * batch * min(latents**2, AttnBlock.scores) * max(4, itemsize)


def _width(p: AutoEncoderSizes) -> int:
    """Return the channels after the last upsampling, the widest map of full size."""
    return p.ch * p.ch_mult[min(1, len(p.ch_mult) - 1)]


def _maps(p: AutoEncoderSizes, pixels: int, itemsize: int) -> int:
    """Three maps of full size. In 16 bits the statistics of a group norm need more: measured, 3.75."""
    return int((3.75 if itemsize < 4 else 3) * _width(p) * pixels * itemsize)


def text_activation_bytes(p: TransformerSizes, tokens: int, itemsize: int) -> int:
    """Return the memory of a text encoder above its weights."""
    return family_of(p).text_activation_bytes(p, tokens, itemsize)


def gb(size: float) -> str:
    """Return bytes as text: `23.8 GB`, `0.2 GB`, `41.0 MB`."""
    unit, name = next(((n, name) for n, name in ((1e9, "GB"), (1e6, "MB")) if size >= n / 10), (1e3, "kB"))
    return f"{size / unit:.1f} {name}"
