"""How the tensors of FLUX.2 correspond to Diffusers', as `keys.py` has it for FLUX.1."""

from fluxlab.checkpoints.keys import Piece, autoencoder_levels, fused, norms
from fluxlab.model import AutoEncoder2Params, Flux2Params


def transformer2_pieces(p: Flux2Params) -> list[Piece]:
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


def autoencoder2_pieces(p: AutoEncoder2Params) -> list[Piece]:
    """Return how the tensors of BFL's autoencoder and of Diffusers' `AutoencoderKLFlux2` correspond."""
    convolutions = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    pieces = [Piece(f"{o}.{kind}", f"{t}.{kind}") for o, t in convolutions.items() for kind in ("weight", "bias")]
    statistics = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    return [*autoencoder_levels(p), *pieces, *(Piece(name, name) for name in statistics)]
