"""How our tensors and Diffusers' correspond, row by row: one list per network, which is used in both directions."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from fluxlab.model import AutoEncoder2Params, AutoEncoderParams, FluxParams

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


def transformer_pieces(p: FluxParams) -> list[Piece]:
    """Return how the tensors of BFL's FLUX.1 and of Diffusers' `FluxTransformer2DModel` correspond."""
    d, mlp = p.hidden_size, int(p.hidden_size * p.mlp_ratio)
    pieces = _layers({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"})
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if p.guidance_embed:
        embedders["guidance_in"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        pieces += _layers(
            {
                f"{ours}.in_layer": f"time_text_embed.{theirs}.linear_1",
                f"{ours}.out_layer": f"time_text_embed.{theirs}.linear_2",
            }
        )
    for kind in ("weight", "bias"):  # our rows are (shift, scale), theirs (scale, shift)
        ours, theirs = f"final_layer.adaLN_modulation.1.{kind}", f"norm_out.linear.{kind}"
        pieces += [Piece(ours, theirs, (0, d), (d, 2 * d)), Piece(ours, theirs, (d, 2 * d), (0, d))]

    for i in range(p.depth):
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        pieces += _layers(
            {
                f"{ours}.img_mod.lin": f"{theirs}.norm1.linear",
                f"{ours}.txt_mod.lin": f"{theirs}.norm1_context.linear",
                f"{ours}.img_attn.proj": f"{theirs}.attn.to_out.0",
                f"{ours}.txt_attn.proj": f"{theirs}.attn.to_add_out",
                f"{ours}.img_mlp.0": f"{theirs}.ff.net.0.proj",
                f"{ours}.img_mlp.2": f"{theirs}.ff.net.2",
                f"{ours}.txt_mlp.0": f"{theirs}.ff_context.net.0.proj",
                f"{ours}.txt_mlp.2": f"{theirs}.ff_context.net.2",
            }
        )
        pieces += norms(f"{ours}.img_attn.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
        pieces += norms(f"{ours}.txt_attn.norm", f"{theirs}.attn.norm_added_q", f"{theirs}.attn.norm_added_k")
        for stream, names in (("img", "to_{}"), ("txt", "add_{}_proj")):
            parts = {f"{theirs}.attn.{names.format(c)}": d for c in "qkv"}
            pieces += fused(f"{ours}.{stream}_attn.qkv", parts, bias=p.qkv_bias)

    for i in range(p.depth_single_blocks):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        # linear2's columns are (attention, MLP) on both sides
        pieces += _layers({f"{ours}.modulation.lin": f"{theirs}.norm.linear", f"{ours}.linear2": f"{theirs}.proj_out"})
        pieces += norms(f"{ours}.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
        parts = {f"{theirs}.attn.to_{c}": d for c in "qkv"}
        pieces += fused(f"{ours}.linear1", {**parts, f"{theirs}.proj_mlp": mlp}, bias=True)
    return pieces


def autoencoder_pieces(p: AutoEncoderParams) -> list[Piece]:
    """Return how the tensors of BFL's autoencoder and of Diffusers' `AutoencoderKL` correspond."""
    return autoencoder_levels(p)


def autoencoder_levels(p: AutoEncoderParams | AutoEncoder2Params) -> list[Piece]:
    """Return how the levels of an encoder and a decoder correspond."""
    levels, pieces = len(p.ch_mult), []
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.mid", f"{side}.mid_block"
        pieces += _layers(
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
            pieces += _layers({f"encoder.down.{i}.downsample.conv": f"encoder.down_blocks.{i}.downsamplers.0.conv"})
        if i > 0:
            pieces += _layers({f"decoder.up.{i}.upsample.conv": f"decoder.up_blocks.{j}.upsamplers.0.conv"})
    return pieces


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def new_autoencoder_name(theirs: str) -> str:
    """Return the current name of a tensor in an `AutoencoderKL` folder written before Diffusers 0.15."""
    head, dot, tail = theirs.rpartition("mid_block.attentions.0.")
    layer, _, kind = tail.partition(".")
    return f"{head}{dot}{OLD_ATTENTION[layer]}.{kind}" if dot and layer in OLD_ATTENTION else theirs


def _layers(names: dict[str, str]) -> list[Piece]:
    return [Piece(f"{o}.{kind}", f"{t}.{kind}") for o, t in names.items() for kind in ("weight", "bias")]


def norms(ours: str, query: str, key: str) -> list[Piece]:
    return [Piece(f"{ours}.query_norm.scale", f"{query}.weight"), Piece(f"{ours}.key_norm.scale", f"{key}.weight")]


def fused(ours: str, parts: dict[str, int], bias: bool) -> list[Piece]:
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
    return _layers(names)
