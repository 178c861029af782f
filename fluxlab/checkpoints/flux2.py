"""FLUX.2's files: Diffusers' names of its tensors, sizes from a config.json or from shapes, names in LoRA files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.formats import Format
from fluxlab.checkpoints.keys import Piece, autoencoder_levels, fused, norms
from fluxlab.checkpoints.lora_names import Where
from fluxlab.checkpoints.params import Naming, complete, level_config, level_sizes, require
from fluxlab.checkpoints.shapes import LEVELS, Shapes, count, levels, ratio, size
from fluxlab.families.flux2 import FAMILY
from fluxlab.model import AUTOENCODERS, TRANSFORMERS2, AutoEncoder2Params, Flux2Params
from fluxlab.model.autoencoder2 import BN_EPS

# Diffusers' defaults: a config.json may omit values that equal them
_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000.0,
    "eps": 1e-6,
    "guidance_embeds": True,
}
_AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": BN_EPS,
    "batch_norm_momentum": 0.1,
    "patch_size": (2, 2),
}


def transformer_pieces(p: Flux2Params) -> list[Piece]:
    """Return how the tensors of BFL's FLUX.2 and of Diffusers' `Flux2Transformer2DModel` correspond."""
    d = p.hidden_size
    names = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    embedders = {"time_in": "timestep_embedder"} | ({"guidance_in": "guidance_embedder"} if p.guidance_embed else {})
    for ours, theirs in embedders.items():
        for layer, their_layer in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
            names[f"{ours}.{layer}"] = f"time_guidance_embed.{theirs}.{their_layer}"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        names[f"{name}.lin"] = f"{name}.linear"

    pieces: list[Piece] = []
    for i in range(p.depth):
        ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
        names |= {
            f"{ours}.img_attn.proj": f"{theirs}.attn.to_out.0",
            f"{ours}.txt_attn.proj": f"{theirs}.attn.to_add_out",
            f"{ours}.img_mlp.0": f"{theirs}.ff.linear_in",
            f"{ours}.img_mlp.2": f"{theirs}.ff.linear_out",
            f"{ours}.txt_mlp.0": f"{theirs}.ff_context.linear_in",
            f"{ours}.txt_mlp.2": f"{theirs}.ff_context.linear_out",
        }
        pieces += norms(f"{ours}.img_attn.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
        pieces += norms(f"{ours}.txt_attn.norm", f"{theirs}.attn.norm_added_q", f"{theirs}.attn.norm_added_k")
        for stream, layer in (("img", "to_{}"), ("txt", "add_{}_proj")):
            parts = {f"{theirs}.attn.{layer.format(c)}": d for c in "qkv"}
            pieces += fused(f"{ours}.{stream}_attn.qkv", parts, bias=False)
    for i in range(p.depth_single_blocks):
        ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        names |= {f"{ours}.linear1": f"{theirs}.attn.to_qkv_mlp_proj", f"{ours}.linear2": f"{theirs}.attn.to_out"}
        pieces += norms(f"{ours}.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")

    pieces += [Piece(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in names.items()]
    # our rows are (shift, scale), theirs (scale, shift)
    ours, theirs = "final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight"
    return [*pieces, Piece(ours, theirs, (0, d), (d, 2 * d)), Piece(ours, theirs, (d, 2 * d), (0, d))]


def autoencoder_pieces(p: AutoEncoder2Params) -> list[Piece]:
    """Return how the tensors of BFL's autoencoder and of Diffusers' `AutoencoderKLFlux2` correspond."""
    convolutions = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    pieces = [Piece(f"{o}.{kind}", f"{t}.{kind}") for o, t in convolutions.items() for kind in ("weight", "bias")]
    statistics = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    return [*autoencoder_levels(p), *pieces, *(Piece(name, name) for name in statistics)]


def transformer_params(config: Mapping[str, Any], where: Path) -> Flux2Params:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.2 does not have."""
    c = complete(config, _TRANSFORMER, where, "FLUX.2")
    require(c, where, "FLUX.2's transformer", patch_size=1, timestep_guidance_channels=256, eps=1e-6)
    with Naming(where):
        return Flux2Params(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"] or c["in_channels"],
            context_in_dim=c["joint_attention_dim"],
            hidden_size=c["num_attention_heads"] * c["attention_head_dim"],
            mlp_ratio=c["mlp_ratio"],
            num_heads=c["num_attention_heads"],
            depth=c["num_layers"],
            depth_single_blocks=c["num_single_layers"],
            axes_dim=tuple(c["axes_dims_rope"]),
            theta=c["rope_theta"],
            guidance_embed=c["guidance_embeds"],
        )


def transformer_config(p: Flux2Params) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`."""
    return {
        "_class_name": FAMILY.transformer.diffusers,
        "patch_size": 1,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "num_layers": p.depth,
        "num_single_layers": p.depth_single_blocks,
        "attention_head_dim": p.hidden_size // p.num_heads,
        "num_attention_heads": p.num_heads,
        "joint_attention_dim": p.context_in_dim,
        "timestep_guidance_channels": 256,
        "mlp_ratio": p.mlp_ratio,
        "axes_dims_rope": list(p.axes_dim),
        "rope_theta": p.theta,
        "eps": 1e-6,
        "guidance_embeds": p.guidance_embed,
    }


def autoencoder_params(config: Mapping[str, Any], where: Path) -> AutoEncoder2Params:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.2 does not have."""
    c = complete(config, _AUTOENCODER, where, "FLUX.2")
    fixed = {"batch_norm_eps": BN_EPS, "patch_size": [2, 2], "use_quant_conv": True, "use_post_quant_conv": True}
    if c["decoder_block_out_channels"] not in (None, c["block_out_channels"], list(c["block_out_channels"])):
        raise CheckpointError(
            f"{where}: decoder_block_out_channels is {c['decoder_block_out_channels']!r}; FLUX.2's autoencoder has "
            "those of the encoder and nothing else can be read"
        )
    with Naming(where):
        return AutoEncoder2Params(**level_sizes(c, where, "FLUX.2's autoencoder", **fixed))


def autoencoder_config(p: AutoEncoder2Params) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers does not have."""
    return {
        **level_config(p, FAMILY.autoencoder.diffusers),
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "batch_norm_eps": BN_EPS,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
    }


def transformer_params_from_shapes(shapes: Shapes, where: Path) -> Flux2Params:
    """Return the sizes of a FLUX.2 transformer with BFL's names.

    The heads' axes are four equal parts, and theta is 2000. A size that only missing tensors would give is FLUX.2
    dev's: all missing tensors are then reported together.
    """
    dev, depth, singles = TRANSFORMERS2["flux2dev"], count(shapes, "double_blocks"), count(shapes, "single_blocks")
    hidden = size(shapes, *((f"{name}.weight", 0) for name in ("img_in", "txt_in", "time_in.out_layer")))
    norms = (name for name in shapes if name.endswith(("query_norm.scale", "key_norm.scale")))
    head = size(shapes, *((name, 0) for name in norms))
    if not hidden or not head or head % 8 or hidden % head:
        raise CheckpointError(
            f"{where}: the tensors' shapes do not say how heads share {hidden or 'the'} channels and four id axes "
            f"(a head's width: {head or 'unknown'})\nPass params=Flux2Params(…)."
        )
    mlp = size(shapes, *((f"double_blocks.{i}.img_mlp.2.weight", 1) for i in range(depth)))
    joined = size(shapes, *((f"single_blocks.{i}.linear2.weight", 1) for i in range(singles)))
    with Naming(where):
        return Flux2Params(
            in_channels=size(shapes, ("img_in.weight", 1)) or dev.in_channels,
            out_channels=size(shapes, ("final_layer.linear.weight", 0)) or dev.out_channels,
            context_in_dim=size(shapes, ("txt_in.weight", 1)) or dev.context_in_dim,
            hidden_size=hidden,
            mlp_ratio=ratio(mlp or (joined or 4 * hidden) - hidden, hidden),
            num_heads=hidden // head,
            depth=depth,
            depth_single_blocks=singles,
            axes_dim=(head // 4,) * 4,
            theta=dev.theta,
            guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
        )


def autoencoder_params_from_shapes(shapes: Shapes, where: Path) -> AutoEncoder2Params:
    """Return the sizes of a FLUX.2 autoencoder with BFL's names."""
    with Naming(where):
        return AutoEncoder2Params(**levels(shapes, where, AUTOENCODERS["flux2"]))


def lora_aliases(p: Flux2Params, known: Mapping[str, list[Where]]) -> dict[str, list[Where]]:
    """Return Diffusers' names of fused projections, and those of its blocks whose prefix some tools have cut off."""
    found = {}
    for i in range(p.depth):
        for stream, layer in (("img", "to_qkv"), ("txt", "to_added_qkv")):
            ours = f"double_blocks.{i}.{stream}_attn.qkv.weight"
            found[f"transformer_blocks_{i}_attn_{layer}"] = [Where(ours, None, None)]
    every = {**known, **found}.items()
    return found | {name.removeprefix("tran"): at for name, at in every if name.startswith("transformer_blocks_")}


_NAMES = {
    r"^x_embedder\.": "img_in.",
    r"^context_embedder\.": "txt_in.",
    r"^proj_out\.": "final_layer.linear.",
    r"^time_guidance_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"^time_guidance_embed\.guidance_embedder\.linear_1\.": "guidance_in.in_layer.",
    r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
    r"^transformer_blocks\.(\d+)\.ff\.linear_out\.": r"double_blocks.\1.img_mlp.2.",
    r"^transformer_blocks\.": "double_blocks.",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.": r"single_blocks.\1.linear2.",
    r"^single_transformer_blocks\.": "single_blocks.",
}
"""BFL's names of Diffusers' tensors, where sizes are read from shapes. The first pattern that matches counts."""

TRANSFORMER = Format(transformer_pieces, transformer_config, transformer_params, transformer_params_from_shapes, _NAMES)
AUTOENCODER = Format(autoencoder_pieces, autoencoder_config, autoencoder_params, autoencoder_params_from_shapes, LEVELS)
