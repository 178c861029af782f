"""The sizes of the published models."""

from dataclasses import replace

from fluxlab.model.autoencoder import AutoEncoderParams
from fluxlab.model.autoencoder2 import AutoEncoder2Params
from fluxlab.model.flux import FluxParams
from fluxlab.model.flux2 import Flux2Params

_DEV = FluxParams(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10000,
    qkv_bias=True,
    guidance_embed=True,
)

_DEV2 = Flux2Params(
    in_channels=128,
    out_channels=128,
    context_in_dim=15360,
    hidden_size=6144,
    mlp_ratio=3.0,
    num_heads=48,
    depth=8,
    depth_single_blocks=48,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    guidance_embed=True,
)
_KLEIN = replace(_DEV2, guidance_embed=False)
_KLEIN4B = replace(_KLEIN, context_in_dim=7680, hidden_size=3072, num_heads=24, depth=5, depth_single_blocks=20)

TRANSFORMERS: dict[str, FluxParams] = {
    "dev": _DEV,
    "schnell": replace(_DEV, guidance_embed=False),
    "krea": _DEV,
    "kontext": _DEV,
    "fill": replace(_DEV, in_channels=384),  # latents, latents of the masked image, mask: 64 + 64 + 256
    "canny": replace(_DEV, in_channels=128),  # latents, and latents of the condition
    "depth": replace(_DEV, in_channels=128),
}

TRANSFORMERS2: dict[str, Flux2Params] = {
    "flux2dev": _DEV2,
    "klein4b": _KLEIN4B,
    "klein4b_base": _KLEIN4B,
    "klein9b": replace(_KLEIN, context_in_dim=12288, hidden_size=4096, num_heads=32, depth_single_blocks=24),
}

AUTOENCODERS: dict[str, AutoEncoderParams | AutoEncoder2Params] = {
    "flux1": AutoEncoderParams(
        resolution=256,
        in_channels=3,
        ch=128,
        out_ch=3,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=16,
        scale_factor=0.3611,
        shift_factor=0.1159,
    ),
    "flux2": AutoEncoder2Params(
        resolution=256, in_channels=3, ch=128, out_ch=3, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=32
    ),
}
