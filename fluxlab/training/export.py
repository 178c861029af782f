"""Last training stage: bf16 weights in the Diffusers folder layout, and a manifest of their hashes."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch

from fluxlab.checkpoints.identity import fingerprint
from fluxlab.checkpoints.manifest import write_manifest
from fluxlab.config import find_row
from fluxlab.experiment.versions import commit
from fluxlab.files import sha256_of
from fluxlab.pipeline import Pipeline
from fluxlab.scenes import VOCABULARY
from fluxlab.training.card import curve_points
from fluxlab.training.nets import Nets, text_with
from fluxlab.training.recipe import Recipe

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
"""The file whose hash says which weights a folder has."""


def facts(recipe: Recipe, run: Path, arguments: Sequence[str]) -> dict:
    """Return the facts about a training run that the model card shows.

    Args:
        run: folder of the run. Changes made by hand go into its `notes.txt`, one per line; the card repeats them.
    """
    notes = run / "notes.txt"
    early = round(recipe.early * recipe.steps)
    started = {key: _start(name) for key in ("start", "teacher") if (name := getattr(recipe, key))}
    return (
        started
        | {
            "command": " ".join(["python -m fluxlab.train", *arguments]),
            "commit": commit(),
            "seed": recipe.seed,
            "steps": recipe.steps,
            "samples": early * recipe.early_batch + (recipe.steps - early) * recipe.batch,
            "guidance": {"steps": recipe.guidance_steps, "batch": recipe.guidance_batch, "scale": recipe.guidance},
            "curve": curve_points(run / "curve.csv"),
            "notes": notes.read_text().splitlines() if notes.is_file() else [],
            "words": len(VOCABULARY),
        }
        | ({"program": recipe.program} if recipe.program else {})
    )


def _start(name: str) -> dict:
    """Return the facts about the model that a run continues: those of its own training, and the hash of its weights."""
    row = find_row(name)
    file = Path(row.path) / "training.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    weights = Path(row.path) / WEIGHTS
    return {"weights": (sha256_of(weights) if weights.is_file() else fingerprint(row))[:12], **known}


def export(pipe: Pipeline, folder: Path, training: dict) -> Path:
    """Write a trained pipeline in bf16 as a folder that fluxlab and Diffusers load. Return the folder.

    `training`, the result of `facts`, is written to `training.json` in the same folder.
    """

    def shipped(module):
        return deepcopy(module).to("cpu", torch.bfloat16)

    text = text_with(pipe.text, shipped(Nets(pipe.transformer, pipe.text)))
    whole = Pipeline(
        shipped(pipe.transformer),
        shipped(pipe.autoencoder),
        text,
        pipe.schedule,
        pipe.steps,
        pipe.guidance,
        pipe.max_sequence_length,
        pipe.size,
        distilled=pipe.distilled,
    )
    whole.save(folder)
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    write_manifest(folder)
    return folder
