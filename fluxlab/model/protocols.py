"""What the networks of all families have: code outside of a family's own files relies on nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TransformerSizes(Protocol):
    """The sizes of a transformer: a frozen dataclass whose fields are numbers and tuples.

    in_channels: of a packed token. context_in_dim: of a text token. depth, depth_single_blocks: blocks of separate and
    of joint streams, either of which may be 0. axes_dim: channels of a head that each axis of the ids rotates.
    mlp_ratio: width of an MLP by `hidden_size`. guidance_embed: whether it takes distilled guidance.
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


class Transformer(Protocol):
    """A transformer, an `nn.Module`, called as `Flux.forward` is; its text is followed by what is pooled of it.

    Layers that compute modulations are called `…mod` or `…modulation` (`fluxlab.memory.costs.is_modulation`).
    mlp_maps: maps as wide as an MLP that are in memory at once.
    """

    params: TransformerSizes
    mlp_maps: int
    img_in: nn.Linear
    txt_in: nn.Module
    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList
    final_layer: nn.Module

    def conditioning(self, timesteps: Tensor, *pooled_and_guidance: Tensor | None) -> Tensor:
        """Return the vector `(B, D)` from which all modulations are computed."""

    def modulations(self, vec: Tensor) -> Sequence[Any]:
        """Return the modulations of each block and of the final layer."""

    def text_modulations(self, vec: Tensor, block: int) -> Any:
        """Return those of a double block's text stream."""

    @staticmethod
    def modulation_layers(p: TransformerSizes) -> Mapping[str, int]:
        """Return the layers that compute modulations, by name, and how many vectors `(D,)` each returns."""

    @staticmethod
    def split_modulations(table: Tensor, p: TransformerSizes) -> Sequence[Any]:
        """Return what `modulations` does from the outputs of `modulation_layers`, side by side in a table `(B, W)`."""


class AutoEncoderSizes(Protocol):
    """The sizes of an autoencoder of latent diffusion's kind. factor: image pixels per latent pixel, along a side."""

    resolution: int
    in_channels: int
    ch: int
    out_ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int

    @property
    def factor(self) -> int: ...


class Text(Protocol):
    """Text encoders with their tokenizers.

    titles: of the encoders, in the order of what `encode` returns. tokenizer: the one whose tokens the transformer
    reads; None in a plan of a model that is still to be fetched.
    """

    titles: tuple[str, ...]

    @property
    def tokenizer(self) -> Any: ...

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The words that it knows, sorted, if its tokenizer has one token per word; else None."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]: ...

    def load(self) -> Any:
        """Return the networks, which some kinds load when they are needed."""

    def to(self, device: torch.device) -> None: ...

    def check(self, prompts: Sequence[str], max_sequence_length: int, truncate: bool, unknown_words: str) -> None:
        """Raise `UserError` if a part of a prompt would not reach the model."""

    def spans(self, prompt: str, max_sequence_length: int) -> tuple[tuple[int, int], ...]:
        """Return the characters [start, end) of the prompt that each text token covers; start = end: none."""

    def token_of(self, word: str, max_sequence_length: int) -> int:
        """Return the token that stands for a word that is encoded by itself."""

    def encode(
        self, prompt: str, max_sequence_length: int, truncate: bool = False, unknown_words: str = "error"
    ) -> tuple[Tensor, ...]:
        """Return the text tokens `(1, L, C)` of a prompt, then what is pooled of it, `(1, V)` each."""
