"""The transformer of FLUX.1 (Black Forest Labs, 2024). Its outputs are tested against those of the original release."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.errors import UserError
from fluxlab.model.attention import Tap
from fluxlab.model.inputs import block_masks, block_tables, check_sizes, per_block
from fluxlab.model.layers import (
    Affine,
    BlockTables,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulations,
    SingleStreamBlock,
    timestep_embedding,
)
from fluxlab.model.linear import Linear
from fluxlab.model.rope import Rotary
from fluxlab.model.sites import Site


@dataclass(frozen=True)
class FluxParams:
    """Sizes of a FLUX transformer, named as in the original release.

    in_channels, out_channels: of a packed token (latent channels × 4).
    vec_in_dim: width of the pooled text. context_in_dim: width of the text tokens.
    axes_dim: channels of a head that each axis of the ids rotates. Their sum is hidden_size / num_heads.

    Raises `UserError` for sizes that do not fit together.
    """

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: float
    qkv_bias: bool
    guidance_embed: bool

    def __post_init__(self):
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        check_sizes(self, "in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads")


class Flux(nn.Module):
    """The velocity field of FLUX.1. The names of its parameters are those of the original release."""

    mlp_maps = 2
    """Maps as wide as an MLP that are in memory at once: before and after GELU."""

    def __init__(self, params: FluxParams):
        super().__init__()
        p = self.params = params
        self.img_in = Linear(p.in_channels, p.hidden_size)
        self.txt_in = Linear(p.context_in_dim, p.hidden_size)
        self.time_in = MLPEmbedder(256, p.hidden_size)
        self.vector_in = MLPEmbedder(p.vec_in_dim, p.hidden_size)
        if p.guidance_embed:
            self.guidance_in = MLPEmbedder(256, p.hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(p.hidden_size, p.num_heads, p.mlp_ratio, p.qkv_bias) for _ in range(p.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(p.hidden_size, p.num_heads, p.mlp_ratio) for _ in range(p.depth_single_blocks)
        )
        self.final_layer = LastLayer(p.hidden_size, p.out_channels)

    def forward(
        self,
        img: Float[Tensor, "b n c"],
        img_ids: Float[Tensor, "_ n a"] | None,
        txt: Float[Tensor, "b l t"],
        txt_ids: Float[Tensor, "_ l a"] | None,
        timesteps: Float[Tensor, " b"],
        y: Float[Tensor, "b v"],
        guidance: Float[Tensor, " b"] | None = None,
        *,
        rotary: Rotary | Sequence[BlockTables] | None = None,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        taps: Sequence[Tap | None] | None = None,
        sites: Sequence[Site | None] | None = None,
        modulations: Sequence[Modulations] | None = None,
    ) -> Float[Tensor, "b n o"]:
        """Return the velocity dx/dt of the packed latents `img` at time `timesteps` (1 = noise, 0 = image).

        img: `(B, N, in_channels)`. txt: `(B, L, context_in_dim)`. y: `(B, vec_in_dim)`, the pooled text.
        img_ids: `(B or 1, N, A)`, txt_ids: `(B or 1, L, A)`. fp32, or fp64 for an fp64 model. They may be fractional
            and negative.
        timesteps, guidance: `(B,)`. guidance is the distilled guidance strength; other models ignore it.
        rotary: tables in place of the ids, which are then None. One table for the whole model, or a pair of tables
            (queries, keys) per block, double blocks first. A table covers text, then image, and broadcasts over batch
            and heads. For the keys, `KeyGroups` hold one table per group of queries.
        mask: one for the whole model or one per block. Boolean (True = attend) or additive, broadcasts to
            `(B, H, L + N, L + N)`.
        taps: one per block, or None. They observe attention (`fluxlab.probes`).
        sites: one per block, or None. They read or change activations inside the block (`fluxlab.model.sites`).
        modulations: those of each block and of the final layer, in place of what timesteps, y and guidance give.

        Returns `(B, N, out_channels)`. Raises `UserError` for ids of another shape or dtype, missing guidance, and a
        wrong number of tables, masks, taps or sites.
        """
        p, dtype = self.params, self.img_in.weight.dtype
        tables = block_tables(p, img, img_ids, txt, txt_ids, rotary, dtype)
        masks, taps, sites = block_masks(p, mask, dtype), per_block(p, "taps", taps), per_block(p, "sites", sites)
        if modulations is None:
            modulations = [self.conditioning(timesteps, y, guidance)] * (len(taps) + 1)
        inputs = list(zip(modulations[:-1], tables, masks, taps, sites, strict=True))

        img, txt = self.img_in(img), self.txt_in(txt)
        for block, own in zip(self.double_blocks, inputs[: p.depth], strict=True):
            img, txt = block(img, txt, *own)

        joint = torch.cat((txt, img), dim=1)
        for block, own in zip(self.single_blocks, inputs[p.depth :], strict=True):
            joint = block(joint, *own, unread=txt.shape[1] if block is self.single_blocks[-1] else 0)
        return self.final_layer(joint[:, -img.shape[1] :], modulations[-1])

    def conditioning(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the vector `(B, D)` of time, guidance (if the model is distilled) and pooled text.

        All modulations are computed from it. Raises `UserError` for missing guidance.
        """
        dtype = self.img_in.weight.dtype
        vec = self.time_in(timestep_embedding(timesteps, dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise UserError("guidance is missing: this model is guidance-distilled; FLUX.1 dev takes 3.5")
            vec = vec + self.guidance_in(timestep_embedding(guidance, dtype))
        return vec + self.vector_in(y)

    def modulations(self, vec: Tensor) -> list[Modulations]:
        """Return the adaLN parameters of each block and of the final layer, as `forward` takes them."""
        return [part.modulations(vec) for part in (*self.double_blocks, *self.single_blocks, self.final_layer)]

    def text_modulations(self, vec: Tensor, block: int) -> Modulations:
        """Return the two sets of a double block's text stream."""
        return tuple(self.double_blocks[block].txt_mod(vec))

    @staticmethod
    def modulation_layers(p: FluxParams) -> dict[str, int]:
        """Return the layers that compute modulations, by name, and how many vectors `(D,)` each returns."""
        double = [f"double_blocks.{i}.{stream}_mod.lin" for i in range(p.depth) for stream in ("img", "txt")]
        single = [f"single_blocks.{i}.modulation.lin" for i in range(p.depth_single_blocks)]
        return dict.fromkeys(double, 6) | dict.fromkeys(single, 3) | {"final_layer.adaLN_modulation.1": 2}

    @staticmethod
    def split_modulations(table: Tensor, p: FluxParams) -> list[Modulations]:
        """Return what `modulations` does from the outputs of `modulation_layers`, side by side in a table `(B, W)`."""
        parts = table[:, None, :].split(p.hidden_size, dim=-1)
        sets = [Affine(*parts[i : i + 3]) for i in range(0, len(parts) - 2, 3)]
        double = [tuple(sets[4 * i : 4 * i + 4]) for i in range(p.depth)]
        return [*double, *((affine,) for affine in sets[4 * p.depth :]), (Affine(*parts[-2:], None),)]
