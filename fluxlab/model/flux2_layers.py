"""The blocks of FLUX.2, where they differ from FLUX.1's: no bias, SwiGLU, and modulations that come from outside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxlab.model.layers import DoubleStreamBlock, QKNorm, SelfAttention, SingleStreamBlock
from fluxlab.model.linear import JoinedLinear, Linear, linear, uses_onednn


class LinearSwiGLU(nn.Linear):
    """SwiGLU (arXiv 2002.05202): silu(x · W₁ᵀ) · (x · W₂ᵀ), where the rows of the weight are W₁, then W₂."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, 2 * hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _swiglu(x, self.weight)


class ParallelSwiGLU(nn.Linear):
    """One projection for attention and MLP. Returns the first `attention_width` channels, and SwiGLU of the rest.

    SwiGLU is of tokens from `first` on. It is computed first because it takes the most memory for a moment.
    """

    def __init__(self, dim: int, attention_width: int, mlp_width: int):
        super().__init__(dim, attention_width + 2 * mlp_width, bias=False)
        self.widths = (attention_width, 2 * mlp_width)

    def forward(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        attention, mlp = self.weight.split(self.widths)
        mlp = _swiglu(x[:, first:] if first else x, mlp)
        return linear(x, attention, None), mlp


def _swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """Return silu(x · W₁ᵀ) · (x · W₂ᵀ). The results of two products are contiguous, which is faster on the CPU.

    Compiled code reads halves of one result as fast.
    """
    if not uses_onednn(x, weight) or torch.compiler.is_compiling():
        gate, up = linear(x, weight, None).chunk(2, dim=-1)
        return F.silu(gate) * up
    gate, up = (linear(x, part, None) for part in weight.chunk(2))
    return F.silu(gate, inplace=True).mul_(up)


def swiglu_mlp(dim: int, hidden: int) -> nn.Sequential:
    """Return the MLP. The first layer includes SwiGLU; `Identity` takes its place and keeps the original's names."""
    return nn.Sequential(LinearSwiGLU(dim, hidden), nn.Identity(), Linear(hidden, dim, bias=False))


class DoubleStreamBlock2(DoubleStreamBlock):
    """FLUX.1's double block, given its modulations: (image, image, text, text), shared by all blocks."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        nn.Module.__init__(self)
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias=False, bias=False)
        self.img_mlp = swiglu_mlp(hidden_size, mlp_hidden)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias=False, bias=False)
        self.txt_mlp = swiglu_mlp(hidden_size, mlp_hidden)


class SingleStreamBlock2(SingleStreamBlock):
    """FLUX.1's single block, given its modulation, which all blocks share."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        nn.Module.__init__(self)
        self.num_heads = num_heads
        mlp_hidden = int(hidden_size * mlp_ratio)
        self.linear1 = ParallelSwiGLU(hidden_size, 3 * hidden_size, mlp_hidden)
        self.linear2 = JoinedLinear(hidden_size + mlp_hidden, hidden_size, bias=False)
        self.norm = QKNorm(hidden_size // num_heads)
