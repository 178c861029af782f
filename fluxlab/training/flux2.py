"""How a small FLUX.2 is trained: its sizes, language model, schedule, and the form of its autoencoder."""

import torch

from fluxlab.errors import UserError
from fluxlab.families.flux2 import SCHEDULE, Schedule2
from fluxlab.model import AutoEncoder, AutoEncoder2, AutoEncoder2Params, Flux2, Flux2Params
from fluxlab.model.text2 import LanguageModelText
from fluxlab.training import text2 as text
from fluxlab.training.recipe import Recipe

__all__ = ["CARD", "DISTILLED", "as_own_autoencoder", "check", "new_networks", "schedule", "text"]

DISTILLED = True
CARD = {"name": "tiny2", "family": "FLUX.2", "names": "(t, h, w, l)", "text": "a small Qwen3"}
"""What the card of the embedded model says about the family."""


def check(recipe: Recipe) -> None:
    """Raise UserError for a recipe that does not fit the family."""
    if recipe.text_layers < 3:
        raise UserError(f"text_layers={recipe.text_layers}: expected at least 3, FLUX.2 reads the states of three")


def new_networks(recipe: Recipe, channels: int) -> tuple[Flux2, LanguageModelText]:
    """Return an untrained transformer of `channels` per token and its language model, from the global generator."""
    made = text.language_model(length=recipe.max_sequence_length, width=recipe.lm_width, layers=recipe.text_layers)
    params = Flux2Params(
        in_channels=channels,
        out_channels=channels,
        context_in_dim=made.width,
        hidden_size=recipe.hidden_size,
        mlp_ratio=3.0,
        num_heads=recipe.hidden_size // 64,
        depth=recipe.depth,
        depth_single_blocks=recipe.depth_single_blocks,
        axes_dim=(16, 16, 16, 16),  # a quarter of a head each, as FLUX.2 splits it
        theta=2000,
        guidance_embed=False,
    )
    return Flux2(params), made


def schedule(recipe: Recipe) -> Schedule2:
    """Return the schedule of the trained model, which depends on the number of steps, not on `shift`."""
    return SCHEDULE


def as_own_autoencoder(model: AutoEncoder, start: str | None = None) -> AutoEncoder2:
    """Return the same autoencoder in FLUX.2's form: its latents, packed, are those of FLUX.1's form.

    FLUX.2's additional convolutions are the identity, and the statistics of all channels are the shift and the scale.
    """
    if isinstance(model, AutoEncoder2):
        return model
    p = model.params
    params = AutoEncoder2Params(p.resolution, p.in_channels, p.ch, p.out_ch, p.ch_mult, p.num_res_blocks, p.z_channels)
    made = AutoEncoder2(params).to(next(model.parameters()).device)
    made.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in (made.encoder.quant_conv, made.decoder.post_quant_conv):
            layer.weight.copy_(torch.eye(len(layer.weight))[..., None, None])
            layer.bias.zero_()
        made.bn.running_mean.fill_(p.shift_factor)
        made.bn.running_var.fill_(p.scale_factor**-2 - made.bn.eps)
    return made.eval().requires_grad_(False)
