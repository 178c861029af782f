"""Cells, their keys, and the batches they are computed in: pure functions of the experiment and its settings."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fluxlab.experiment.cell import Cell
from fluxlab.experiment.reference_images import grids, tokens
from fluxlab.experiment.sources import meeting, places_of
from fluxlab.experiment.spec import FIRST, REFERENCE_NAMES, SCHEMA, Experiment, unchanged
from fluxlab.positions import (
    Action,
    Program,
    actions,
    has_interventions,
    measuring_steps,
    region_prompts,
    shifted,
    with_sources,
)
from fluxlab.sampling import Sampling, Schedule, shared_rows

FLOOR_SHIFT = (3.0, -2.5, 7.0)
"""The constant by which the noise floor shifts all ids: (index, row, col). The parity tests use the same."""


@dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """How an experiment is computed, once its model, device and store are known. A resumed run uses the store's.

    Of `Sampling`, nothing is None but what the model does not have. batch_tokens, threads and kernel change the last
    bits of an image only and are not in the cell's key. trained: rows, columns and text tokens of the model's own size,
    on which some ops depend; None in older stores. dtype: of all parts of the model, such as float32+bfloat16.
    """

    model_digest: str
    schedule: dict[str, Any]
    batch_tokens: int
    threads: int
    kernel: str
    tokens: int
    pixels_per_token: int
    trained: list[int] | None = None

    @property
    def sampling(self) -> Sampling:
        """What `Pipeline.sample` takes, for a model that is loaded already."""
        values = {f.name: getattr(self, f.name) for f in fields(Sampling)}
        return Sampling(**{**values, "dtype": None, "device": None})

    def record(self) -> dict[str, Any]:
        """Return the settings as plain values for YAML."""
        left_out = {*unchanged(self), *(["trained"] if self.trained is None else [])}
        return {key: value for key, value in asdict(self).items() if key not in left_out}


REQUIRED = {f.name for f in fields(Settings)} - {f.name for f in fields(Sampling)} | {*FIRST, "max_sequence_length"}
REQUIRED -= {"trained"}
"""The settings that every store records."""

_NOT_IN_KEY = ("batch_tokens", "threads", "kernel", "tokens", "pixels_per_token", "device", "trained")


@dataclass(frozen=True)
class Batch:
    """Distinct cells that are computed together, and the folder of the store that their images belong in.

    number: its position among all batches of the experiment. It says which shard computes the batch.
    """

    number: int
    folder: str
    cells: tuple[Cell, ...]


def cell_key(
    settings: Settings,
    prompt: str,
    seed: int,
    program: Program,
    takes_from: Sequence[str] = (),
    references: Sequence[str] = (),
    task: Sequence[Any] | None = None,
    depends_on_training: bool = False,
) -> str:
    """Return 32 hex digits of everything that determines an image. Names of variants, files and machines do not."""
    if takes_from:
        program = with_sources(program, [{"cell": key} for key in takes_from])
    parts = {
        "schema": SCHEMA,
        **{key: value for key, value in settings.record().items() if key not in _NOT_IN_KEY},
        "device": settings.device.split(":")[0],
        "prompt": prompt,
        "seed": int(seed),
        "program": program.digest,
        **({"trained": settings.trained} if program.depends_on_training or depends_on_training else {}),
    }
    if references:  # the hashes of reference images; keys without any are those of earlier releases
        parts["references"] = list(references)
    if task:  # its digest, and the hashes of what it works on
        parts["task"] = list(task)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def each_cell(
    experiment: Experiment,
    settings: Settings,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Cell]:
    """Yield the cells in the experiment's order: the baseline first, then variants as listed; prompts; seeds.

    prompts, seeds: those whose cells are yielded; None means all.
    """
    for name in experiment.names:
        for prompt in experiment.prompts if prompts is None else prompts:
            for seed in experiment.seeds if seeds is None else seeds:
                yield _cell(experiment, name, experiment.variants[name], prompt, seed, settings)


def cells(experiment: Experiment, settings: Settings, prompts: Sequence[str] | None = None) -> list[Cell]:
    """Return the cells of `each_cell` as a list: of some prompts, since a large experiment has millions."""
    return list(each_cell(experiment, settings, prompts))


def references(experiment: Experiment, settings: Settings, prompts: Sequence[str] | None = None) -> list[Cell]:
    """Return the cells of the two controls that are not cells of the experiment.

    For every prompt, the noise floor at the first seed. With one seed, also the baseline at a neighbouring seed, which
    is the control "another seed"; with several seeds that control uses the baseline's own cells.
    prompts: as for `cells`.
    """
    baseline, seed = experiment.variants[experiment.baseline], experiment.seeds[0]
    noise_floor, another_seed = REFERENCE_NAMES
    shifted_ids = shifted(baseline, list(FLOOR_SHIFT))
    prompts = experiment.prompts if prompts is None else prompts
    controls = [_cell(experiment, noise_floor, shifted_ids, prompt, seed, settings) for prompt in prompts]
    if len(experiment.seeds) == 1:
        controls += [_cell(experiment, another_seed, baseline, prompt, seed ^ 1, settings) for prompt in prompts]
    return controls


PORTION = 4096
"""Cells that are listed at a time."""


def portions(experiment: Experiment, per_prompt: int) -> Iterator[Sequence[str]]:
    """Yield the prompts in groups that have about `PORTION` cells, `per_prompt` each, so that memory does not grow
    with the number of prompts.
    """
    count = max(1, PORTION // per_prompt)
    for start in range(0, len(experiment.prompts), count):
        yield experiment.prompts[start : start + count]


def _cell(experiment: Experiment, variant: str, program: Program, prompt: str, seed: int, settings: Settings) -> Cell:
    own, takes_from, sources = (variant, prompt, seed), [], []
    for place in places_of(program, own, experiment.baseline, (experiment.prompts, experiment.seeds)):
        if place == own:
            takes_from.append("itself")
            continue
        name, *rest = place
        sources.append(_cell(experiment, name, experiment.variants[name], *rest, settings))
        takes_from.append(sources[-1].key)
    images, inputs = experiment.references_of(prompt), experiment.inputs_of(prompt)
    task = experiment.tasks.get(experiment.baseline if variant in REFERENCE_NAMES else variant)
    worked_on = [*task.digest, {part: inputs.hashes[part] for part in task.parts}] if task else None
    hashes, trained = [image.sha256 for image in images], task is not None and task.depends_on_training
    key = cell_key(settings, prompt, seed, program, takes_from, hashes, worked_on, trained)
    takes_from = [key if source == "itself" else source for source in takes_from]
    return Cell(variant, prompt, seed, program, key, tuple(takes_from), tuple(sources), images, task, inputs)


def batches(cells: Sequence[Cell], settings: Settings) -> list[list[Cell]]:
    """Return the distinct cells in batches of as many as `batch_tokens` allows, at least one.

    Cells that share their first steps are in one batch, even if they are more: `at_once` of them are in one forward.
    All cells of a batch have one token layout: those whose reference images have equal sizes are put together, and
    those with equal numbers of prompts of regions.
    Cells that take activations from others are put into one batch with them (`sources.with_sources_of`).
    """
    distinct: dict[str, Cell] = {}
    for cell in cells:
        distinct.setdefault(cell.key, cell)
    layouts: dict[tuple, list[Cell]] = {}
    for cell in distinct.values():
        layout = grids(cell.references, settings.pixels_per_token), len(region_prompts(cell.program))
        layouts.setdefault(layout, []).append(cell)
    return [batch for in_order in layouts.values() for batch in _batches(in_order, settings)]


def _batches(cells: list[Cell], settings: Settings) -> list[list[Cell]]:
    size = at_once(settings, cells)
    if any(cell.sources for cell in cells):
        return meeting(cells, size)
    acting = _actions(cells, settings)
    alike: dict[tuple, list[Cell]] = {}
    for cell in cells:
        own = cell.key if cell.task or has_interventions(cell.program) else acting[cell.program][0]
        alike.setdefault((cell.prompt, cell.seed, own), []).append(cell)
    batches: list[list[Cell]] = []
    for group in alike.values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def at_once(settings: Settings, cells: Iterable[Cell]) -> int:
    """Return how many samples of a batch are in one forward."""
    most = max((_further_tokens(cell, settings) for cell in cells), default=0)
    return max(1, settings.batch_tokens // (settings.tokens + most))


def in_one_forward(samples: Sequence[Cell], settings: Settings) -> int:
    """Return how many of a batch's samples, sources included, are in one forward. Edits of activations need all."""
    if any(has_interventions(cell.program) for cell in samples):
        return len(samples)
    return min(len(samples), at_once(settings, samples))


def _further_tokens(cell: Cell, settings: Settings) -> int:
    """Return the tokens of a cell's reference images and of the texts of its regions."""
    texts = len(region_prompts(cell.program)) * settings.max_sequence_length
    return texts + tokens(cell.references, settings.pixels_per_token)


def step_rows(batch: Sequence[Cell], settings: Settings) -> list[int]:
    """Return how many samples each step of a batch computes. Cells that are equal so far are one."""
    return [len(rows) for rows in _rows(batch, settings)]


def picking_rows(batch: Sequence[Cell], settings: Settings) -> list[int]:
    """Return how many samples each step computes before, to pick tokens by their attention."""
    measuring = {program: measuring_steps(program, _sigmas(settings)) for program in {cell.program for cell in batch}}
    return [
        sum(measuring[batch[sample].program][step] for sample in rows)
        for step, rows in enumerate(_rows(batch, settings))
    ]


def _rows(batch: Sequence[Cell], settings: Settings) -> list[Sequence[int]]:
    """Return the samples that each step of a batch computes."""
    if any(cell.task for cell in batch):
        return [[i for i, cell in enumerate(batch) if not cell.task or cell.task.samples]] * settings.steps
    if any(has_interventions(cell.program) for cell in batch):
        return [range(len(batch))] * settings.steps
    acting, starts = _actions(batch, settings), [(cell.prompt, cell.seed) for cell in batch]
    return [rows.samples for rows in shared_rows(starts, [acting[cell.program] for cell in batch])]


def _actions(cells: Sequence[Cell], settings: Settings) -> dict[Program, list[Action]]:
    """Return what each program does at each step."""
    sigmas = _sigmas(settings)
    return {program: actions(program, sigmas) for program in {cell.program for cell in cells}}


def _sigmas(settings: Settings) -> list[float]:
    """Return the schedule of a run."""
    schedule = Schedule(**{f.name: settings.schedule[f.name] for f in fields(Schedule) if f.name in settings.schedule})
    rows, cols = settings.height // settings.pixels_per_token, settings.width // settings.pixels_per_token
    return schedule.times(settings.steps, rows * cols)
