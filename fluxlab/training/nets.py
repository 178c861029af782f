"""The networks that a run trains, of either family: the transformer and its text encoders."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fluxlab import sampling
from fluxlab.families import family_of
from fluxlab.model import Flux, Flux2, Flux2Params, FluxParams, Rotary, rotary_table
from fluxlab.model.sites import Site
from fluxlab.model.text import TextEncoders
from fluxlab.model.text2 import LanguageModelText, joined
from fluxlab.training import text2
from fluxlab.training.program import Convention
from fluxlab.training.recipe import Recipe
from fluxlab.training.seeds import derived
from fluxlab.training.text import text_encoders, token_ids

Text = TextEncoders | LanguageModelText


class Nets(nn.Module):
    """All networks that the second stage trains."""

    def __init__(self, transformer: Flux | Flux2, text: Text):
        super().__init__()
        self.transformer = transformer
        if isinstance(text, LanguageModelText):
            self.lm, self.layers = text.encoder, text.layers
        else:
            self.clip, self.t5 = text.clip, text.t5

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
        if isinstance(self.transformer, Flux2):
            read = {"input_ids": tokens["lm_ids"], "attention_mask": tokens["lm_mask"]}
            states = self.lm.get_decoder()(**read, output_hidden_states=True, use_cache=False).hidden_states
            return self.transformer(x, None, joined(states, self.layers), None, t, **given)
        txt = self.t5(tokens["t5_ids"])[0]
        y = self.clip(tokens["clip_ids"]).pooler_output
        return self.transformer(x, None, txt, None, t, y, **given)


def tokens_of(text: Text, prompts: list[str], length: int) -> dict[str, Tensor]:
    """Return what the text encoders read of some prompts, each tensor with one row per prompt."""
    if isinstance(text, LanguageModelText):
        return text2.token_ids(text, prompts, length)
    return {
        "t5_ids": token_ids(text.t5_tokenizer, prompts, length),
        "clip_ids": token_ids(text.clip_tokenizer, prompts, text.clip_tokenizer.model_max_length),
    }


def tokenizers_of(text: Text) -> Text:
    """Return the tokenizers of text encoders, without the networks: what processes that draw batches need."""
    if isinstance(text, LanguageModelText):
        return LanguageModelText(text.tokenizer, None, text.kind)
    return TextEncoders(text.clip_tokenizer, None, text.t5_tokenizer, None)


def text_with(text: Text, nets: Nets) -> Text:
    """Return text encoders with the tokenizers of `text` and the networks of `nets`."""
    if isinstance(text, LanguageModelText):
        return LanguageModelText(text.tokenizer, nets.lm, text.kind)
    return TextEncoders(text.clip_tokenizer, nets.clip, text.t5_tokenizer, nets.t5)


def start_at_identity(transformer: Flux | Flux2) -> Flux | Flux2:
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
    length, channels = recipe.max_sequence_length, 4 * recipe.autoencoder.z_channels
    if recipe.family == "flux2":
        text: Text = text2.language_model(length=length, width=recipe.lm_width, layers=recipe.text_layers)
        params2 = Flux2Params(
            in_channels=channels,
            out_channels=channels,
            context_in_dim=text.width,
            hidden_size=recipe.hidden_size,
            mlp_ratio=3.0,
            num_heads=recipe.hidden_size // 64,
            depth=recipe.depth,
            depth_single_blocks=recipe.depth_single_blocks,
            axes_dim=(16, 16, 16, 16),  # a quarter of a head each, as FLUX.2 splits it
            theta=2000,
            guidance_embed=False,
        )
        return Nets(start_at_identity(Flux2(params2)), text), text
    text = text_encoders(
        length=length, t5_width=recipe.t5_width, clip_width=recipe.clip_width, layers=recipe.text_layers
    )
    params = FluxParams(
        in_channels=channels,
        out_channels=channels,
        vec_in_dim=recipe.clip_width,
        context_in_dim=recipe.t5_width,
        hidden_size=recipe.hidden_size,
        mlp_ratio=4.0,
        num_heads=recipe.hidden_size // 64,
        depth=recipe.depth,
        depth_single_blocks=recipe.depth_single_blocks,
        axes_dim=(8, 28, 28),  # 1/8, 7/16, 7/16 of a head, as FLUX.1 splits it
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
    )
    return Nets(start_at_identity(Flux(params)), text), text


def schedule_of(recipe: Recipe) -> sampling.Schedule:
    """Return the schedule of the trained model. FLUX.2's depends on the number of steps, not on `shift`."""
    if recipe.family == "flux2":
        return sampling.FLUX2_SCHEDULE
    return sampling.Schedule(base_shift=recipe.shift, max_shift=recipe.shift + 0.65)


def table_for(
    params: FluxParams | Flux2Params, length: int, grid: tuple[int, int], device: str | torch.device = "cpu"
) -> Rotary:
    """Return the rotary table of `length` text tokens and an image of `grid` tokens (rows, columns)."""
    family = family_of(params)
    ids = torch.cat((family.text_ids(length), family.image_ids(*grid, 0)))[None]
    return rotary_table(ids.to(device), params.axes_dim, params.theta)
