"""What a family is described by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxlab.sampling.schedule import Schedule


@dataclass(frozen=True)
class Family:
    """Everything outside of the networks in which families differ.

    name: also that of its files in `fluxlab/checkpoints`. title: for messages.
    transformer_params, autoencoder_params: the classes of its sizes.
    sizes: of its published transformers, by the names under `configs/model`.
    axes: the names of the id axes, in order. Axis 0 is the kind of token (role `kind`), axes 1 and 2 are row and
        column (role `plane`), and a fourth one is the order of the text (role `order`).
    text_ids: (tokens) → ids `(tokens, A)`. image_ids: (rows, cols, n) → ids `(rows · cols, A)` of the image (n = 0) or
        of reference image n, counted from 1.
    noise: (seeds, latent channels, rows, cols, dtype) → the starting noise, packed `(B, rows · cols, C)`.
    pack, unpack: between what the autoencoder returns and tokens `(B, rows · cols, C)`; `unpack` takes rows and cols.
    schedule: of a file that does not say how it samples.
    guidance: what a guidance-distilled model takes.
    """

    name: str
    title: str
    transformer_params: type
    autoencoder_params: type
    sizes: Mapping[str, Any]
    axes: tuple[str, ...]
    text_ids: Callable[[int], Tensor]
    image_ids: Callable[[int, int, int], Tensor]
    noise: Callable[[Sequence[int], int, int, int, torch.dtype], Tensor]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    schedule: Schedule
    guidance: float
