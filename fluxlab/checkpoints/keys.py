"""How our tensors and Diffusers' correspond, row by row: one list per network, which is used in both directions."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from fluxlab.model.protocols import AutoEncoderSizes

Rows = tuple[int, int] | None
"""First row and the one after the last, along dimension 0. None means all rows."""


class Piece(NamedTuple):
    """`our_rows` of our tensor equal `their_rows` of theirs. flat: our 1×1 convolution is their linear layer."""

    ours: str
    theirs: str
    our_rows: Rows = None
    their_rows: Rows = None
    flat: bool = False


Recipe = dict[str, list[tuple[str, Rows]]]
"""For each target tensor, the rows of the source tensors that form it, from top to bottom."""


def to_ours(pieces: Iterable[Piece]) -> Recipe:
    """Return how our tensors are formed from Diffusers'."""
    return _recipe((p.ours, p.our_rows, p.theirs, p.their_rows) for p in pieces)


def to_theirs(pieces: Iterable[Piece]) -> Recipe:
    """Return how Diffusers' tensors are formed from ours."""
    return _recipe((p.theirs, p.their_rows, p.ours, p.our_rows) for p in pieces)


def _recipe(rows: Iterable[tuple[str, Rows, str, Rows]]) -> Recipe:
    parts = defaultdict(list)
    for target, target_rows, source, source_rows in rows:
        parts[target].append(((target_rows or (0, 0))[0], source, source_rows))
    return {
        target: [(source, rows) for _, source, rows in sorted(sources, key=lambda source: source[0])]
        for target, sources in parts.items()
    }


def their_shapes(pieces: Iterable[Piece], ours: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Diffusers' tensors, given those of ours."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        if not ours[piece.ours]:  # a number, such as a batch norm's counter
            shapes[piece.theirs] = ()
            continue
        rows, *rest = ours[piece.ours]
        if piece.our_rows:
            rows = piece.our_rows[1] - piece.our_rows[0]
        before = shapes.get(piece.theirs, (0,))[0]
        shapes[piece.theirs] = (before + rows, *(rest[:-2] if piece.flat else rest))
    return shapes


def autoencoder_levels(p: AutoEncoderSizes) -> list[Piece]:
    """Return how the levels of an encoder and a decoder of latent diffusion's kind correspond."""
    levels, pieces = len(p.ch_mult), []
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.mid", f"{side}.mid_block"
        pieces += layers(
            {
                f"{side}.conv_in": f"{side}.conv_in",
                f"{side}.norm_out": f"{side}.conv_norm_out",
                f"{side}.conv_out": f"{side}.conv_out",
                f"{ours}.attn_1.norm": f"{theirs}.attentions.0.group_norm",
            }
        )
        for layer, their_layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            for kind in ("weight", "bias"):
                names = f"{ours}.attn_1.{layer}.{kind}", f"{theirs}.attentions.0.{their_layer}.{kind}"
                pieces.append(Piece(*names, flat=kind == "weight"))
        pieces += _resnet(f"{ours}.block_1", f"{theirs}.resnets.0", shortcut=False)
        pieces += _resnet(f"{ours}.block_2", f"{theirs}.resnets.1", shortcut=False)

    down = [1, *p.ch_mult]
    up = [*p.ch_mult, p.ch_mult[-1]]
    for i in range(levels):
        j = levels - 1 - i  # Diffusers numbers the decoder's levels in the order in which they run
        for n in range(p.num_res_blocks):
            changes = n == 0 and down[i] != down[i + 1]
            pieces += _resnet(f"encoder.down.{i}.block.{n}", f"encoder.down_blocks.{i}.resnets.{n}", changes)
        for n in range(p.num_res_blocks + 1):
            changes = n == 0 and up[i] != up[i + 1]
            pieces += _resnet(f"decoder.up.{i}.block.{n}", f"decoder.up_blocks.{j}.resnets.{n}", changes)
        if i < levels - 1:
            pieces += layers({f"encoder.down.{i}.downsample.conv": f"encoder.down_blocks.{i}.downsamplers.0.conv"})
        if i > 0:
            pieces += layers({f"decoder.up.{i}.upsample.conv": f"decoder.up_blocks.{j}.upsamplers.0.conv"})
    return pieces


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def new_autoencoder_name(theirs: str) -> str:
    """Return the current name of a tensor in an `AutoencoderKL` folder written before Diffusers 0.15."""
    head, dot, tail = theirs.rpartition("mid_block.attentions.0.")
    layer, _, kind = tail.partition(".")
    return f"{head}{dot}{OLD_ATTENTION[layer]}.{kind}" if dot and layer in OLD_ATTENTION else theirs


def layers(names: dict[str, str]) -> list[Piece]:
    """Return the pieces of layers that have a weight and a bias."""
    return [Piece(f"{o}.{kind}", f"{t}.{kind}") for o, t in names.items() for kind in ("weight", "bias")]


def norms(ours: str, query: str, key: str) -> list[Piece]:
    """Return the pieces of the norms of queries and keys."""
    return [Piece(f"{ours}.query_norm.scale", f"{query}.weight"), Piece(f"{ours}.key_norm.scale", f"{key}.weight")]


def fused(ours: str, parts: dict[str, int], bias: bool) -> list[Piece]:
    """Return the pieces of our layer that joins several of theirs. parts: their names and rows, from top to bottom."""
    pieces, row = [], 0
    for theirs, rows in parts.items():
        for kind in ("weight", "bias")[: 1 + bias]:
            pieces.append(Piece(f"{ours}.{kind}", f"{theirs}.{kind}", our_rows=(row, row + rows)))
        row += rows
    return pieces


def _resnet(ours: str, theirs: str, shortcut: bool) -> list[Piece]:
    names = {f"{ours}.{layer}": f"{theirs}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2")}
    if shortcut:
        names[f"{ours}.nin_shortcut"] = f"{theirs}.conv_shortcut"
    return layers(names)
