"""FLUX.1's files: Diffusers' names of its tensors, sizes from a config.json or from shapes, names in LoRA files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.formats import Format
from fluxlab.checkpoints.keys import Piece, autoencoder_levels, fused, layers, norms
from fluxlab.checkpoints.lora_names import Where
from fluxlab.checkpoints.params import Naming, complete, level_config, level_sizes, require
from fluxlab.checkpoints.shapes import LEVELS, Shapes, count, levels, ratio, size
from fluxlab.families.flux1 import FAMILY
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, AutoEncoderParams, FluxParams

# Diffusers' defaults: a config.json may omit values that equal them
_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
_AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def transformer_pieces(p: FluxParams) -> list[Piece]:
    """Return how the tensors of BFL's FLUX.1 and of Diffusers' `FluxTransformer2DModel` correspond."""
    d, mlp = p.hidden_size, int(p.hidden_size * p.mlp_ratio)
    pieces = layers({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"})
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if p.guidance_embed:
        embedders["guidance_in"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        pieces += layers(
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
        pieces += layers(
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
        pieces += layers({f"{ours}.modulation.lin": f"{theirs}.norm.linear", f"{ours}.linear2": f"{theirs}.proj_out"})
        pieces += norms(f"{ours}.norm", f"{theirs}.attn.norm_q", f"{theirs}.attn.norm_k")
        parts = {f"{theirs}.attn.to_{c}": d for c in "qkv"}
        pieces += fused(f"{ours}.linear1", {**parts, f"{theirs}.proj_mlp": mlp}, bias=True)
    return pieces


def autoencoder_pieces(p: AutoEncoderParams) -> list[Piece]:
    """Return how the tensors of BFL's autoencoder and of Diffusers' `AutoencoderKL` correspond."""
    return autoencoder_levels(p)


def transformer_params(config: Mapping[str, Any], where: Path) -> FluxParams:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.1 does not have."""
    c = complete(config, _TRANSFORMER, where, "FLUX.1")
    require(c, where, "FLUX.1's transformer", patch_size=1)
    with Naming(where):
        return FluxParams(
            in_channels=c["in_channels"],
            out_channels=c["out_channels"] or c["in_channels"],
            vec_in_dim=c["pooled_projection_dim"],
            context_in_dim=c["joint_attention_dim"],
            hidden_size=c["num_attention_heads"] * c["attention_head_dim"],
            mlp_ratio=4.0,
            num_heads=c["num_attention_heads"],
            depth=c["num_layers"],
            depth_single_blocks=c["num_single_layers"],
            axes_dim=tuple(c["axes_dims_rope"]),
            theta=10000,
            qkv_bias=True,
            guidance_embed=c["guidance_embeds"],
        )


def transformer_config(p: FluxParams) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers does not have."""
    for name, fixed in {"mlp_ratio": 4, "theta": 10000, "qkv_bias": True}.items():
        if getattr(p, name) != fixed:
            raise CheckpointError(
                f"{name} {getattr(p, name)}: Diffusers' {FAMILY.transformer.diffusers} only has {fixed}\n"
                "Save with layout='bfl'."
            )
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
        "pooled_projection_dim": p.vec_in_dim,
        "guidance_embeds": p.guidance_embed,
        "axes_dims_rope": list(p.axes_dim),
    }


def autoencoder_params(config: Mapping[str, Any], where: Path) -> AutoEncoderParams:
    """Return the sizes in a Diffusers config. Raises `CheckpointError` naming a key that FLUX.1 does not have."""
    c = complete(config, _AUTOENCODER, where, "FLUX.1")
    fixed = {"latents_mean": None, "latents_std": None, "use_quant_conv": False, "use_post_quant_conv": False}
    with Naming(where):
        return AutoEncoderParams(
            **level_sizes(c, where, "FLUX.1's autoencoder", **fixed),
            scale_factor=c["scaling_factor"],
            shift_factor=c["shift_factor"] or 0.0,
        )


def autoencoder_config(p: AutoEncoderParams) -> dict[str, Any]:
    """Return the Diffusers config.json of `p`. Raises `CheckpointError` for sizes that Diffusers does not have."""
    return {
        **level_config(p, FAMILY.autoencoder.diffusers),
        "scaling_factor": p.scale_factor,
        "shift_factor": p.shift_factor,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def transformer_params_from_shapes(shapes: Shapes, where: Path) -> FluxParams:
    """Return the sizes of a transformer with BFL's names.

    The heads' axes are split as FLUX.1's (1/8, 7/16, 7/16), and theta is its 10000. A size that only missing tensors
    would give is FLUX.1's: all missing tensors are then reported together.
    """
    flux1, depth, singles = TRANSFORMERS["dev"], count(shapes, "double_blocks"), count(shapes, "single_blocks")
    streams = ("img_in", "txt_in", "time_in.out_layer", "vector_in.out_layer")
    hidden = size(shapes, *((f"{name}.{kind}", 0) for name in streams for kind in ("weight", "bias")))
    norms = (name for name in shapes if name.endswith(("query_norm.scale", "key_norm.scale")))
    head = size(shapes, *((name, 0) for name in norms))
    if not hidden or not head or head % 32 or hidden % head:
        raise CheckpointError(
            f"{where}: the tensors' shapes do not say how heads share {hidden or 'the'} channels and three id axes "
            f"(a head's width: {head or 'unknown'})\nPass params=FluxParams(…)."
        )
    doubles = [f"double_blocks.{i}.{stream}_mlp.0" for i in range(depth) for stream in ("img", "txt")]
    mlp = size(shapes, *((f"{name}.{kind}", 0) for name in doubles for kind in ("weight", "bias")))
    if not mlp:
        fused = ((f"single_blocks.{i}.linear1.{kind}", 0) for i in range(singles) for kind in ("weight", "bias"))
        alone = ((f"single_blocks.{i}.proj_mlp.{kind}", 0) for i in range(singles) for kind in ("weight", "bias"))
        mlp = size(shapes, *alone) or (size(shapes, *fused) or 7 * hidden) - 3 * hidden
    qkv = [name for name in shapes if name.startswith("double_blocks.") and "_attn.qkv." in name]
    return FluxParams(
        in_channels=size(shapes, ("img_in.weight", 1)) or flux1.in_channels,
        out_channels=size(shapes, ("final_layer.linear.weight", 0), ("final_layer.linear.bias", 0)) or hidden,
        vec_in_dim=size(shapes, ("vector_in.in_layer.weight", 1)) or flux1.vec_in_dim,
        context_in_dim=size(shapes, ("txt_in.weight", 1)) or flux1.context_in_dim,
        hidden_size=hidden,
        mlp_ratio=ratio(mlp, hidden),
        num_heads=hidden // head,
        depth=depth,
        depth_single_blocks=singles,
        axes_dim=(head // 8, head * 7 // 16, head * 7 // 16),
        theta=flux1.theta,
        qkv_bias=not qkv or any(name.endswith(".bias") for name in qkv),
        guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
    )


def autoencoder_params_from_shapes(shapes: Shapes, where: Path) -> AutoEncoderParams:
    """Return the sizes of an autoencoder with BFL's names. The latents' scale and shift, which no tensor has, are
    FLUX.1's."""
    flux1 = AUTOENCODERS["flux1"]
    with Naming(where):
        return AutoEncoderParams(
            **levels(shapes, where, flux1), scale_factor=flux1.scale_factor, shift_factor=flux1.shift_factor
        )


def lora_aliases(p: FluxParams, known: Mapping[str, list[Where]]) -> dict[str, list[Where]]:
    """Return XLabs' names, of attention processors."""
    found = {}
    for i in range(p.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            for layer in ("qkv", "proj"):
                ours = f"double_blocks.{i}.{stream}_attn.{layer}.weight"
                found[f"double_blocks.{i}.processor.{layer}_lora{number}"] = [Where(ours, None, None)]
    for i in range(p.depth_single_blocks):
        single = f"single_blocks.{i}"
        found[f"{single}.processor.qkv_lora"] = [Where(f"{single}.linear1.weight", (0, 3 * p.hidden_size), None)]
        found[f"{single}.processor.proj_lora"] = [Where(f"{single}.linear2.weight", None, None)]
    return found


_NAMES = {
    r"^x_embedder\.": "img_in.",
    r"^context_embedder\.": "txt_in.",
    r"^proj_out\.": "final_layer.linear.",
    r"^time_text_embed\.timestep_embedder\.linear_2\.": "time_in.out_layer.",
    r"^time_text_embed\.text_embedder\.linear_1\.": "vector_in.in_layer.",
    r"^time_text_embed\.text_embedder\.linear_2\.": "vector_in.out_layer.",
    r"^time_text_embed\.guidance_embedder\.linear_1\.": "guidance_in.in_layer.",
    r"^transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
    r"^transformer_blocks\.(\d+)\.attn\.to_q\.": r"double_blocks.\1.img_attn.qkv.",
    r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.": r"double_blocks.\1.img_mlp.0.",
    r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj\.": r"double_blocks.\1.txt_mlp.0.",
    r"^transformer_blocks\.": "double_blocks.",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
    r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    r"^single_transformer_blocks\.": "single_blocks.",
}
"""BFL's names of Diffusers' tensors, where sizes are read from shapes. The first pattern that matches counts."""

TRANSFORMER = Format(transformer_pieces, transformer_config, transformer_params, transformer_params_from_shapes, _NAMES)
AUTOENCODER = Format(autoencoder_pieces, autoencoder_config, autoencoder_params, autoencoder_params_from_shapes, LEVELS)
