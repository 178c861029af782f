"""Run the experiments that README and docs quote on the embedded model: `python docs/results.py`, about 50 min on 2 CPU
cores. `python docs/results.py step_window` runs one of them. `--runs FOLDER` keeps the run folders and resumes them:
`--runs runs/figures` takes those that `make figures` has made.

Writes `docs/results.json`: rows of each run's `summary.csv`, or of the table of its figure. Run it when the embedded
model changes, and after it `python docs/tables.py`.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "fluxlab" / "assets"
FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"
WEIGHTS = ASSETS / "tiny" / FILE
WEIGHTS2 = ASSETS / "tiny2" / FILE
RESULTS = ROOT / "docs" / "results.json"
QUOTED = {
    "step_window": ("ssim", "object"),
    "freeflux_probe": ("psnr",),
    "trace": (),
    "text_order": ("ssim", "place", "colour", "shape", "letters"),
    **dict.fromkeys(("dose_response", "dose_edits", "step_roles"), ("ssim", "psnr")),
    **dict.fromkeys(
        ("methods", "methods_2x"), ("score", "things", "place", "letters", "all_right", "size", "sharpness")
    ),
    "atlas": (),
    **dict.fromkeys(("inpaint", "upscale", "upscale_beyond"), ()),
    **dict.fromkeys(("relocation", "learn_relocation"), ()),
}
"""Experiment: metrics that are kept. Of those without metrics, and of `methods`, what their figures read instead.

`atlas` is two attributions and a run of their ablation. `learn_relocation` is a search.
"""


def main(arguments: Sequence[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from experiments import every
    from fluxlab import run
    from fluxlab.files import sha256_of

    parser = argparse.ArgumentParser("results")
    parser.add_argument(
        "experiments", nargs="*", metavar="experiment", help=f"some of {', '.join(QUOTED)}; default: all"
    )
    parser.add_argument("--runs", type=Path, help="where the run folders are; default: a temporary folder")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.experiments if name not in QUOTED]:
        parser.error(f"{unknown[0]}: not quoted, expected some of {', '.join(QUOTED)}")
    weights = {"weights": sha256_of(WEIGHTS)[:12], "weights of tiny2": sha256_of(WEIGHTS2)[:12]}
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    same = all(before.get(key) == value for key, value in weights.items())
    results: dict = weights | (before if same else {})
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.experiments or QUOTED:
            out = (asked.runs or Path(temporary)) / name
            if name == "learn_relocation":
                results[name] = learned(out)
                continue
            if name == "atlas":
                results[name] = atlas(out.parent)
                continue
            if code := run.main(every.run_of(name, out.parent, ["device=cpu"])):
                return code
            if name == "trace":
                results[name] = transfers(out)
            elif name == "relocation":
                results[name] = moved(out)
            elif name in ("inpaint", "upscale", "upscale_beyond"):
                results[name] = worked(out)
            else:
                results[name] = (methods if name.startswith("methods") else rows)(out, QUOTED[name])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def atlas(runs: Path) -> dict[str, Any]:
    """Run the commands of the figure `atlas` but for its script, and return the numbers that it shows."""
    from experiments import every
    from experiments.atlastable import numbers, rounded
    from fluxlab import ablation, run
    from fluxlab.experiment.reading import read_store
    from fluxlab.learning import attribute, read_attribution

    mains = {"fluxlab.attribution": attribute.main, "fluxlab.ablation": ablation.main, "fluxlab.run": run.main}
    for module, *arguments in every.commands("atlas", runs, runs, ["device=cpu"]):
        if module in mains and mains[module](arguments):
            raise SystemExit(f"python -m {module} {' '.join(arguments)}: failed")
    found = [read_attribution(runs / f"atlas_{name}") for name in ("place", "loss")]
    return rounded(numbers(*found, read_store(runs / "atlas")))


def rows(store: Path, metrics: Sequence[str]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return a store's summary: variant → metric → n, mean, low and high.

    first: the value of the first prompt and seed, which a test computes again.
    """
    from fluxlab.experiment.reading import read_store

    run, found = read_store(store), {}
    first = {}
    for row in run.metrics:
        first.setdefault(row["variant"], row)
    for row in run.summary:
        name, metric = row["variant"], row["metric"]
        if metric in metrics:
            numbers = {key: row[key] for key in ("n", "mean", "low", "high")}
            if name in first:  # controls are not among the cells
                numbers["first"] = first[name][metric]
            finite = {key: None if math.isnan(value) else round(value, 6) for key, value in numbers.items()}
            found.setdefault(name, {})[metric] = finite
    return found


def transfers(store: Path) -> dict[str, dict[str, dict[str, float | int]]]:
    """Return how many images of a trace have the source's attribute: "text → image, block 0" → attribute → numbers.

    Patches of a part of the steps are left out.
    """
    from experiments.tracetable import patches, table_rows
    from fluxlab.experiment.reading import read_store

    run = read_store(store)
    every = [patch for patch in patches(run) if patch.kind != "steps"]
    names, found = {patch.variant: f"{patch.quadrant}, {patch.where}" for patch in every}, {}
    for row in table_rows(run, every):
        if row["variant"] in names:
            ends = {"mean": "source", "low": "source_low", "high": "source_high"}
            numbers = {"n": row["n"], **{key: round(row[column], 6) for key, column in ends.items()}}
            found.setdefault(names[row["variant"]], {})[row["attribute"]] = numbers
    return found


def moved(store: Path) -> dict[str, Any]:
    """Return where things are when their phrase is moved: condition → column of the figure's table → numbers.

    "first": the centre of the thing in pixels, at the first prompt and seed, of a box of each condition.
    """
    from experiments.relocationtable import COLUMNS, conditions, targets
    from fluxlab.experiment.reading import read_store
    from fluxlab.measure.summary import CONTROLS

    run = read_store(store)
    chosen, found = targets(run), {}
    for row in conditions(run, chosen):
        columns = {of: {end: row[f"{of}_{end}"] for end in ("low", "high")} for of in ("chance", "seeds")}
        for column in COLUMNS:
            ends = {"mean": row[column], "low": row[f"{column}_low"], "high": row[f"{column}_high"]}
            columns[column] = {"n": row["n"], "pairs": row["pairs"], **ends}
        found[row["condition"]] = {
            name: {end: None if math.isnan(value) else round(value, 6) for end, value in numbers.items()}
            for name, numbers in columns.items()
        }
        cell = run.cell(chosen[row["condition"]][-1].variant, *run.places[0])
        place = (cell[name] for name in ("thing_row", "thing_col"))
        found[row["condition"]]["first"] = [None if math.isnan(value) else round(value, 3) for value in place]
    for effect in run.effects:
        if effect.metric == "thing_moved" and effect.variant in CONTROLS:
            side = run.record["settings"]["width"]
            ends = {"mean": effect.value, "low": effect.low, "high": effect.high}
            shares = {key: None if math.isnan(value) else round(value / side, 6) for key, value in ends.items()}
            found[effect.variant] = {"n": effect.n, **shares}
    return found


def worked(store: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the means of a run with a task, as its figure has them: variant → measure → numbers."""
    from experiments import inpaint, taskfigure, upscale
    from fluxlab.experiment.reading import read_store

    run = read_store(store)
    about = (inpaint if run.record["name"] == "inpaint" else upscale).ABOUT
    return taskfigure.numbers(run, about)


def learned(out: Path) -> dict[str, Any]:
    """Learn as `+exp=learn_relocation` says, and compare with the programs of `+exp=relocation` for the same box.

    On the held-out prompts with 16 seeds each.
    """
    import yaml

    import fluxlab
    from experiments.relocationtable import targets_of
    from fluxlab import learn
    from fluxlab.config import config_folder
    from fluxlab.experiment.each import expanded
    from fluxlab.positions import Program

    if learn.main(["+exp=learn_relocation", f"out={out}", "tracking=none"]):
        raise SystemExit(f"{out}: the search failed")
    result = json.loads((out / "result.json").read_text())
    found = yaml.safe_load((out / "exp" / "learn_relocation_learned.yaml").read_text())
    by_hand = yaml.safe_load((config_folder() / "exp" / "relocation.yaml").read_text())["variants"]
    programs = {"learned": found["variants"]["learned"], **expanded(by_hand, 0)}
    chosen = targets_of({name: Program.from_config(program) for name, program in programs.items()})
    (box,) = (target.box for target in chosen["learned"])
    compared = ("learned", "mask", "early_mask", "move_mask")
    same = [target.variant for name in compared for target in chosen[name] if target.box == box]
    experiment = fluxlab.make_experiment(
        found["prompts"],
        {name: programs[name] for name in same},
        seeds=16,
        sampling=fluxlab.Sampling(steps=found["steps"], device="cpu"),
        name="learn_relocation_held_out",
        caption="a learned program next to those of +exp=relocation for the same box",
    )
    fluxlab.run_experiment(experiment, out / "held_out")
    summary = {"values": result["values"], "attention": result["held_out"], "cells": result["cells"][1]}
    return summary | moved(out / "held_out")


def methods(store: Path, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what the oracle reads in enlarged images: variant → metric → numbers.

    "held out" has the best composition against the best method alone, on prompts that chose neither.
    """
    from experiments.methodtable import held_out, scores, table_rows
    from fluxlab.experiment.reading import read_store

    def ends(mean: float, low: float, high: float, n: int) -> dict[str, float | int | None]:
        numbers = {"n": n, "mean": mean, "low": low, "high": high}
        return {key: None if math.isnan(value) else round(value, 6) for key, value in numbers.items()}

    run = read_store(store)
    read = scores(run)
    first = {row["variant"]: row for row in reversed(read)}
    found: dict[str, dict[str, Any]] = {}
    for row in table_rows(run, read):
        name, of = row["variant"], {}
        for metric in metrics:
            values = (row[metric + end] for end in ("", "_low", "_high"))
            value = first[name][metric]
            of[metric] = ends(*values, row["n"]) | {"first": None if math.isnan(value) else round(value, 6)}
        found[name] = of
    pairs = held_out(run, read)
    halves = {
        f"chosen by half {i}": {"alone": alone, "composed": composed, "difference": ends(*difference, n)}
        for i, ((alone, composed), difference, n) in enumerate(
            zip(pairs.chosen, pairs.difference, pairs.counts, strict=True), 1
        )
    }
    listed = {key: getattr(pairs, key) for key in ("best", "above", "below", "compared")}
    found["held out"] = halves | {"both": ends(*pairs.pooled, pairs.n)} | listed
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
