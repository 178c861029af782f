"""What a family is described by."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROLES = ("kind", "row", "col", "order")
"""What the axes of ids stand for, in the order in which every family has them; the order of the text may be missing."""


class Later:
    """A module that is imported when something in it is used for the first time.

    A description names code of higher layers in this way. A run imports that of its own family only.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self) -> ModuleType:
        return import_module(self.name)


@dataclass(frozen=True)
class Names:
    """How one layout of files names the tensors of a network. Patterns start where the network's own names start.

    signs: names that only such a network has. roots: the first parts of all its names.
    """

    signs: str
    roots: str


@dataclass(frozen=True)
class Architecture:
    """The transformer or the autoencoder of a family: its class, and how its files are recognised.

    build: its class, called with sizes of the class `params`. published: these sizes, by the names under
        `configs/model` or for autoencoders by the family's.
    diffusers: the class in Diffusers' config.json. originals: patterns of the names of its single files on the hub.
    names: by layout, "bfl" (the names of `build`) and "diffusers".
    only: names of tensors that no other family has; None for FLUX.1, which has what no other family claims.
    unusual: names that would be another model's in a file without those of `only` (`fluxlab.checkpoints.foreign`).
    """

    build: Any
    params: type
    published: Mapping[str, Any]
    diffusers: str
    originals: tuple[str, ...]
    names: Mapping[str, Names]
    only: re.Pattern | None = None
    unusual: re.Pattern | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """Everything outside of the networks in which families differ.

    name: in configs and in code. title: for messages.
    transformer, autoencoder: the networks that its files hold.
    axes: the names of the id axes, in the order of `ROLES`. Programs may use these names, or those of the roles.
    ids: (text tokens, grids) → ids `(tokens, A)` of the text, then `(rows · cols, A)` of the image and of each
        reference image, whose grids are (rows, cols) in tokens.
    patch: latent pixels along a side of a token.
    noise: (seeds, latent channels, rows, cols, dtype) → the starting noise, packed `(B, rows · cols, C)`.
    pack, unpack: between what the autoencoder returns and tokens `(B, rows · cols, C)`; `unpack` takes rows and cols.
    guidance: what a guidance-distilled model takes.
    pooled: (transformer's sizes) → the widths of what is pooled of a text, in addition to its tokens.
    text_activation_bytes: (transformer's sizes, text tokens, bytes of a number) → memory of the text encoders above
        their weights.
    files: `fluxlab.checkpoints.<name>`, which has `TRANSFORMER` and `AUTOENCODER`, a `Format` each, and
        `lora_aliases`.
    published_text: (name under `configs/model`) → parameters of its text encoders, and of the largest layer of each.
    text_files: where text encoders are in a folder: `stored`, `save`, `reads`, `tokenizer_folder`, `TITLE`, `PLACES`,
        as in `fluxlab.checkpoints.text`.
    conditioning: text encoders that are opened when they are needed: `open_text`, `check_widths`, `silent_text`, as in
        `fluxlab.conditioning.encoders`.
    schedules: `fluxlab.schedules.<name>`, which has `decide`.
    training: how a small model of the family is trained, as in `fluxlab.training.flux1`; None if it cannot be.
    """

    name: str
    title: str
    transformer: Architecture
    autoencoder: Architecture
    axes: tuple[str, ...]
    ids: Callable[[int, Sequence[tuple[int, int]]], list[Tensor]]
    patch: int
    noise: Callable[[Sequence[int], int, int, int, torch.dtype], Tensor]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    guidance: float
    text_activation_bytes: Callable[[Any, int, int], int]
    pooled: Callable[[Any], tuple[int, ...]]
    published_text: Callable[[str], Mapping[str, tuple[int, int]]]
    files: Later = field(repr=False)
    text_files: Later = field(repr=False)
    conditioning: Later = field(repr=False)
    schedules: Later = field(repr=False)
    training: Later | None = field(default=None, repr=False)

    def __post_init__(self):
        if len(self.axes) not in (3, 4):
            raise ValueError(f"{self.name}: axes {self.axes}, expected a name for each of {', '.join(ROLES)}")

    @property
    def networks(self) -> dict[str, Architecture]:
        """The networks by what they are called everywhere: "transformer" and "autoencoder"."""
        return {"transformer": self.transformer, "autoencoder": self.autoencoder}

    def channels(self, autoencoder: Any) -> int:
        """Return the channels of a packed token of latents. autoencoder: its sizes."""
        return self.patch**2 * autoencoder.z_channels

    def pixels_per_token(self, autoencoder: Any) -> int:
        """Return the pixels along a side of a token. autoencoder: its sizes."""
        return self.patch * autoencoder.factor

    @property
    def roles(self) -> dict[str, str]:
        """The name of the axis that has each role."""
        return dict(zip(ROLES, self.axes, strict=False))
