"""The networks that a run trains: the transformer and its text encoders."""

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from fluxlab.families import FAMILIES, family_of
from fluxlab.model import Rotary, rotary_table
from fluxlab.model.protocols import Text, Transformer, TransformerSizes
from fluxlab.model.sites import Site
from fluxlab.training.program import Convention
from fluxlab.training.recipe import Recipe
from fluxlab.training.seeds import derived


class Nets(nn.Module):
    """All networks that the second stage trains."""

    def __init__(self, transformer: Transformer, text: Text):
        super().__init__()
        self.transformer = transformer
        for name, network in kind_of(text).networks(text).items():
            self.add_module(name, network)
        self._read = kind_of(text).reader(text)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Mapping[str, Tensor],
        table: Rotary | Convention,
        sites: Sequence[Site] | None = None,
    ) -> Tensor:
        """Return the velocity of packed latents x `(B, N, C)` at times t `(B,)`. tokens: of `tokens_of`."""
        given = {"rotary": table, "sites": sites}
        if isinstance(table, Convention):
            given = {"rotary": table.rotary, "mask": table.mask, "sites": table.sites(len(x))}
        txt, *pooled = self._read(self, tokens)
        return self.transformer(x, None, txt, None, t, *pooled, **given)


def kind_of(text: Text) -> ModuleType:
    """Return the module that trains text encoders of this kind, such as `fluxlab.training.text`."""
    kinds = [family.training().text for family in FAMILIES.values() if family.training]
    return next(kind for kind in kinds if isinstance(text, kind.KIND))


def tokens_of(text: Text, prompts: list[str], length: int) -> dict[str, Tensor]:
    """Return what the text encoders read of some prompts, each tensor with one row per prompt."""
    return kind_of(text).tokens(text, prompts, length)


def tokenizers_of(text: Text) -> Text:
    """Return the tokenizers of text encoders, without the networks: what processes that draw batches need."""
    return kind_of(text).with_networks(text, {})


def text_with(text: Text, nets: Nets) -> Text:
    """Return text encoders with the tokenizers of `text` and the networks of `nets`."""
    return kind_of(text).with_networks(text, dict(nets.named_children()))


def start_at_identity(transformer: Transformer) -> Transformer:
    """Set modulations and the last layer to zero, so that each block starts as the identity (adaLN-Zero, arXiv
    2212.09748).
    """
    for name, parameter in transformer.named_parameters():
        if ".lin." in name or name.startswith("final_layer."):
            nn.init.zeros_(parameter)
    return transformer


def new_nets(recipe: Recipe) -> tuple[Nets, Text]:
    """Return untrained networks, a pure function of the recipe."""
    torch.manual_seed(derived(recipe.seed, "weights", 0))
    family = FAMILIES[recipe.family]
    transformer, text = family.training().new_networks(recipe, family.patch**2 * recipe.autoencoder.z_channels)
    return Nets(start_at_identity(transformer), text), text


def table_for(
    params: TransformerSizes, length: int, grid: tuple[int, int], device: str | torch.device = "cpu"
) -> Rotary:
    """Return the rotary table of `length` text tokens and an image of `grid` tokens (rows, columns)."""
    ids = torch.cat(family_of(params).ids(length, [grid]))[None]
    return rotary_table(ids.to(device), params.axes_dim, params.theta)
