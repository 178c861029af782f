"""The transformer of FLUX.2 (Black Forest Labs, 2025). Its outputs are tested against those of Diffusers.

Against FLUX.1: four axes of ids (t, h, w, l), modulations that all blocks of a kind share, SwiGLU, no bias, and no
pooled text vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.errors import UserError
from fluxlab.model.attention import Tap
from fluxlab.model.flux2_layers import DoubleStreamBlock2, SingleStreamBlock2
from fluxlab.model.inputs import block_masks, block_tables, check_sizes, per_block
from fluxlab.model.layers import (
    Affine,
    BlockTables,
    LastLayer,
    MLPEmbedder,
    Modulation,
    Modulations,
    timestep_embedding,
)
from fluxlab.model.linear import Linear
from fluxlab.model.rope import Rotary
from fluxlab.model.sites import Site


@dataclass(frozen=True)
class Flux2Params:
    """Sizes of a FLUX.2 transformer, named as in the original release.

    in_channels, out_channels: of a packed token (latent channels × 4).
    context_in_dim: width of the text tokens, three states of the text encoder.
    axes_dim: channels of a head that each axis of the ids rotates. Their sum is hidden_size / num_heads.

    Raises `UserError` for sizes that do not fit together.
    """

    in_channels: int
    out_channels: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: float
    guidance_embed: bool

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        check_sizes(self, "in_channels", "out_channels", "context_in_dim", "hidden_size", "num_heads")


class Flux2(nn.Module):
    """The velocity field of FLUX.2. The names of its parameters are those of the original release."""

    mlp_maps = 4
    """Maps as wide as an MLP that are in memory at once: two before SwiGLU, one after SiLU, and the product."""

    def __init__(self, params: Flux2Params):
        super().__init__()
        p = self.params = params
        self.img_in = Linear(p.in_channels, p.hidden_size, bias=False)
        self.txt_in = Linear(p.context_in_dim, p.hidden_size, bias=False)
        self.time_in = MLPEmbedder(256, p.hidden_size, bias=False)
        if p.guidance_embed:
            self.guidance_in = MLPEmbedder(256, p.hidden_size, bias=False)
        self.double_stream_modulation_img = Modulation(p.hidden_size, double=True, bias=False)
        self.double_stream_modulation_txt = Modulation(p.hidden_size, double=True, bias=False)
        self.single_stream_modulation = Modulation(p.hidden_size, double=False, bias=False)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock2(p.hidden_size, p.num_heads, p.mlp_ratio) for _ in range(p.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock2(p.hidden_size, p.num_heads, p.mlp_ratio) for _ in range(p.depth_single_blocks)
        )
        self.final_layer = LastLayer(p.hidden_size, p.out_channels, bias=False)

    def forward(
        self,
        img: Float[Tensor, "b n c"],
        img_ids: Float[Tensor, "_ n a"] | None,
        txt: Float[Tensor, "b l t"],
        txt_ids: Float[Tensor, "_ l a"] | None,
        timesteps: Float[Tensor, " b"],
        guidance: Float[Tensor, " b"] | None = None,
        *,
        rotary: Rotary | Sequence[BlockTables] | None = None,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        taps: Sequence[Tap | None] | None = None,
        sites: Sequence[Site | None] | None = None,
        modulations: Sequence[Modulations] | None = None,
    ) -> Float[Tensor, "b n o"]:
        """Return the velocity dx/dt of the packed latents `img` at time `timesteps` (1 = noise, 0 = image).

        img: `(B, N, in_channels)`, with reference images behind the image. txt: `(B, L, context_in_dim)`.
        img_ids: `(B or 1, N, A)`, txt_ids: `(B or 1, L, A)`. fp32, or fp64 for an fp64 model. They may be fractional
            and negative.
        timesteps, guidance: `(B,)`. guidance is the distilled guidance strength; other models ignore it.
        rotary, mask, taps, sites: as in `Flux.forward`.
        modulations: those of each block and of the final layer, in place of what timesteps and guidance give.

        Returns `(B, N, out_channels)`. Raises `UserError` for ids of another shape or dtype, missing guidance, and a
        wrong number of tables, masks, taps or sites.
        """
        p, dtype = self.params, self.img_in.weight.dtype
        tables = block_tables(p, img, img_ids, txt, txt_ids, rotary, dtype)
        masks, taps, sites = block_masks(p, mask, dtype), per_block(p, "taps", taps), per_block(p, "sites", sites)
        if modulations is None:
            modulations = self.modulations(self.conditioning(timesteps, guidance))
        inputs = list(zip(modulations[:-1], tables, masks, taps, sites, strict=True))

        img, txt = self.img_in(img), self.txt_in(txt)
        for block, own in zip(self.double_blocks, inputs[: p.depth], strict=True):
            img, txt = block(img, txt, *own)

        joint = torch.cat((txt, img), dim=1)
        for block, own in zip(self.single_blocks, inputs[p.depth :], strict=True):
            joint = block(joint, *own, unread=txt.shape[1] if block is self.single_blocks[-1] else 0)
        return self.final_layer(joint[:, -img.shape[1] :], modulations[-1])

    def conditioning(self, timesteps: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the vector `(B, D)` of time, and of guidance if the model is distilled.

        Raises `UserError` for missing guidance.
        """
        dtype = self.img_in.weight.dtype
        vec = self.time_in(timestep_embedding(timesteps, dtype))
        if not self.params.guidance_embed:
            return vec
        if guidance is None:
            raise UserError("guidance is missing: this model is guidance-distilled; FLUX.2 dev takes 4")
        return vec + self.guidance_in(timestep_embedding(guidance, dtype))

    def modulations(self, vec: Tensor) -> list[Modulations]:
        """Return the adaLN parameters of each block and of the final layer. Blocks of a kind share theirs."""
        double = (*self.double_stream_modulation_img(vec), *self.double_stream_modulation_txt(vec))
        single = tuple(self.single_stream_modulation(vec))
        depths = self.params.depth, self.params.depth_single_blocks
        return [double] * depths[0] + [single] * depths[1] + [self.final_layer.modulations(vec)]

    def text_modulations(self, vec: Tensor, block: int) -> Modulations:
        """Return the two sets of the text stream, which all double blocks share."""
        return tuple(self.double_stream_modulation_txt(vec))

    @staticmethod
    def modulation_layers(p: Flux2Params) -> dict[str, int]:
        """Return the layers that compute modulations, by name, and how many vectors `(D,)` each returns."""
        double = [f"double_stream_modulation_{stream}.lin" for stream in ("img", "txt")]
        return dict.fromkeys(double, 6) | {"single_stream_modulation.lin": 3, "final_layer.adaLN_modulation.1": 2}

    @staticmethod
    def split_modulations(table: Tensor, p: Flux2Params) -> list[Modulations]:
        """Return what `modulations` does from the outputs of `modulation_layers`, side by side in a table `(B, W)`."""
        *parts, shift, scale = table[:, None, :].split(p.hidden_size, dim=-1)
        sets = tuple(Affine(*parts[i : i + 3]) for i in range(0, len(parts), 3))
        return [sets[:4]] * p.depth + [sets[4:]] * p.depth_single_blocks + [(Affine(shift, scale, None),)]
