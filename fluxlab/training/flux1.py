"""How a small FLUX.1 is trained: its sizes, text encoders and schedule."""

from fluxlab.errors import UserError
from fluxlab.model import AutoEncoder, AutoEncoder2, Flux, FluxParams
from fluxlab.model.text import TextEncoders
from fluxlab.sampling import Schedule
from fluxlab.training import text
from fluxlab.training.recipe import Recipe

__all__ = ["CARD", "DISTILLED", "as_own_autoencoder", "check", "new_networks", "schedule", "text"]

DISTILLED = False
CARD = {"name": "tiny", "family": "FLUX.1", "names": "(index, row, col)", "text": "a small CLIP and T5"}
"""What the card of the embedded model says about the family."""


def check(recipe: Recipe) -> None:
    """Raise UserError for a recipe that does not fit the family: all do."""


def new_networks(recipe: Recipe, channels: int) -> tuple[Flux, TextEncoders]:
    """Return an untrained transformer of `channels` per token and its text encoders, from the global generator."""
    made = text.text_encoders(
        length=recipe.max_sequence_length,
        t5_width=recipe.t5_width,
        clip_width=recipe.clip_width,
        layers=recipe.text_layers,
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
    return Flux(params), made


def schedule(recipe: Recipe) -> Schedule:
    """Return the schedule of the trained model."""
    return Schedule(base_shift=recipe.shift, max_shift=recipe.shift + 0.65)


def as_own_autoencoder(model: AutoEncoder, start: str | None) -> AutoEncoder:
    """Return a trained autoencoder. Raises UserError for another family's. start: the model that it is of."""
    if isinstance(model, AutoEncoder2):
        raise UserError(f"autoencoder.start={start}: FLUX.2's autoencoder; set family=flux2 or name a FLUX.1 model")
    return model
