"""The blocks of FLUX.1, with the original release's names, so that its state dict loads with no map.

B is the batch, L a sequence length, D the hidden size, H the number of heads, d = D/H a head's width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fluxlab.model.attention import attend
from fluxlab.model.rope import Rotary, apply_rotary


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of 1000·t, cos before sin: `(B,)` → `(B, dim)` in `dtype`. Computed in t's own fp32 or fp64.

    The frequencies are rounded to fp32 as in both public implementations: at t = 1 an exact table would differ by
    6e-5 rad.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = (1000.0 * t)[:, None] * freqs.to(t.dtype)
    return torch.cat((args.cos(), args.sin()), dim=-1).to(dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

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
    """The projections of one stream; the attention itself is joint and belongs to the block."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


class Affine(NamedTuple):
    """An adaLN triple, each `(B, 1, D)`: LN(x) is scaled and shifted on the way in, the result gated on the way out."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """adaLN parameters from `vec` `(B, D)`: two triples for a double block, one for a single block."""

    def __init__(self, dim: int, double: bool):
        super().__init__()
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> list[Affine]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(self.multiplier, dim=-1)
        return [Affine(*parts[i : i + 3]) for i in range(0, self.multiplier, 3)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · LN(x) + shift."""
    return torch.addcmul(shift, 1 + scale, F.layer_norm(x, x.shape[-1:], eps=1e-6))


def query_key_value(x: Tensor, norm: QKNorm, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection `(B, L, 3·D)` into normed queries, normed keys and values, each `(B, H, L, d)`."""
    q, k, v = rearrange(x, "B L (K H D) -> K B H L D", K=3, H=num_heads)
    return norm.query_norm(q), norm.key_norm(k), v


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, joined in one attention (MM-DiT, arXiv 2403.03206)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool):
        super().__init__()
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.img_mod = Modulation(hidden_size, double=True)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden_size)
        )
        self.txt_mod = Modulation(hidden_size, double=True)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden_size)
        )

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, tables: tuple[Rotary, Rotary], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = self.img_mod(vec)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        img_qkv = self.img_attn.qkv(modulate(img, img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn.qkv(modulate(txt, txt_mod1.shift, txt_mod1.scale))
        img_q, img_k, img_v = query_key_value(img_qkv, self.img_attn.norm, self.img_attn.num_heads)
        txt_q, txt_k, txt_v = query_key_value(txt_qkv, self.txt_attn.norm, self.txt_attn.num_heads)

        q = apply_rotary(torch.cat((txt_q, img_q), dim=2), tables[0])
        k = apply_rotary(torch.cat((txt_k, img_k), dim=2), tables[1])
        v = torch.cat((txt_v, img_v), dim=2)
        joint = rearrange(attend(q, k, v, mask), "B H L D -> B L (H D)")
        txt_joint, img_joint = joint.split((txt.shape[1], img.shape[1]), dim=1)

        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_joint))
        img = torch.addcmul(img, img_mod2.gate, self.img_mlp(modulate(img, img_mod2.shift, img_mod2.scale)))
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_joint))
        txt = torch.addcmul(txt, txt_mod2.gate, self.txt_mlp(modulate(txt, txt_mod2.shift, txt_mod2.scale)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side behind one projection (ViT-22B, arXiv 2302.05442)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.num_heads = num_heads
        self.widths = (3 * hidden_size, int(hidden_size * mlp_ratio))
        self.linear1 = nn.Linear(hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(hidden_size + self.widths[1], hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, double=False)

    def forward(self, x: Tensor, vec: Tensor, tables: tuple[Rotary, Rotary], mask: Tensor | None) -> Tensor:
        (mod,) = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, mod.shift, mod.scale)).split(self.widths, dim=-1)
        q, k, v = query_key_value(qkv, self.norm, self.num_heads)
        attn = rearrange(
            attend(apply_rotary(q, tables[0]), apply_rotary(k, tables[1]), v, mask), "B H L D -> B L (H D)"
        )
        return torch.addcmul(x, mod.gate, self.linear2(torch.cat((attn, F.gelu(mlp, approximate="tanh")), dim=-1)))


class LastLayer(nn.Module):
    """adaLN, rows (shift, scale), and the projection to a packed patch."""

    def __init__(self, hidden_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))
