"""The sizes of the published FLUX.1 models."""

from dataclasses import replace

from fluxlab.model.autoencoder import AutoEncoderParams
from fluxlab.model.flux import FluxParams

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

TRANSFORMERS: dict[str, FluxParams] = {
    "dev": _DEV,
    "schnell": replace(_DEV, guidance_embed=False),
    "krea": _DEV,
    "kontext": _DEV,
    "fill": replace(_DEV, in_channels=384),  # latents, latents of the masked image, mask: 64 + 64 + 256
    "canny": replace(_DEV, in_channels=128),  # latents, and latents of the condition
    "depth": replace(_DEV, in_channels=128),
}

AUTOENCODERS: dict[str, AutoEncoderParams] = {
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
}
