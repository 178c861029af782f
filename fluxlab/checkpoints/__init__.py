"""Find, recognise, read and write checkpoints: single files, Diffusers folders, hub ids."""

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.finding import Found, find
from fluxlab.checkpoints.folder import save_pipeline
from fluxlab.checkpoints.memory import check_device, check_fits, default_device, dtype_of
from fluxlab.checkpoints.merge import check_loras, merge_loras, merged
from fluxlab.checkpoints.read import load_autoencoder, load_transformer
from fluxlab.checkpoints.text import load_text_encoders
from fluxlab.checkpoints.write import save_autoencoder, save_transformer

__all__ = [
    "CheckpointError",
    "Found",
    "check_device",
    "check_fits",
    "check_loras",
    "default_device",
    "dtype_of",
    "find",
    "load_autoencoder",
    "load_text_encoders",
    "load_transformer",
    "merge_loras",
    "merged",
    "save_autoencoder",
    "save_pipeline",
    "save_transformer",
]
