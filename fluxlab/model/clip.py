"""CLIP's text encoder: one pooled vector per prompt (arXiv 2103.00020). Weights have the names of its checkpoints.

It computes what `transformers.CLIPTextModel` does, to the bit (5.23). Importing that class takes two seconds.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}

LARGEST_IS_END = 2
"""The `eos_token_id` of configs that were written before it was used. The end mark is then the largest token."""


def embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding whose weights are still to be loaded. Drawing them on "meta" would import the compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class ClipAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b l w"]:
        parts = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in parts)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ClipMLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b l w"]:
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, activation: str, eps: float):
        super().__init__()
        self.self_attn, self.mlp = ClipAttention(width, heads), ClipMLP(width, inner, activation)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)

    def forward(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b l w"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipText(nn.Module):
    """The text encoder of a CLIP.

    config: of its checkpoint (`config.json`). `eos_token_id` says which token is pooled.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        heads, inner, activation = (config[k] for k in ("num_attention_heads", "intermediate_size", "hidden_act"))
        self.end = config["eos_token_id"]
        tokens = embedding(config["vocab_size"], width)
        positions = embedding(config["max_position_embeddings"], width)
        layers = [ClipLayer(width, heads, inner, activation, eps) for _ in range(config["num_hidden_layers"])]
        self.text_model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions}),
                "encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
                "final_layer_norm": nn.LayerNorm(width, eps),
            }
        )

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b w"]:
        """Return the last layer at the end mark of each prompt, the first one if there are several.

        ids: at most as many as the model has positions; more raise IndexError.
        """
        net = self.text_model
        positions = net.embeddings.position_embedding(torch.arange(ids.shape[1], device=ids.device)[None])
        x = net.embeddings.token_embedding(ids) + positions
        for layer in net.encoder.layers:
            x = layer(x)
        end = ids if self.end == LARGEST_IS_END else (ids == self.end).int()
        return net.final_layer_norm(x)[torch.arange(len(x), device=x.device), end.argmax(-1)]
