"""T5's encoder: a sequence of tokens per prompt (arXiv 1910.10683). Weights have the names of its checkpoints.

It computes what `transformers.T5EncoderModel` does, to the bit (5.23). Importing that class takes two seconds.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fluxlab.model.clip import embedding

FEED_FORWARD = ("relu", "gated-gelu")
"""The values of `feed_forward_proj` in T5 1.0 and 1.1. FLUX.1 reads 1.1."""

FP32_IN_FP16 = "wo.weight"
"""End of the names of weights that stay in fp32 in a model of fp16. The second product of an MLP overflows fp16."""


class T5Norm(nn.Module):
    """RMSNorm, with the statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b l w"]:
        x = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, operation by operation as in the original."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class T5MLP(nn.Module):
    """The feed-forward layer: ReLU in T5 1.0, a gated GELU (arXiv 2002.05202) in T5 1.1."""

    def __init__(self, width: int, inner: int, gated: bool):
        super().__init__()
        self.gated = gated
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            setattr(self, name, nn.Linear(width, inner, bias=False))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b l w"]:
        x = gelu_new(self.wi_0(x)) * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        return self.wo(x.to(self.wo.weight.dtype))


def bucket(distance: Int[Tensor, "n m"], buckets: int, furthest: int) -> Int[Tensor, "n m"]:
    """Return the bucket of each distance, key less query, in tokens (arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys after the query. Of each half, one half holds a distance each, and the other half
    grows with the logarithm up to `furthest`.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    grown = torch.log(far.float() / exact) / math.log(furthest / exact) * (half - exact)
    grown = (exact + grown.long()).clamp(max=half - 1)  # of 0 it is never used
    return (distance > 0).long() * half + torch.where(far < exact, far, grown)


class T5Attention(nn.Module):
    """Self-attention with a bias by distance. first: of the first block, which holds the bias of all blocks."""

    def __init__(self, config: Mapping[str, Any], first: bool):
        super().__init__()
        width, self.heads, head = config["d_model"], config["num_heads"], config["d_kv"]
        self.q, self.k, self.v = (nn.Linear(width, self.heads * head, bias=False) for _ in range(3))
        self.o = nn.Linear(self.heads * head, width, bias=False)
        self.buckets, self.furthest = (config[f"relative_attention_{k}"] for k in ("num_buckets", "max_distance"))
        if first:
            self.relative_attention_bias = embedding(self.buckets, self.heads)

    def bias(self, length: int) -> Float[Tensor, "1 h l l"]:
        """Return what is added to the scores, by distance. All blocks use that of the first one.

        It is contiguous, because the fused kernels of GPUs take no other mask.
        """
        places = torch.arange(length, device=self.q.weight.device)
        buckets = bucket(places[None, :] - places[:, None], self.buckets, self.furthest)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None].contiguous()

    def forward(self, x: Float[Tensor, "b l w"], bias: Float[Tensor, "1 h l l"]) -> Float[Tensor, "b l w"]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # scores are not divided by the square root of the head's width
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], first: bool):
        super().__init__()
        width, eps = config["d_model"], config["layer_norm_epsilon"]
        mlp = T5MLP(width, config["d_ff"], config["feed_forward_proj"] == "gated-gelu")
        attention = {"SelfAttention": T5Attention(config, first), "layer_norm": T5Norm(width, eps)}
        feed_forward = {"DenseReluDense": mlp, "layer_norm": T5Norm(width, eps)}
        self.layer = nn.ModuleList([nn.ModuleDict(attention), nn.ModuleDict(feed_forward)])

    def forward(
        self, x: Float[Tensor, "b l w"], mask: None = None, bias: Float[Tensor, "1 h l l"] | None = None
    ) -> tuple[Float[Tensor, "b l w"], Float[Tensor, "1 h l l"]]:
        """Return the states, and the bias, which the first block computes. mask: there is none for FLUX."""
        attention, feed_forward = self.layer
        bias = attention.SelfAttention.bias(x.shape[1]) if bias is None else bias
        x = within_fp16(x + attention.SelfAttention(attention.layer_norm(x), bias))
        return within_fp16(x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))), bias


def within_fp16(x: Tensor) -> Tensor:
    """Clip states of fp16, below the largest value by 1000 if one of them is infinite. Others are returned as is."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    largest = torch.where(x.isinf().any(), largest - 1000, largest)
    return torch.clamp(x, -largest, largest)


class T5Encoder(nn.Module):
    """The encoder of a T5. config: of its checkpoint (`config.json`)."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.shared = embedding(config["vocab_size"], config["d_model"])
        blocks = nn.ModuleList(T5Block(config, first=i == 0) for i in range(config["num_layers"]))
        norm = T5Norm(config["d_model"], config["layer_norm_epsilon"])
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l w"]:
        """Return the last layer. Padding is attended to, as in both reference implementations of FLUX.1."""
        x, bias = self.shared(ids), None
        for block in self.encoder.block:
            x, bias = block(x, None, bias)
        return self.encoder.final_layer_norm(x)
