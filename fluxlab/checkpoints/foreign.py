"""Files that are often taken for FLUX.1's weights and are not: how they are recognised, and what to use instead."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.families import FAMILIES

_FULL = "get the model's bfloat16, float16, float32 or plain float8 safetensors"
_FLUX1 = "pass a FLUX.1 checkpoint (flux1-dev.safetensors, a Diffusers folder, …)"


class _Sign(NamedTuple):
    """name: a pattern that only names of this kind match. what, remedy: for the message."""

    name: str
    what: str
    remedy: str


# The first match counts: quantised and adapter files also hold names of the model that they were made from.
_SIGNS = (
    _Sign(
        r"\.quant_state\.bitsandbytes__|\.(?:absmax|quant_map|nested_absmax|nested_quant_map)$|\.SCB$",
        "quantised weights, which are not supported (bitsandbytes, such as nf4)",
        _FULL,
    ),
    _Sign(
        r"(?:^|\.)scaled_fp8$|\.(?:scale_weight|scale_input|weight_scale|input_scale|weight_scale_inv|weight_scale_2|comfy_quant)$",
        "quantised weights, which are not supported (scaled float8: each weight has a scale of its own)",
        _FULL,
    ),
    _Sign(
        r"\.(?:qweight|qzeros|wscales|wzeros|smooth_factor|encoded_exponent|sign_mantissa|weight\._data|weight\._scale)$",
        "quantised weights, which are not supported (GPTQ, SVDQuant, DFloat11, quanto or a similar format)",
        _FULL,
    ),
    _Sign(
        r"(?:^|[._])(?:lora_(?:A|B|up|down|mid|unet|te\d?|transformer)|lokr_w\d|hada_w\d|dora_scale|oft_blocks|diff_b)"
        r"(?:[._]|$)",
        "a LoRA, not a whole model",
        "pass the model that it was trained for, and this file as lora",
    ),
    _Sign(
        r"(?:^|\.)(?:controlnet_(?:single_)?blocks|controlnet_x_embedder|controlnet_mode_embedder|input_hint_block"
        r"|control_model)\.",
        "a ControlNet, not a whole model",
        "pass the FLUX.1 model that it steers; ControlNets are not supported",
    ),
    _Sign(r"(?:^|\.)redux_(?:up|down)\.", "FLUX.1 Redux, an image adapter, not a whole model", _FLUX1),
    _Sign(
        r"(?:^|\.)(?:ip_adapter\w*|image_proj(?:_model)?|double_blocks\.\d+\.processor|pulid_\w+|id_adapter)\.",
        "an image adapter (IP-Adapter, PuLID), not a whole model",
        _FLUX1,
    ),
    _Sign(
        r"(?:^|\.)distilled_guidance_layer\.",
        "Chroma, which has another architecture than FLUX.1 and is not supported",
        _FLUX1,
    ),
    _Sign(
        r"(?:^|\.)transformer_blocks\.\d+\.(?:img|txt)_(?:mod|mlp)\.|(?:^|\.)txt_norm\.weight$",
        "Qwen-Image's transformer, not FLUX.1's",
        _FLUX1,
    ),
    _Sign(
        r"(?:^|\.)(?:individual_token_refiner|joint_blocks|joint_transformer_blocks|double_stream_blocks|double_layers"
        r"|adaln_single|patchify_proj|patch_embedding|noise_refiner|context_refiner|cap_embedder|pos_embed|nerf_\w+)\."
        r"|(?:^|\.)img_attn_qkv\.|(?:^|\.)blocks\.\d+\.(?:self_attn|cross_attn|adaln_\w+)\.",
        "the transformer of another model family (Stable Diffusion 3, HunyuanVideo, Wan, Z-Image, …), not FLUX.1's",
        _FLUX1,
    ),
    _Sign(
        r"(?:^|\.)(?:input_blocks|output_blocks|middle_block|down_blocks\.\d+\.attentions)\.",
        "a Stable Diffusion U-Net, not FLUX.1",
        _FLUX1,
    ),
    _Sign(
        r"(?:^|\.)(?:post_)?quant_conv\.",
        "an autoencoder of another model family (Stable Diffusion's, by its quant_conv), which FLUX.1 cannot use",
        "pass FLUX.1's ae.safetensors",
    ),
    _Sign(
        r"(?:^|\.|_)(?:encoder|decoder)\.(?:layers\.)?\d+\.(?:conv|weight|bias|skip|fuse)"
        r"|(?:^|\.)(?:en|de)coder\.(?:middle|upsamples|downsamples)\.|(?:^|\.)time_conv\.",
        "an autoencoder of another kind (a tiny preview decoder, or a video model's), which FLUX.1 cannot use",
        "pass FLUX.1's ae.safetensors",
    ),
    _Sign(
        r"(?:^|\.)transformer\.resblocks\.\d+\.",
        "a CLIP in OpenCLIP's names",
        "pass clip_l.safetensors or another CLIP-L in transformers' names",
    ),
    _Sign(
        r"(?:^|\.)(?:model|language_model)\.layers\.\d+\.(?:self_attn|mlp|input_layernorm)\.",
        "a language model (Qwen, Mistral, Llama, …), which FLUX.1 does not use",
        "pass CLIP-L and T5 v1.1 XXL as text encoders",
    ),
    _Sign(
        r"(?:^|\.)encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        "UMT5, which FLUX.1 does not use",
        "pass T5 v1.1 XXL (t5xxl_fp16.safetensors)",
    ),
)


def check_foreign(shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raise `CheckpointError`, of one line, for a file of a known kind that is not part of FLUX.1."""
    names = [name for name in shapes if not re.search(r"(?:^|\.)(?:vision_model|visual_projection|visual)\.", name)]
    for family in FAMILIES.values():
        for known in family.networks.values():
            if known.unusual and any(re.search(rf"(?:^|\.)(?:{known.only.pattern})", name) for name in names):
                names = [name for name in names if not known.unusual.search(name)]
    for sign in _SIGNS:
        if any(re.search(sign.name, name) for name in names):
            raise CheckpointError(f"{where}: {sign.what}; {sign.remedy}")
    if shapes and not names:
        raise CheckpointError(f"{where}: an image encoder (CLIP or SigLIP vision), which FLUX.1 does not use; {_FLUX1}")
