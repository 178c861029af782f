"""The networks of FLUX.1: transformer, autoencoder and text encoders."""

from fluxlab.model.autoencoder import AutoEncoder, AutoEncoderParams
from fluxlab.model.flux import Flux, FluxParams
from fluxlab.model.rope import Rotary, rotary_table
from fluxlab.model.sizes import AUTOENCODERS, TRANSFORMERS

__all__ = [
    "AUTOENCODERS",
    "TRANSFORMERS",
    "AutoEncoder",
    "AutoEncoderParams",
    "Flux",
    "FluxParams",
    "Rotary",
    "rotary_table",
]
