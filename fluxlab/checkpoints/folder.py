"""Write a pipeline as a Diffusers folder, which Diffusers' pipelines also load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlab.checkpoints.write import allow_by_umask, save_autoencoder, save_transformer
from fluxlab.families import family_of
from fluxlab.sampling import Schedule

if TYPE_CHECKING:
    from fluxlab.model import AutoEncoder
    from fluxlab.model.protocols import Text, Transformer


def save_pipeline(
    folder: str | Path,
    transformer: "Transformer",
    autoencoder: "AutoEncoder",
    text: "Text",
    schedule: Schedule,
    distilled: bool = False,
) -> None:
    """Write `transformer/`, `vae/`, text encoders and tokenizers, `scheduler/` and `model_index.json`.

    Weights keep their dtype; safetensors only. All files get the permissions that the umask gives. The index is
    written last, so a folder that has one is complete. distilled: whether it was distilled to few steps
    and takes no guidance, which the indices of some families say.
    """
    folder = Path(folder)
    save_transformer(transformer, folder / "transformer", layout="diffusers")
    save_autoencoder(autoencoder, folder / "vae", layout="diffusers")
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one step per file is not worth a bar
    family = family_of(transformer.params)
    index = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", family.transformer.diffusers],
        "vae": ["diffusers", family.autoencoder.diffusers],
        **family.text_files().save(folder, text, distilled),
    }
    if shown:
        logging.enable_progress_bar()
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule.config(), indent=2) + "\n")
    for file in folder.glob("*/*"):
        allow_by_umask(file)  # safetensors 0.8 writes files that only their owner can read
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
