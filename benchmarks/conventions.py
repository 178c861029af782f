"""Measure small models that were trained alike but for their position convention, and how much of each edit they bear.

    for name in convention convention_index convention_text_line convention_sine_cosine; do
        python -m fluxlab.train +train=$name
    done
    python benchmarks/conventions.py --runs runs                       # about 4 min on one free core

writes `docs/conventions.json`, which docs and `python -m experiments.conventions` read, and `docs/conventions.png`, a
strip of images. Every edit comes before the program that a model was trained with: it changes positions relative to the
model's own convention. Captions and noise are the same for every edit and every model. Two controls: the noise floor
shifts all ids by a constant, and another seed draws the baseline again from different noise.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fluxlab
from fluxlab import scenes
from fluxlab.errors import UserError
from fluxlab.experiment.cells import FLOOR_SHIFT
from fluxlab.experiment.versions import commit
from fluxlab.files import sha256_of
from fluxlab.measure import compare, oracle_columns, summarise
from fluxlab.pipeline import Pipeline
from fluxlab.positions import Program
from fluxlab.positions.shift_invariance import shifted
from fluxlab.training.export import WEIGHTS

DOCS = Path(__file__).resolve().parent.parent / "docs"
BATCH, STEPS = 32, 10
CONVENTIONS = {
    "flux1": "train-convention",
    "index": "train-convention-index",
    "text_line": "train-convention-text-line",
    "sine_cosine": "train-convention-sine-cosine",
}
"""The conventions, and the folder of the training run of each."""

PLANE = ["row", "col"]
EDITS: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "all zero": {"a": {"op": "zero", "axes": PLANE}},
    "× 0.5": {"a": {"op": "scale", "factor": 0.5, "axes": PLANE}},
    "× 2": {"a": {"op": "scale", "factor": 2, "axes": PLANE}},
    "× 1.2": {"a": {"op": "scale", "factor": 1.2, "axes": PLANE}},
    "index + 1": {"a": {"op": "offset", "by": [1, 0, 0]}},
    "index + 4": {"a": {"op": "offset", "by": [4, 0, 0]}},
    "index + 16": {"a": {"op": "offset", "by": [16, 0, 0]}},
    "rows + 1": {"a": {"op": "offset", "by": [0, 1, 0]}},
    "rows + 4": {"a": {"op": "offset", "by": [0, 4, 0]}},
    "columns + 1": {"a": {"op": "offset", "by": [0, 0, 1]}},
    "columns + 4": {"a": {"op": "offset", "by": [0, 0, 4]}},
}
METRICS = ("object", "colour", "place", "shape", "right", "ssim")
"""What is measured. right: object, colour and place are all as the caption says."""

SHOWN = ("a red fox on the left", "a blue star at the top")
"""The captions of the strip."""


def captions(count: int, size: tuple[int, int]) -> list[str]:
    """Return the full captions of random scenes of one thing. None is held out from training: all 360 can occur."""
    rng = np.random.default_rng(1)
    return [scenes.caption(scenes.sample_thing(rng, size), rng, "full").lower() for _ in range(count)]


def images_of(pipe: Pipeline, texts: Sequence[str], seeds: Sequence[int], program: Program) -> np.ndarray:
    """Return uint8 images `(cells, height, width, 3)`."""
    parts = []
    for start in range(0, len(texts), BATCH):
        cells = slice(start, start + BATCH)
        images = pipe.generate(list(texts[cells]), list(seeds[cells]), program, steps=STEPS, output="pt")
        parts.append((images.float() * 255).round().byte().permute(0, 2, 3, 1))
    return torch.cat(parts).numpy()


def measured(
    images: np.ndarray, baseline: np.ndarray, texts: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Return [mean, low, high] of each of `METRICS`."""
    rows = []
    for image, before, text, seed in zip(images, baseline, texts, seeds, strict=True):
        found = oracle_columns(image, text)
        found["right"] = float(found["object"] == found["colour"] == found["place"] == 1)
        rows.append({"variant": "edit", "prompt": text, "seed": seed, **compare(image, before), **found})
    means = {row["metric"]: row for row in summarise(rows, "edit", list(METRICS))}
    return {name: [round(float(means[name][end]), 4) for end in ("mean", "low", "high")] for name in METRICS}


def measure(folder: Path, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return the results of a training run's model, and its row of the strip."""
    made = folder / "pipeline"
    if not (made / "training.json").is_file():
        raise UserError(f"{made}: no trained model; first python -m fluxlab.train +train=… out={folder}")
    training = json.loads((made / "training.json").read_text())
    pipe = fluxlab.load_pipeline(made, dtype=torch.float32, device="cpu", cache="none")
    pipe.size, pipe.max_sequence_length = (32, 32), 8  # of the recipe; a folder does not state them
    own = Program.from_config(training.get("program"))
    texts, seeds = captions(count, pipe.size), list(range(count))
    programs = {name: Program.from_config(edit) + own for name, edit in EDITS.items()}
    programs["noise floor"] = shifted(own, list(FLOOR_SHIFT))
    found: dict[str, Any] = {}
    strip: list[np.ndarray] = []
    baseline = images_of(pipe, texts, seeds, own)
    for name, program in programs.items():
        images = baseline if name == "unchanged" else images_of(pipe, texts, seeds, program)
        found[name] = measured(images, baseline, texts, seeds)
        if name in EDITS:
            strip += list(images_of(pipe, SHOWN, [0] * len(SHOWN), program))
        print(f"{folder.name}, {name}: {found[name]['right'][0]:.2f} right", file=sys.stderr, flush=True)
    again = images_of(pipe, texts, [seed + count for seed in seeds], own)
    found["another seed"] = measured(again, baseline, texts, seeds)
    facts = {key: training[key] for key in ("steps", "samples", "commit")}
    facts["command"] = re.sub(r" out=\S+", "", training["command"])
    parameters = sum(p.numel() for part in (pipe.transformer, pipe.text.clip, pipe.text.t5) for p in part.parameters())
    result = {"program": own.to_config(), "weights": sha256_of(made / WEIGHTS)[:12], "parameters": parameters}
    return {**result, "training": facts, "edits": found}, np.concatenate(strip, axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the training runs")
    parser.add_argument("--cells", type=int, default=128, help="images for each edit")
    parser.add_argument("--only", choices=CONVENTIONS, help="measure one model and keep the results of the others")
    parser.add_argument("-o", "--out", type=Path, default=DOCS / "conventions.json")
    chosen = parser.parse_args(arguments)
    known: Mapping[str, Any] = json.loads(chosen.out.read_text()) if chosen.only and chosen.out.is_file() else {}
    models, file = dict(known.get("models", {})), chosen.out.with_suffix(".png")
    strips = {}
    if known:
        with Image.open(file) as whole:
            rows = np.split(np.asarray(whole), len(models))
        strips = dict(zip(models, rows, strict=True))
    for name in [chosen.only] if chosen.only else CONVENTIONS:
        models[name], strips[name] = measure(chosen.runs / CONVENTIONS[name], chosen.cells)
    order = [name for name in CONVENTIONS if name in models]
    results = {"cells": chosen.cells, "steps": STEPS, "commit": commit(), "shown": list(SHOWN), "edits": EDITS}
    results["models"] = {name: models[name] for name in order}
    chosen.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    Image.fromarray(np.concatenate([strips[name] for name in order])).save(file, optimize=True)
    print(f"{chosen.out}\n{file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
