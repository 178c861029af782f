"""Write a pipeline as a Diffusers folder, which Diffusers' `FluxPipeline.from_pretrained` also loads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.checkpoints.fast_tokenizer import class_name
from fluxlab.checkpoints.write import allow_by_umask, save_autoencoder, save_transformer
from fluxlab.sampling import Schedule

if TYPE_CHECKING:
    from fluxlab.model import AutoEncoder, Flux
    from fluxlab.model.text import TextEncoders

_INDEX = {
    "_class_name": "FluxPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_pipeline(
    folder: str | Path,
    transformer: "Flux",
    autoencoder: "AutoEncoder",
    text: "TextEncoders",
    schedule: Schedule,
) -> None:
    """Write `transformer/`, `vae/`, both text encoders and tokenizers, `scheduler/` and `model_index.json`.

    Weights keep their dtype; safetensors only. All files get the permissions that the umask gives. The index is
    written last, so a folder that has one is complete.
    """
    folder = Path(folder)
    save_transformer(transformer, folder / "transformer", layout="diffusers")
    save_autoencoder(autoencoder, folder / "vae", layout="diffusers")
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one step per file is not worth a bar
    text.clip.save_pretrained(folder / "text_encoder")
    text.t5.save_pretrained(folder / "text_encoder_2")
    if shown:
        logging.enable_progress_bar()
    text.clip_tokenizer.save_pretrained(folder / "tokenizer")
    text.t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule.config(), indent=2) + "\n")
    # Diffusers looks up the class in transformers, where a fast tokenizer has one of several names
    classes = {
        "tokenizer": ["transformers", class_name(text.clip_tokenizer)],
        "tokenizer_2": ["transformers", class_name(text.t5_tokenizer)],
    }
    for file in folder.glob("*/*"):
        allow_by_umask(file)  # safetensors 0.8 writes files that only their owner can read
    (folder / "model_index.json").write_text(json.dumps({**_INDEX, **classes}, indent=2, sort_keys=True) + "\n")
