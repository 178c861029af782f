"""FLUX.2: four axes (t, h, w, l), text in order on l, latents whose pixels are tokens already."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from fluxlab import sampling
from fluxlab.families.family import Architecture, Family, Later, Names
from fluxlab.model import AUTOENCODERS, TRANSFORMERS2, AutoEncoder2, AutoEncoder2Params, Flux2, Flux2Params
from fluxlab.sampling import Schedule

AXES = ("t", "h", "w", "l")
REFERENCE_STEP = 10
"""Distance of the images on t: the references are at 10, 20, 30, …"""


@dataclass(frozen=True)
class Schedule2(Schedule):
    """FLUX.2's schedule: with `use_dynamic_shifting`, μ follows a fit in image tokens and steps, not the shifts."""

    def mu(self, num_steps: int, image_seq_len: int) -> float:
        """Return μ: linear in tokens at 10 and at 200 steps, and linear in steps between. Above 4300 tokens that of 200
        steps holds for all.
        """
        at_200 = 0.00016927 * image_seq_len + 0.45666666
        if image_seq_len > 4300:
            return at_200
        at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
        return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)

    def describe(self) -> str:
        return "times shifted by image size and steps" if self.use_dynamic_shifting else super().describe()


SCHEDULE = Schedule2(shift=3.0)


def text_ids(tokens: int) -> Tensor:
    """(0, 0, 0, i) for text token i."""
    ids = torch.zeros(tokens, len(AXES), dtype=torch.float32)  # not the default dtype, which may be bf16
    ids[:, 3] = torch.arange(tokens)
    return ids


def image_ids(rows: int, cols: int, n: int) -> Tensor:
    """(0, row, col, 0) for the image, and (10·n, row, col, 0) for reference image n, counted from 1."""
    ids = sampling.image_ids(1, rows, cols, len(AXES))[0]
    ids[:, 0] = REFERENCE_STEP * n
    return ids


def ids(text: int, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Those of the text, of the image and of each reference image. None depends on the others."""
    return [text_ids(text), *(image_ids(*grid, n) for n, grid in enumerate(grids))]


def noise(seeds: Sequence[int], channels: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Drawn with a token's channels on the token grid, as in Diffusers."""
    return pack(sampling.noise(seeds, 4 * channels, rows, cols, dtype))


def pack(latents: Tensor) -> Tensor:
    """Return the pixels of normalised patches `(B, C, rows, cols)` as tokens, row by row."""
    return rearrange(latents, "b c h w -> b (h w) c")


def unpack(tokens: Tensor, rows: int, cols: int) -> Tensor:
    """Return the patches of tokens: the inverse of `pack`."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=rows, w=cols)


def pooled(p: Flux2Params) -> tuple[int, ...]:
    """Nothing."""
    return ()


def text_activation_bytes(p: Flux2Params, tokens: int, itemsize: int) -> int:
    """The states of 40 layers, three maps of an MLP of at most 6.4 widths, and what attention takes."""
    return 67 * tokens * p.context_in_dim // 3 * itemsize


def published_text(name: str) -> dict[str, tuple[int, int]]:
    """Qwen3 or Mistral Small 3. The embeddings are the largest layer."""
    qwen3_4b, qwen3_8b = (4_022_468_096, 151936 * 2560), (8_190_735_360, 151936 * 4096)
    if name == "flux2dev":
        return {"mistral3": (24_011_361_280, 131072 * 5120)}
    return {"qwen3": qwen3_8b if name == "klein9b" else qwen3_4b}


_SHARED = r"double_stream_modulation_(?:img|txt)|single_stream_modulation"
TRANSFORMER = Architecture(
    build=Flux2,
    params=Flux2Params,
    published=TRANSFORMERS2,
    diffusers="Flux2Transformer2DModel",
    originals=("flux[-.]2-*.safetensors", "flux2-*.safetensors"),
    names={
        "bfl": Names(
            signs=r"double_blocks\.\d+\.(?:img|txt)_(?:attn|mlp)\.|single_blocks\.\d+\.(?:linear[12]|norm)\.",
            roots=rf"(?:double_blocks|single_blocks|img_in|txt_in|time_in|guidance_in|final_layer|{_SHARED})\.",
        ),
        "diffusers": Names(
            signs=r"(?:single_)?transformer_blocks\.\d+\.|time_guidance_embed\.",
            roots=r"(?:(?:single_)?transformer_blocks|x_embedder|context_embedder|norm_out|proj_out|time_guidance_embed"
            rf"|{_SHARED})\.",
        ),
    },
    only=re.compile(rf"(?:{_SHARED}|time_guidance_embed)\."),
)
AUTOENCODER = Architecture(
    build=AutoEncoder2,
    params=AutoEncoder2Params,
    published={"flux2": AUTOENCODERS["flux2"]},
    diffusers="AutoencoderKLFlux2",
    originals=("ae.safetensors", "ae.sft"),
    names={
        "bfl": Names(
            signs=r"encoder\.down\.\d+\.|decoder\.up\.\d+\.|(?:en|de)coder\.mid\.(?:block|attn)_1\.",
            roots=r"(?:encoder|decoder)\.(?:down|up|mid|conv_in|conv_out|norm_out|quant_conv|post_quant_conv)\.|bn\.",
        ),
        "diffusers": Names(
            signs=r"encoder\.down_blocks\.\d+\.|decoder\.up_blocks\.\d+\.|(?:en|de)coder\.mid_block\.",
            roots=r"(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out)\."
            r"|(?:post_)?quant_conv\.|bn\.",
        ),
    },
    only=re.compile(r"bn\.running_(?:mean|var)$"),
    unusual=re.compile(r"(?:^|\.)(?:post_)?quant_conv\."),
)

FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    transformer=TRANSFORMER,
    autoencoder=AUTOENCODER,
    axes=AXES,
    ids=ids,
    patch=2,
    noise=noise,
    pack=pack,
    unpack=unpack,
    guidance=4.0,
    pooled=pooled,
    text_activation_bytes=text_activation_bytes,
    published_text=published_text,
    files=Later("fluxlab.checkpoints.flux2"),
    text_files=Later("fluxlab.checkpoints.text2"),
    conditioning=Later("fluxlab.conditioning.language_model"),
    schedules=Later("fluxlab.schedules.flux2"),
    training=Later("fluxlab.training.flux2"),
)
