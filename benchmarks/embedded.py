"""Measure what the embedded model can do, and what the article's edits of img_ids do to it.

    python benchmarks/embedded.py --model runs/train-tiny/pipeline     # about 7 min on 2 CPU cores

writes `embedded.json` and the model card, `README.md`, into the model's folder. `--model tiny` and `--model tiny2`
measure the models that are part of the package. README's table of results is then refreshed by `python docs/tables.py`.

A cell is a held-out caption and a seed: no training scene has the caption's combination of colour, object and word.
The edits change img_ids directly, without `fluxlab.positions`. Captions and initial noise are the same for every edit.
Two controls show how to read the effects: the noise floor shifts all ids by a constant, and another seed draws the
baseline again from different noise.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fluxlab
from fluxlab import sampling, scenes
from fluxlab.config import model_names
from fluxlab.experiment.cells import FLOOR_SHIFT
from fluxlab.experiment.versions import commit
from fluxlab.files import sha256_of
from fluxlab.measure import METRICS, compare, describe, oracle_columns, summarise
from fluxlab.pipeline import Pipeline
from fluxlab.training.card import ATTRIBUTES, shown, write_card
from fluxlab.training.export import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16

COLUMNS = {**{name: name for name in (*ATTRIBUTES, "letters", "ssim")}, "edges": "edge_energy", "size": "thing_size"}
"""The card's columns, and the metric that each shows."""


def unchanged(ids: Tensor) -> Tensor:
    return ids


def axis_zero(ids: Tensor) -> Tensor:
    """Set axis 0 of image ids, which is 0, to 1."""
    return ids + torch.eye(ids.shape[-1])[0]


def shifted(ids: Tensor) -> Tensor:
    """Shift ids by the constant that runs use for their noise floor: not on FLUX.2's axis of text order."""
    return ids + torch.nn.functional.pad(torch.tensor(FLOOR_SHIFT), (0, ids.shape[-1] - len(FLOOR_SHIFT)))


class Row(NamedTuple):
    """One row of the results: what happens to the ids, and whether the initial noise is a different one."""

    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor] = unchanged
    other_seed: bool = False


EDITS = {
    "as trained": Row(unchanged),
    "all zero": Row(lambda ids: ids * 0),
    "× 0.5": Row(lambda ids: ids * 0.5),
    "× 2": Row(lambda ids: ids * 2),
    "× 1.2": Row(lambda ids: ids * 1.2),
    "axis 0 = 1": Row(axis_zero),
}
CONTROLS = {"noise floor": Row(shifted, shifted), "another seed": Row(unchanged, other_seed=True)}
ARTICLE = {
    "as trained": "the original picture",
    "all zero": "image destroyed: position is the only thing that orders the tokens",
    "× 0.5": "blurred, saw-toothed; the lettering still tries to be right",
    "× 2": "structure breaks down, “Hello World” still readable",
    "× 1.2": "nearly normal: the model treats positions as continuous",
    "axis 0 = 1": "layout unchanged, details move",
}
"""What the article reports for FLUX.1 schnell."""


def heldout_captions(count: int, seed: int) -> list[str]:
    """Return full captions of held-out scenes with a sign, in lower case, so that every attribute can be scored."""
    rng = np.random.default_rng(seed)
    captions = []
    while len(captions) < count:
        scene = scenes.sample_scene(rng, (64, 64), "heldout")
        if scene.sign:
            captions.append(scenes.caption(scene, rng, "full").lower())
    return captions


@torch.inference_mode()
def images_of(pipe: Pipeline, captions: Sequence[str], seeds: Sequence[int], row: Row, steps: int) -> np.ndarray:
    """Return uint8 images `(cells, 64, 64, 3)` from the pipeline's own sampler with the row's ids."""
    family, channels = pipe.family, pipe.autoencoder.params.z_channels
    rows, cols = (side // pipe.pixels_per_token for side in pipe.size)
    ids = row.image(family.ids(0, [(rows, cols)])[1])[None].to(pipe.device)
    times = pipe.schedule.times(steps, rows * cols)
    batches = []
    for start in range(0, len(captions), BATCH):
        part = slice(start, start + BATCH)
        encoded = [pipe.encode_prompt(text) for text in captions[part]]
        txt, *pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        txt_ids = row.text(family.ids(txt.shape[1], [])[0])[None].to(pipe.device)

        def velocity(x: Tensor, t: float, txt=txt, pooled=pooled, txt_ids=txt_ids) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            return pipe.transformer(x.to(pipe.dtype), ids, txt, txt_ids, times, *pooled)

        noise = family.noise(seeds[part], channels, rows, cols, torch.float32)
        x = sampling.euler(velocity, noise.to(pipe.device), times)
        batches.append((pipe.decode(x, rows, cols, "pt") * 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(batches).numpy()


def scores(
    images: np.ndarray, baseline: np.ndarray, captions: Sequence[str], seeds: Sequence[int], period: int
) -> dict[str, list[float | None] | None]:
    """Return every number of `COLUMNS` with its interval, for the images of one row. period: pixels per token."""
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
    by_metric = {row["metric"]: row for row in summarise(rows, "edit", list(COLUMNS.values()))}
    return {name: interval(by_metric[metric]) for name, metric in COLUMNS.items()}


def two_word_scores(images: np.ndarray, captions: Sequence[str], seeds: Sequence[int], period: int) -> dict[str, Any]:
    """Return the scores of the cells that ask for a sign with two words: their number, `word` and `letters`."""
    cells = [i for i, caption in enumerate(captions) if len(scenes.parse(caption).sign or ()) == 2]
    if not cells:
        return {"cells": 0}
    chosen = images[cells], [captions[i] for i in cells], [seeds[i] for i in cells]
    every = scores(chosen[0], chosen[0], chosen[1], chosen[2], period)
    return {"cells": len(cells), "word": every["word"], "letters": every["letters"]}


def interval(row: Mapping[str, Any]) -> list[float | None] | None:
    """Return [mean, low, high] of a summary row. None if it has no value; low and high are None for a single value."""
    mean, low, high = (None if math.isnan(row[end]) else float(row[end]) for end in ("mean", "low", "high"))
    return None if mean is None else [mean, low, high]


def sheet(file: Path, rows: Sequence[np.ndarray], count: int = 8, zoom: int = 2) -> None:
    """Write a PNG of the first images of every row."""
    from PIL import Image

    whole = Image.fromarray(np.concatenate([np.concatenate(list(images[:count]), axis=1) for images in rows]))
    whole.resize((whole.width * zoom, whole.height * zoom), Image.Resampling.NEAREST).save(file)


def table(results: dict) -> str:
    """Return the results as text, one line per edit and control."""
    rows = {**results["edits"], **results.get("controls", {})}
    names = list(results["edits"]["as trained"])
    lines = [f"{'':12}" + "".join(f"{name:>24}" for name in names)]
    for edit, row in rows.items():
        lines.append(f"{edit:12}" + "".join(f"{shown(row[name], name):>24}" for name in names))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name under configs/model or a folder")
    parser.add_argument("--cells", type=int, default=128)
    parser.add_argument("--first-seed", type=int, default=0, help="other captions and seeds; the card is not written")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sheet", type=Path, help="also write a PNG of the first images of every row")
    parser.add_argument("--no-card", action="store_true", help="only print: write neither embedded.json nor the card")
    parser.add_argument("--only-baseline", action="store_true", help="skip the edits and controls")
    arguments = parser.parse_args()

    shipped = ROOT / "fluxlab" / "assets" / arguments.model
    folder = shipped if shipped.is_dir() and arguments.model in model_names() else Path(arguments.model)
    pipe = fluxlab.load_pipeline(arguments.model, dtype=getattr(torch, arguments.dtype))
    if pipe.max_sequence_length > 77:  # a bare folder does not state its text length; its tokenizer does
        tokenizer = pipe.text.tokenizer
        pipe.max_sequence_length, pipe.size = tokenizer.model_max_length, (64, 64)
    first = arguments.first_seed
    captions, seeds = heldout_captions(arguments.cells, first + 1), list(range(first, first + arguments.cells))
    results = {
        "model": arguments.model,
        "weights": sha256_of(folder / WEIGHTS)[:12],
        "cells": arguments.cells,
        "steps": arguments.steps,
        "commit": commit(),
        "units": {name: METRICS[metric].unit for name, metric in COLUMNS.items() if METRICS[metric].unit},
        "edits": {},
        "controls": {},
        "sentences": ARTICLE,
    }
    made: list[np.ndarray] = []
    for name, row in {**EDITS, **CONTROLS}.items():
        drawn_from = [seed + arguments.cells for seed in seeds] if row.other_seed else seeds
        made.append(images_of(pipe, captions, drawn_from, row, arguments.steps))
        group = results["controls" if name in CONTROLS else "edits"]
        group[name] = scores(made[-1], made[0], captions, seeds, pipe.pixels_per_token)
        if name == "as trained":
            results["two_words"] = two_word_scores(made[0], captions, seeds, pipe.pixels_per_token)
        print(f"{name}: done", file=sys.stderr, flush=True)
        if arguments.only_baseline:
            break
    print(table(results))
    print(f"signs with two words: {results['two_words']}")
    if arguments.sheet:
        sheet(arguments.sheet, made)
    if not (arguments.no_card or arguments.only_baseline or first):
        (folder / "embedded.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        write_card(results, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
