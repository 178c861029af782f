"""The networks of FLUX.1 and FLUX.2: transformers, autoencoders and text encoders."""

from fluxlab.model.autoencoder import AutoEncoder, AutoEncoderParams
from fluxlab.model.autoencoder2 import AutoEncoder2, AutoEncoder2Params
from fluxlab.model.flux import Flux, FluxParams
from fluxlab.model.flux2 import Flux2, Flux2Params
from fluxlab.model.rope import Rotary, rotary_table
from fluxlab.model.sizes import AUTOENCODERS, TRANSFORMERS, TRANSFORMERS2

__all__ = [
    "AUTOENCODERS",
    "TRANSFORMERS",
    "TRANSFORMERS2",
    "AutoEncoder",
    "AutoEncoder2",
    "AutoEncoder2Params",
    "AutoEncoderParams",
    "Flux",
    "Flux2",
    "Flux2Params",
    "FluxParams",
    "Rotary",
    "rotary_table",
]
