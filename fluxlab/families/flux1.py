"""FLUX.1: three axes (index, row, col), text without positions, latents packed in patches of 2 × 2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxlab import sampling
from fluxlab.families.family import Architecture, Family, Later, Names
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, AutoEncoder, AutoEncoderParams, Flux, FluxParams

AXES = ("index", "row", "col")


def text_ids(tokens: int) -> Tensor:
    """Zeros. T5's states already contain the order of the words."""
    return sampling.text_ids(1, tokens)[0]


def image_ids(rows: int, cols: int, n: int) -> Tensor:
    """(0, row, col) for the image, and (n, row, col) for reference image n: Kontext's layout, continued."""
    ids = sampling.image_ids(1, rows, cols)[0]
    ids[:, 0] = n
    return ids


def ids(text: int, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Those of the text, of the image and of each reference image. None depends on the others."""
    return [text_ids(text), *(image_ids(*grid, n) for n, grid in enumerate(grids))]


def noise(seeds: Sequence[int], channels: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Drawn as a latent image, then packed, as in Diffusers."""
    return sampling.pack(sampling.noise(seeds, channels, 2 * rows, 2 * cols, dtype))


def pooled(p: FluxParams) -> tuple[int, ...]:
    """CLIP's vector."""
    return (p.vec_in_dim,)


def text_activation_bytes(p: FluxParams, tokens: int, itemsize: int) -> int:
    """T5-XXL: scores of 64 heads in two copies, and three maps of the MLP."""
    return 64 * tokens**2 * (4 + itemsize) + 3 * tokens * 10240 * itemsize


def published_text(name: str) -> dict[str, tuple[int, int]]:
    """CLIP-L and T5 v1.1 XXL, in all models."""
    return {"clip": (123_060_480, 49408 * 768), "t5": (4_762_310_656, 4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096)}


TRANSFORMER = Architecture(
    build=Flux,
    params=FluxParams,
    published=TRANSFORMERS,
    diffusers="FluxTransformer2DModel",
    originals=("flux1-*.safetensors", "flux1-*.sft"),
    names={
        "bfl": Names(
            signs=r"double_blocks\.\d+\.(?:img|txt)_(?:attn|mlp|mod)\.|single_blocks\.\d+\.(?:linear[12]|modulation|norm)\."
            r"|vector_in\.in_layer\.",
            roots=r"(?:double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\.",
        ),
        "diffusers": Names(
            signs=r"(?:single_)?transformer_blocks\.\d+\.|time_text_embed\.",
            roots=r"(?:(?:single_)?transformer_blocks|x_embedder|context_embedder|time_text_embed|norm_out|proj_out)\.",
        ),
    },
)
AUTOENCODER = Architecture(
    build=AutoEncoder,
    params=AutoEncoderParams,
    published={"flux1": AUTOENCODERS["flux1"]},
    diffusers="AutoencoderKL",
    originals=("ae.safetensors", "ae.sft"),
    names={
        "bfl": Names(
            signs=r"encoder\.down\.\d+\.|decoder\.up\.\d+\.|(?:en|de)coder\.mid\.(?:block|attn)_1\.",
            roots=r"(?:encoder|decoder)\.(?:down|up|mid|conv_in|conv_out|norm_out)\.",
        ),
        "diffusers": Names(
            signs=r"encoder\.down_blocks\.\d+\.|decoder\.up_blocks\.\d+\.|(?:en|de)coder\.mid_block\.",
            roots=r"(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out)\.",
        ),
    },
)

FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    transformer=TRANSFORMER,
    autoencoder=AUTOENCODER,
    axes=AXES,
    ids=ids,
    patch=2,
    noise=noise,
    pack=sampling.pack,
    unpack=sampling.unpack,
    guidance=3.5,
    pooled=pooled,
    text_activation_bytes=text_activation_bytes,
    published_text=published_text,
    files=Later("fluxlab.checkpoints.flux1"),
    text_files=Later("fluxlab.checkpoints.text"),
    conditioning=Later("fluxlab.conditioning.encoders"),
    schedules=Later("fluxlab.schedules.flux1"),
    training=Later("fluxlab.training.flux1"),
)
