"""The transformer of FLUX.1 (Black Forest Labs, 2024). Its outputs are tested against those of the original release."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxlab.errors import UserError
from fluxlab.model.attention import Tap, additive_mask
from fluxlab.model.groups import KeyGroups
from fluxlab.model.layers import (
    BlockTables,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulations,
    SingleStreamBlock,
    timestep_embedding,
)
from fluxlab.model.rope import Rotary, check_ids, rotary_table
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
        for name in ("in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        head = self.hidden_size // self.num_heads
        if sum(self.axes_dim) != head or any(dim % 2 or dim < 2 for dim in self.axes_dim):
            raise UserError(
                f"axes_dim {self.axes_dim}: expected even numbers that add up to the width of a head, {head}"
            )


class Flux(nn.Module):
    """The velocity field of FLUX.1. The names of its parameters are those of the original release."""

    def __init__(self, params: FluxParams):
        super().__init__()
        p = self.params = params
        self.img_in = nn.Linear(p.in_channels, p.hidden_size)
        self.txt_in = nn.Linear(p.context_in_dim, p.hidden_size)
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
        tables = self._tables(img, img_ids, txt, txt_ids, rotary)
        masks, taps, sites = self._masks(mask), self._per_block("taps", taps), self._per_block("sites", sites)
        if modulations is None:
            modulations = [self.conditioning(timesteps, y, guidance)] * (len(taps) + 1)
        per_block = list(zip(modulations[:-1], tables, masks, taps, sites, strict=True))

        img, txt = self.img_in(img), self.txt_in(txt)
        for block, inputs in zip(self.double_blocks, per_block[: self.params.depth], strict=True):
            img, txt = block(img, txt, *inputs)

        joint = torch.cat((txt, img), dim=1)
        for block, inputs in zip(self.single_blocks, per_block[self.params.depth :], strict=True):
            joint = block(joint, *inputs)
        return self.final_layer(joint[:, txt.shape[1] :], modulations[-1])

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

    def _per_block(self, name: str, values: Sequence | None) -> Sequence:
        """Return one value per block: `values`, or None for every block."""
        blocks = self.params.depth + self.params.depth_single_blocks
        if values is not None and len(values) != blocks:
            raise UserError(f"{name} has {len(values)} entries, the model has {blocks} blocks")
        return [None] * blocks if values is None else values

    def _masks(self, mask: Tensor | Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
        """Return one additive mask per block, in the model's dtype. Equal tensors stay one tensor."""
        blocks, dtype = self.params.depth + self.params.depth_single_blocks, self.img_in.weight.dtype
        if mask is None or isinstance(mask, Tensor):
            return [mask if mask is None else additive_mask(mask, dtype)] * blocks
        if len(mask) != blocks:
            raise UserError(f"mask has {len(mask)} entries, the model has {blocks} blocks")
        converted = {id(part): additive_mask(part, dtype) for part in mask if part is not None}
        return [converted.get(id(part)) for part in mask]

    def _tables(
        self,
        img: Tensor,
        img_ids: Tensor | None,
        txt: Tensor,
        txt_ids: Tensor | None,
        rotary: Rotary | Sequence[BlockTables] | None,
    ) -> Sequence[BlockTables]:
        """Return a (queries, keys) pair of rotary tables per block, from the ids or from `rotary`."""
        p = self.params
        blocks = p.depth + p.depth_single_blocks
        if rotary is None:
            if img_ids is None or txt_ids is None:
                raise UserError("img_ids and txt_ids are needed without rotary tables")
            dtype = torch.float64 if self.img_in.weight.dtype == torch.float64 else torch.float32
            for name, ids, tokens in (("img_ids", img_ids, img), ("txt_ids", txt_ids, txt)):
                check_ids(name, ids, batch=len(img), tokens=tokens.shape[1], axes=len(p.axes_dim), dtype=dtype)
            batch = max(len(img_ids), len(txt_ids))
            ids = torch.cat((txt_ids.expand(batch, -1, -1), img_ids.expand(batch, -1, -1)), dim=1)
            rotary = rotary_table(ids, p.axes_dim, p.theta)
        elif img_ids is not None or txt_ids is not None:
            raise UserError("rotary tables replace img_ids and txt_ids: pass one or the other")
        pairs = [(rotary, rotary)] * blocks if isinstance(rotary, Rotary) else rotary
        if len(pairs) != blocks:
            raise UserError(f"rotary has {len(pairs)} pairs of tables, the model has {blocks} blocks")
        changes = [pair for before, pair in zip([None, *pairs], pairs, strict=False) if pair is not before]
        self._check_tables(changes, batch=len(img), tokens=txt.shape[1] + img.shape[1])
        return pairs

    def _check_tables(self, pairs: Sequence[BlockTables], batch: int, tokens: int) -> None:
        """Raise `UserError` for a table that does not fit this model and input."""
        p = self.params
        dtype = torch.float64 if self.img_in.weight.dtype == torch.float64 else torch.float32
        width = p.hidden_size // p.num_heads // 2
        sides = [side for pair in pairs for side in (pair if isinstance(pair, tuple) else (pair,))]
        for table in [t for side in sides for t in (side.tables if isinstance(side, KeyGroups) else (side,))]:
            if not isinstance(table, Rotary):
                raise UserError(
                    f"rotary holds a {type(table).__name__}: expected a Rotary, or a pair of them per block"
                )
            for x in table:
                fits = x.ndim == 4 and x.shape[0] in (1, batch) and x.shape[1] in (1, p.num_heads)
                if not fits or x.shape[2:] != (tokens, width) or x.dtype != dtype:
                    raise UserError(
                        f"rotary table of shape {tuple(x.shape)} and {x.dtype}: expected ({batch} or 1, "
                        f"{p.num_heads} or 1, {tokens}, {width}) and {dtype}"
                    )
