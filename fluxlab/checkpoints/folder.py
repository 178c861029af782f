"""Write a pipeline as a Diffusers folder, which Diffusers' pipelines also load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.checkpoints.fast_tokenizer import class_name
from fluxlab.checkpoints.write import allow_by_umask, save_autoencoder, save_transformer
from fluxlab.model.text2 import LanguageModelText
from fluxlab.sampling import Schedule

if TYPE_CHECKING:
    from fluxlab.model import AutoEncoder, AutoEncoder2, Flux, Flux2
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


_INDEX2 = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def save_pipeline(
    folder: str | Path,
    transformer: "Flux | Flux2",
    autoencoder: "AutoEncoder | AutoEncoder2",
    text: "TextEncoders | LanguageModelText",
    schedule: Schedule,
    distilled: bool = False,
) -> None:
    """Write `transformer/`, `vae/`, both text encoders and tokenizers, `scheduler/` and `model_index.json`.

    Weights keep their dtype; safetensors only. All files get the permissions that the umask gives. The index is
    written last, so a folder that has one is complete. distilled: of FLUX.2 [klein]; Diffusers then ignores guidance.
    """
    folder = Path(folder)
    save_transformer(transformer, folder / "transformer", layout="diffusers")
    save_autoencoder(autoencoder, folder / "vae", layout="diffusers")
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one step per file is not worth a bar
    if isinstance(text, LanguageModelText):
        text.encoder.save_pretrained(folder / "text_encoder")
        text.tokenizer.save_pretrained(folder / "tokenizer")
        klein = text.kind == "qwen3"
        index = {
            **_INDEX2,
            "_class_name": "Flux2KleinPipeline" if klein else "Flux2Pipeline",
            "text_encoder": ["transformers", type(text.encoder).__name__],
            "tokenizer": ["transformers", type(text.tokenizer).__name__],
            **({"is_distilled": distilled} if klein else {}),
        }
    else:
        text.clip.save_pretrained(folder / "text_encoder")
        text.t5.save_pretrained(folder / "text_encoder_2")
        text.clip_tokenizer.save_pretrained(folder / "tokenizer")
        text.t5_tokenizer.save_pretrained(folder / "tokenizer_2")
        # Diffusers looks up the class in transformers, where a fast tokenizer has one of several names
        index = {
            **_INDEX,
            "tokenizer": ["transformers", class_name(text.clip_tokenizer)],
            "tokenizer_2": ["transformers", class_name(text.t5_tokenizer)],
        }
    if shown:
        logging.enable_progress_bar()
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule.config(), indent=2) + "\n")
    for file in folder.glob("*/*"):
        allow_by_umask(file)  # safetensors 0.8 writes files that only their owner can read
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
