"""`python -m fluxlab.roles STORE -o FILE`: score the programs of a run by the velocity of one forward.

Reads images, prompts, seeds and programs of a finished run, loads its model, and writes a JSON file: for each cell the
change of the velocity at one noise level (`fluxlab.one_step`), and how many blocks were computed. Takes seconds.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from fluxlab.compose import guarded
from fluxlab.config import Lora, ModelRow
from fluxlab.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0; 2 for an error that the user can fix; 1 for NaN; 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: run(_parser().parse_args(arguments)), "interrupted")


def run(options: argparse.Namespace) -> None:
    """Score the store and print what it cost."""
    from fluxlab.files import write_atomic
    from fluxlab.positions import load_plugins

    load_plugins(options.plugins, "--plugins")
    if not options.out.parent.is_dir():
        raise UserError(f"-o {options.out}: there is no folder {options.out.parent}; create it or name another")
    found = score(options.store, options.sigma)
    write_atomic(options.out, json.dumps(found, indent=1) + "\n")
    share = found["evaluations"] / found["naive"]
    print(f"{options.out}  {found['evaluations']} of {found['naive']} block evaluations ({share:.2f})")


def score(store: Path, sigma: float) -> dict[str, Any]:
    """Return the scores of all variants but the baseline of a finished store, one per (prompt, seed), as plain values.

    Raises `UserError` for a store that is not finished, an unknown op, and as `one_step` does.
    """
    from fluxlab.experiment.reading import read_store
    from fluxlab.one_step import one_step
    from fluxlab.positions import Program
    from fluxlab.sampling import Sampling

    read = read_store(store)
    asked, used = read.record["request"], read.record["settings"]
    if asked.get("references"):
        raise UserError(f"{store}: a run with reference images, which one step does not take")
    variants = [name for name in read.variants if name != read.baseline]
    programs = [Program.from_config(read.record["variants"][name]["program"], name) for name in variants]
    pipe = load(asked["model"], used)
    settings = Sampling(**{key: used[key] for key in ("steps", "height", "width", "guidance", "max_sequence_length")})
    images = [read.open(read.baseline, *place) for place in read.places]
    prompts, seeds = (list(column) for column in zip(*read.places, strict=True))
    found = one_step(pipe, images, prompts, seeds, programs, sigma, settings)
    change = {name: found.change[:, i].tolist() for i, name in enumerate(variants)}
    return {
        "experiment": read.record["digest"],
        "sigma": sigma,
        "places": read.places,
        "unit": "dB, of the squared change of the velocity over its square; -inf is null",
        "change": {
            name: [None if v == float("-inf") else round(v, 6) for v in values] for name, values in change.items()
        },
        "evaluations": found.evaluations,
        "naive": found.naive,
    }


def load(row: dict[str, Any], used: dict[str, Any]) -> Any:
    """Return the pipeline of a store's model in the dtype of its run."""
    import torch

    from fluxlab.loading import load_row

    known = {f.name: row[f.name] for f in fields(ModelRow) if row.get(f.name) is not None}
    if "size" in known:
        known["size"] = tuple(known["size"])
    if "lora" in known:
        known["lora"] = tuple(Lora(**one) for one in known["lora"])
    return load_row(ModelRow(**known), getattr(torch, used["dtype"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fluxlab.roles",
        description="Score the programs of a run by the velocity of one forward.",
        allow_abbrev=False,
    )
    parser.error = _refuse
    parser.add_argument("store", type=Path, metavar="STORE", help="the folder of a finished run")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="a JSON file")
    parser.add_argument("--sigma", type=float, default=0.75, help="noise level, above 0 to 1; default: 0.75")
    parser.add_argument(
        "--plugins", action="append", default=[], metavar="MODULE", help="a module whose ops the programs use"
    )
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}\npython -m fluxlab.roles --help lists the arguments")


if __name__ == "__main__":
    sys.exit(main())
