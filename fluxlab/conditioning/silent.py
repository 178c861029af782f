"""What stands for text encoders in a pipeline without weights."""

from types import SimpleNamespace

import torch
from torch import nn


class SilentEncoder(nn.Module):
    """A text encoder whose states have the right shape and are always 0. like: a tensor on its device."""

    def __init__(self, width: int, dtype: torch.dtype, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype))
        self.zeros = like.new_zeros(width)
        self.device = like.device
        self.config = _Config(width)

    def get_decoder(self):
        """Return a function like a language model: enough states that are all 0."""

        def decoder(inputs_embeds: torch.Tensor, **_) -> SimpleNamespace:
            return SimpleNamespace(hidden_states=[inputs_embeds] * 64)

        return decoder

    def get_input_embeddings(self):
        """Return a function like a table of embeddings that are all 0."""
        return lambda ids: self.zeros.expand(*ids.shape, -1)

    def forward(self, ids: torch.Tensor) -> "_States":
        return _States((self.zeros.expand(*ids.shape, -1),))


class _Config:
    def __init__(self, hidden_size: int):
        self.hidden_size = hidden_size

    def get_text_config(self) -> "_Config":
        return self


class _States(tuple):
    @property
    def pooler_output(self) -> torch.Tensor:
        return self[0][:, 0]
