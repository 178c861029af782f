"""The blocks of FLUX.1. The attribute names are those of the original release, so that its state dict loads directly.

B is the batch size, L a sequence length, D the hidden size, H the number of heads, d = D/H the width of a head.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxlab.model.attention import Tap
from fluxlab.model.groups import KeyGroups
from fluxlab.model.linear import JoinedLinear, Linear, LinearGELU, ParallelLinear
from fluxlab.model.norm_rotate import norm_and_rotate
from fluxlab.model.rope import Rotary, apply_rotary
from fluxlab.model.sites import Site, at
from fluxlab.model.varied import Keys, joint_attention, plain_keys

BlockTables = tuple[Rotary, Keys]
"""The rotary tables of one block: for the queries, and for the keys (one table, or one per group of queries).

`Varied` keys also say how some samples of the batch attend."""


# The exponents are fp32, as in both reference implementations: fp64 exponents would move the sinusoids by 6e-5 rad at
# t = 1. Their exponential is computed in fp64 and rounded. An fp32 exp differs in the last bit between processors and
# under inductor, and guidance 7 multiplies that bit by 7000.
_EXPONENTS = -math.log(10000.0) * torch.arange(128, dtype=torch.float32, device="cpu") / 128
TIMESTEP_FREQUENCIES = torch.exp(_EXPONENTS.double()).float()
_ON_DEVICE: dict[torch.device, Tensor] = {}  # a copy per device: copying at each call would wait for the device


def timestep_embedding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sinusoids of 1000·t, cos before sin: `(B,)` → `(B, 256)` in `dtype`. Computed in t's fp32 or fp64."""
    if t.device not in _ON_DEVICE:
        _ON_DEVICE[t.device] = TIMESTEP_FREQUENCIES.to(t.device)
    args = (1000.0 * t)[:, None] * _ON_DEVICE[t.device].to(t.dtype)
    return torch.cat((args.cos(), args.sin()), dim=-1).to(dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, bias: bool = True):
        super().__init__()
        self.in_layer = Linear(in_dim, hidden_dim, bias)
        self.out_layer = Linear(hidden_dim, hidden_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class SelfAttention(nn.Module):
    """The projections of one stream. The attention itself is joint, and part of the block."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = Linear(dim, dim, bias)


class Affine(NamedTuple):
    """The parameters of one adaLN modulation, each `(B, 1, D)`: scale and shift of LN(x), and gate of the result."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None


Modulations = tuple[Affine, ...]
"""All adaLN parameters of one block, in the order in which it uses them."""


class Modulation(nn.Module):
    """adaLN parameters from `vec` `(B, D)`: two sets for a double block, one for a single block."""

    def __init__(self, dim: int, double: bool, bias: bool = True):
        super().__init__()
        self.multiplier = 6 if double else 3
        self.lin = Linear(dim, self.multiplier * dim, bias)

    def forward(self, vec: Tensor) -> list[Affine]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(self.multiplier, dim=-1)
        return [Affine(*parts[i : i + 3]) for i in range(0, self.multiplier, 3)]


def clip_fp16(x: Tensor) -> Tensor:
    """Clip fp16 values to the finite range. Other dtypes have a wider range and are returned as they are."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) · LN(x) + shift."""
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=1e-6))


def mlp(dim: int, hidden: int) -> nn.Sequential:
    """Return the MLP. The first layer includes the GELU; `Identity` takes its place and keeps the original's names."""
    return nn.Sequential(LinearGELU(dim, hidden), nn.Identity(), Linear(hidden, dim))


def query_key_value(
    qkvs: Sequence[Tensor], norms: Sequence[QKNorm], num_heads: int, tables: BlockTables
) -> tuple[Tensor, Tensor, Tensor]:
    """Return joint q, k and v, each `(B, H, N, d)`, from the fused projections `(B, L, 3·D)` of one or more streams.

    q and k are normalised and rotated. They are in the dtype of the tables, which is fp32 unless the model is fp64.
    Keys that groups of queries see at different positions are rotated later, by each group.
    """
    q_table, k_table = tables[0], plain_keys(tables[1])
    k_table = k_table.identity if isinstance(k_table, KeyGroups) else k_table
    parts = [qkv.view(*qkv.shape[:2], 3, num_heads, -1) for qkv in qkvs]  # (B, L, 3, H, d)
    if torch.is_grad_enabled():
        joint = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        lengths = [part.shape[1] for part in parts]
        q = torch.cat([n.query_norm(x) for n, x in zip(norms, q.split(lengths, dim=2), strict=True)], dim=2)
        k = torch.cat([n.key_norm(x) for n, x in zip(norms, k.split(lengths, dim=2), strict=True)], dim=2)
        return apply_rotary(q, q_table), apply_rotary(k, k_table), v
    v = parts[0][:, :, 2] if len(parts) == 1 else torch.cat([part[:, :, 2] for part in parts], dim=1)
    scales = [(norm.query_norm.scale, norm.key_norm.scale) for norm in norms]
    q, k = norm_and_rotate(parts, scales, q_table, k_table)
    return q, k, v.transpose(1, 2)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Keys,
    mask: Tensor | None,
    tap: Tap | None,
    site: Site | None,
) -> Tensor:
    """Return a block's attention `(B, H, N, d)`, between the sites that it has."""
    if site is None:
        return joint_attention(q, k, v, keys, mask, tap)
    q, k, v = site("queries", q), site("keys", k), site("values", v)
    return site("attention", site.attend(q, k, v, keys, mask, tap))


class DoubleStreamBlock(nn.Module):
    """Image and text with separate weights and one joint attention (MM-DiT, arXiv 2403.03206)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__()
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.img_mod = Modulation(hidden_size, double=True)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_mlp = mlp(hidden_size, mlp_hidden)
        self.txt_mod = Modulation(hidden_size, double=True)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_mlp = mlp(hidden_size, mlp_hidden)

    def modulations(self, vec: Tensor) -> Modulations:
        """Return what `forward` takes in place of `vec` `(B, D)`: two sets for the image, then two for the text."""
        return (*self.img_mod(vec), *self.txt_mod(vec))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor | Modulations,
        tables: BlockTables,
        mask: Tensor | None,
        tap: Tap | None = None,
        site: Site | None = None,
    ) -> tuple[Tensor, Tensor]:
        mods = self.modulations(vec) if isinstance(vec, Tensor) else vec
        txt, img = at(site, "input", txt, img)
        norms = (self.txt_attn.norm, self.img_attn.norm)
        q, k, v = query_key_value(self.project(img, txt, mods), norms, self.img_attn.num_heads, tables)
        joint = block_attention(q, k, v, tables[1], mask, tap, site).transpose(1, 2).flatten(2)
        update = self.update if site is None else partial(type(self).update, self, site=site)
        img, txt = update(img, txt, joint, mods)
        txt, img = at(site, "residual", txt, img)
        return img, txt

    def project(self, img: Tensor, txt: Tensor, mods: Modulations) -> tuple[Tensor, Tensor]:
        """Return the queries, keys and values of text and image, each `(B, L, 3·D)`."""
        img_qkv = self.img_attn.qkv(modulate(img, mods[0].shift, mods[0].scale))
        txt_qkv = self.txt_attn.qkv(modulate(txt, mods[2].shift, mods[2].scale))
        return txt_qkv, img_qkv

    def update(
        self, img: Tensor, txt: Tensor, joint: Tensor, mods: Modulations, site: Site | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return image and text after the block, from its attention `joint` `(B, L, D)`, text first."""
        img_mod1, img_mod2, txt_mod1, txt_mod2 = mods
        txt_joint, img_joint = joint.split((txt.shape[1], img.shape[1]), dim=1)
        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_joint))
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_joint))
        img_mlp = self.img_mlp(modulate(img, img_mod2.shift, img_mod2.scale))
        txt_mlp = self.txt_mlp(modulate(txt, txt_mod2.shift, txt_mod2.scale))
        txt_mlp, img_mlp = at(site, "mlp", txt_mlp, img_mlp)
        img = torch.addcmul(img, img_mod2.gate, img_mlp)
        return img, clip_fp16(torch.addcmul(txt, txt_mod2.gate, txt_mlp))


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence, attention and MLP in parallel (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.linear1 = ParallelLinear(hidden_size, 3 * hidden_size, mlp_hidden)
        self.linear2 = JoinedLinear(hidden_size + mlp_hidden, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, double=False)

    def modulations(self, vec: Tensor) -> Modulations:
        """Return what `forward` takes in place of `vec` `(B, D)`."""
        return tuple(self.modulation(vec))

    def forward(
        self,
        x: Tensor,
        vec: Tensor | Modulations,
        tables: BlockTables,
        mask: Tensor | None,
        tap: Tap | None = None,
        site: Site | None = None,
        unread: int = 0,
    ) -> Tensor:
        """Return the sequence after the block.

        unread: the first tokens, if nobody reads what they become. Compiled code leaves them out unless something
        observes or changes the block. Elsewhere the last bits of the other tokens would depend on what observes it.
        Of several samples it would have to copy the rest.
        """
        plain = mask is None and tap is None and site is None and isinstance(tables[1], Rotary)
        first = unread if torch.compiler.is_compiling() and plain and x.shape[0] == 1 else 0
        mods = self.modulations(vec) if isinstance(vec, Tensor) else vec
        (x,) = at(site, "input", x)
        qkv, mlp = self.project(x, mods, first)
        q, k, v = query_key_value((qkv,), (self.norm,), self.num_heads, tables)
        attn = block_attention(q[:, :, first:], k, v, tables[1], mask, tap, site).transpose(1, 2).flatten(2)
        (mlp,) = at(site, "mlp", mlp)
        return at(site, "residual", self.update(x[:, first:], attn, mlp, mods))[0]

    def project(self, x: Tensor, mods: Modulations, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return queries, keys and values `(B, L, 3·D)`, and the MLP after its GELU for tokens from `first` on."""
        return self.linear1(modulate(x, mods[0].shift, mods[0].scale), first)

    def update(self, x: Tensor, attention: Tensor, mlp: Tensor, mods: Modulations) -> Tensor:
        """Return the sequence after the block."""
        return clip_fp16(torch.addcmul(x, mods[0].gate, self.linear2(attention, mlp)))


class LastLayer(nn.Module):
    """adaLN, whose rows are (shift, scale), and the projection to packed patches."""

    def __init__(self, hidden_size: int, out_channels: int, bias: bool = True):
        super().__init__()
        self.linear = Linear(hidden_size, out_channels, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size, bias))

    def modulations(self, vec: Tensor) -> Modulations:
        """Return what `forward` takes in place of `vec` `(B, D)`. The final layer has no gate."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return (Affine(shift, scale, None),)

    def forward(self, x: Tensor, vec: Tensor | Modulations) -> Tensor:
        (mod,) = self.modulations(vec) if isinstance(vec, Tensor) else vec
        return self.linear(modulate(x, mod.shift, mod.scale))
