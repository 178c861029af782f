"""Cells, their keys, and the batches that they are computed in: pure functions of the experiment."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fluxlab.experiment.spec import REFERENCE_NAMES, SCHEMA, Experiment
from fluxlab.positions import Program, shifted
from fluxlab.sampling import Sampling

FLOOR_SHIFT = (3.0, -2.5, 7.0)
"""The constant that the noise floor shifts all ids by: (index, row, col), as the parity tests have it."""


@dataclass(frozen=True)
class Settings:
    """How an experiment is computed, once its model, device and store are known; a resume takes the store's.

    What the pictures depend on comes first, and is in every cell's key. batch_tokens, threads and kernel change their
    last bits only.
    """

    model_digest: str
    height: int
    width: int
    steps: int
    schedule: dict[str, Any]
    guidance: float | None
    true_cfg: float | None
    negative_prompt: str | None
    max_sequence_length: int
    device: str
    dtype: str
    batch_tokens: int
    threads: int
    kernel: str
    tokens: int
    pixels_per_token: int

    @property
    def sampling(self) -> Sampling:
        """What `Pipeline.sample` takes."""
        return Sampling(
            steps=self.steps,
            height=self.height,
            width=self.width,
            guidance=self.guidance,
            true_cfg=self.true_cfg,
            negative_prompt=self.negative_prompt,
            max_sequence_length=self.max_sequence_length,
        )


_NOT_IN_KEY = ("batch_tokens", "threads", "kernel", "tokens", "pixels_per_token", "device")


@dataclass(frozen=True)
class Cell:
    """One (variant, prompt, seed). Cells of one key are one picture: variants may come to the same program."""

    variant: str
    prompt: str
    seed: int
    program: Program
    key: str


def cell_key(settings: Settings, prompt: str, seed: int, program: Program) -> str:
    """32 hex digits of everything that determines a picture; free of the names of variants, files and machines."""
    parts = {
        "schema": SCHEMA,
        **{key: value for key, value in asdict(settings).items() if key not in _NOT_IN_KEY},
        "device": settings.device.split(":")[0],
        "prompt": prompt,
        "seed": int(seed),
        "program": program.digest,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cells(experiment: Experiment, settings: Settings) -> list[Cell]:
    """Every cell in the experiment's order: the baseline first, then variants as listed; prompts; seeds."""
    names = sorted(experiment.variants, key=lambda name: name != experiment.baseline)
    return [
        _cell(name, experiment.variants[name], prompt, seed, settings)
        for name in names
        for prompt in experiment.prompts
        for seed in experiment.seeds
    ]


def references(experiment: Experiment, settings: Settings) -> list[Cell]:
    """What effects are quoted beside: for every prompt the noise floor at the first seed, and where the experiment has
    one seed only, the baseline at its neighbour for the ceiling.
    """
    untouched, first = experiment.variants[experiment.baseline], experiment.seeds[0]
    floor, ceiling = REFERENCE_NAMES
    made = [
        _cell(floor, shifted(untouched, list(FLOOR_SHIFT)), prompt, first, settings) for prompt in experiment.prompts
    ]
    if len(experiment.seeds) == 1:
        made += [_cell(ceiling, untouched, prompt, first ^ 1, settings) for prompt in experiment.prompts]
    return made


def _cell(variant: str, program: Program, prompt: str, seed: int, settings: Settings) -> Cell:
    return Cell(variant, prompt, seed, program, cell_key(settings, prompt, seed, program))


def batches(cells: Sequence[Cell], settings: Settings) -> list[list[Cell]]:
    """Distinct cells in order, as many at a time as `batch_tokens` allows, and at least one."""
    distinct: dict[str, Cell] = {}
    for cell in cells:
        distinct.setdefault(cell.key, cell)
    in_order, size = list(distinct.values()), max(1, settings.batch_tokens // settings.tokens)
    return [in_order[i : i + size] for i in range(0, len(in_order), size)]
