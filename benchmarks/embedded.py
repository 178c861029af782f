"""What the embedded model can do, and what the article's edits of img_ids do to it. The model card is made from it.

    python benchmarks/embedded.py --model runs/train-tiny/pipeline     # about 10 min on 2 CPU cores

writes `embedded.json` and the card, `README.md`, into the model's folder (`--model tiny`: the one that ships).

Cells are (held-out caption, seed) pairs: combinations that no training scene has. The edits are given to the
transformer as img_ids, with nothing of fluxlab.positions in between; text and noise are the baseline's.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fluxlab
from fluxlab import sampling, scenes
from fluxlab.experiment.versions import commit
from fluxlab.measure import METRICS, compare, describe, oracle_columns, summarise
from fluxlab.pipeline import Pipeline
from fluxlab.training.card import ATTRIBUTES, shown, write_card

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
COLUMNS = {**{name: name for name in (*ATTRIBUTES, "letters", "ssim")}, "edges": "edge_energy", "size": "thing_size"}
"""What the card shows, and the metric that it is."""


def axis_zero(ids: Tensor) -> Tensor:
    """The ids with 1 on axis 0."""
    return ids + torch.tensor([1.0, 0.0, 0.0])


EDITS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "as trained": (lambda ids: ids, "the original picture"),
    "all zero": (lambda ids: ids * 0, "image destroyed: position is the only thing that orders the tokens"),
    "× 0.5": (lambda ids: ids * 0.5, "blurred, saw-toothed; the lettering still tries to be right"),
    "× 2": (lambda ids: ids * 2, "structure breaks down, “Hello World” still readable"),
    "× 1.2": (lambda ids: ids * 1.2, "nearly normal: the model treats positions as continuous"),
    "axis 0 = 1": (axis_zero, "layout unchanged, details move"),
}


def heldout_captions(count: int, seed: int) -> list[str]:
    """Full captions of held-out scenes with a sign, in lower case, so that every attribute is asked for."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        scene = scenes.sample_scene(rng, (64, 64), "heldout")
        if scene.sign:
            found.append(scenes.caption(scene, rng, "full").lower())
    return found


@torch.inference_mode()
def pictures(
    pipe: Pipeline, captions: Sequence[str], seeds: Sequence[int], edit: Callable[[Tensor], Tensor], steps: int
) -> np.ndarray:
    """uint8 `(cells, 64, 64, 3)`: the pipeline's own sampler, with `edit` applied to img_ids."""
    rows, cols = (side // pipe.pixels_per_token for side in pipe.size)
    ids = edit(sampling.image_ids(1, rows, cols)).to(pipe.device)
    times = pipe.schedule.times(steps, rows * cols)
    made = []
    for start in range(0, len(captions), BATCH):
        part = slice(start, start + BATCH)
        txt, y = (torch.cat(both) for both in zip(*(pipe.encode_prompt(text) for text in captions[part]), strict=True))
        factor = pipe.autoencoder.params.factor
        z = sampling.noise(
            seeds[part], pipe.autoencoder.params.z_channels, pipe.size[0] // factor, pipe.size[1] // factor
        )
        txt_ids = sampling.text_ids(1, txt.shape[1]).to(pipe.device)

        def velocity(x: Tensor, t: float, txt=txt, y=y, txt_ids=txt_ids) -> Tensor:
            return pipe.transformer(x.to(pipe.dtype), ids, txt, txt_ids, torch.full((len(x),), t, device=x.device), y)

        x = sampling.euler(velocity, sampling.pack(z).to(pipe.device), times)
        made.append((pipe.decode(x, rows, cols, "pt") * 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(made).numpy()


def scores(
    images: np.ndarray, baseline: np.ndarray, captions: Sequence[str], seeds: Sequence[int], period: int
) -> dict[str, list[float | None] | None]:
    """Every number of `COLUMNS` with its interval, for the pictures of one edit. period: pixels per token."""
    rows = [
        {
            "variant": "edit",
            "prompt": caption,
            "seed": seed,
            **compare(image, before),
            **describe(image, period),
            **oracle_columns(image, caption),
        }
        for image, before, caption, seed in zip(images, baseline, captions, seeds, strict=True)
    ]
    found = {row["metric"]: row for row in summarise(rows, "edit", list(COLUMNS.values()))}
    return {name: interval(found[metric]) for name, metric in COLUMNS.items()}


def interval(row: Mapping[str, Any]) -> list[float | None] | None:
    """[mean, low, high] of a summary's row; None without a value, and for the bounds of a single one."""
    mean, low, high = (None if math.isnan(row[end]) else float(row[end]) for end in ("mean", "low", "high"))
    return None if mean is None else [mean, low, high]


def sheet(file: Path, rows: Sequence[np.ndarray], count: int = 8, zoom: int = 2) -> None:
    """The first pictures of every edit, an edit a row."""
    from PIL import Image

    whole = Image.fromarray(np.concatenate([np.concatenate(list(images[:count]), axis=1) for images in rows]))
    whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).save(file)


def table(results: dict) -> str:
    """The results as text, a line an edit."""
    names = list(results["edits"]["as trained"])
    lines = [f"{'':12}" + "".join(f"{name:>24}" for name in names)]
    for edit, row in results["edits"].items():
        lines.append(f"{edit:12}" + "".join(f"{shown(row[name], name):>24}" for name in names))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name under configs/model or a folder")
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sheet", type=Path, help="also write a PNG of the first pictures of every edit")
    parser.add_argument("--no-card", action="store_true", help="only print: write neither embedded.json nor the card")
    parser.add_argument("--only-baseline", action="store_true", help="leave the edits out")
    arguments = parser.parse_args()

    pipe = fluxlab.load_pipeline(arguments.model, dtype=getattr(torch, arguments.dtype))
    if pipe.max_sequence_length > 77:  # a bare folder does not say its text length; its tokenizer does
        pipe.max_sequence_length, pipe.size = pipe.text.t5_tokenizer.model_max_length, (64, 64)
    captions, seeds = heldout_captions(arguments.cells, seed=1), list(range(arguments.cells))
    results = {
        "model": arguments.model,
        "cells": arguments.cells,
        "steps": arguments.steps,
        "commit": commit(),
        "units": {name: METRICS[metric].unit for name, metric in COLUMNS.items() if METRICS[metric].unit},
        "edits": {},
        "sentences": {},
    }
    rows = []
    for name, (edit, sentence) in EDITS.items():
        images = pictures(pipe, captions, seeds, edit, arguments.steps)
        rows.append(images)
        results["edits"][name] = scores(images, rows[0], captions, seeds, pipe.pixels_per_token)
        results["sentences"][name] = sentence
        print(f"{name}: done", file=sys.stderr, flush=True)
        if arguments.only_baseline:
            break
    print(table(results))
    if arguments.sheet:
        sheet(arguments.sheet, rows)
    if not arguments.no_card and not arguments.only_baseline:
        folder = ROOT / "fluxlab/assets/tiny" if arguments.model == "tiny" else Path(arguments.model)
        (folder / "embedded.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_card(results, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
