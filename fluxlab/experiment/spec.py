"""The specification of an experiment, as plain checked values. This module uses no Hydra, model or device."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any

from fluxlab.checkpoints import check_device
from fluxlab.config import ModelRow, read_loras
from fluxlab.errors import UserError, join, nearest, show
from fluxlab.experiment import inputs as given
from fluxlab.experiment.inputs import Inputs
from fluxlab.experiment.reference_images import PerPrompt, ReferenceImage, from_values
from fluxlab.experiment.sources import check_sources
from fluxlab.experiment.tasks import Task, check_sizes, check_tasks, read_task, size_of
from fluxlab.measure.summary import CONTROLS
from fluxlab.positions import Program, sources_of, split_resample
from fluxlab.probes import Capture
from fluxlab.sampling import Sampling
from fluxlab.select.masks import compact

SCHEMA = 1
"""Version of the store and of cell keys. Raise it when the meaning of either changes."""

REFERENCE_NAMES = CONTROLS
"""The two controls that every effect is shown next to; on disk, and in this package, they are called references."""

LONGEST_NAME = 100
"""Characters of the name of an experiment or a variant: names become parts of file names and labels in figures."""

_LARGEST = {"height": 65_536, "width": 65_536, "steps": 10_000, "max_sequence_length": 65_536}
_LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which the model computes
_LARGEST_SEED = 2**63 - 1  # what a generator takes


@dataclass(frozen=True, kw_only=True)
class Experiment(Sampling):
    """Variants × prompts × seeds on one model, with the settings of `Sampling`. None means the model's own value.

    model_digest: `checkpoints.fingerprint` of the model.
    baseline: the variant that the others are compared with.
    clip, dino: checkpoints for similarity metrics. capture: what is stored of attention. Images depend on neither.
    references: reference images, a list per prompt or one for all.
    tasks: of the variants that do not sample from the prompt alone. inputs: what they work on, for each prompt or for
        all.
    """

    name: str
    model: ModelRow
    model_digest: str
    variants: Mapping[str, Program]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str = "baseline"
    caption: str = ""
    clip: str | None = None
    dino: str | None = None
    capture: Capture = field(default_factory=Capture)
    references: PerPrompt = ()
    tasks: Mapping[str, Task] = field(default_factory=dict)
    inputs: tuple[Inputs, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the variants in the order of the tables, the baseline first."""
        return sorted(self.variants, key=lambda name: name != self.baseline)

    def references_of(self, prompt: str) -> tuple[ReferenceImage, ...]:
        """Return the reference images of a prompt."""
        if len(self.references) < 2:
            return self.references[0] if self.references else ()
        return self.references[self.prompts.index(prompt)]

    def inputs_of(self, prompt: str) -> Inputs | None:
        """Return what tasks work on at a prompt; None without tasks."""
        if len(self.inputs) < 2:
            return self.inputs[0] if self.inputs else None
        return self.inputs[self.prompts.index(prompt)]

    def describe(self, variant: str) -> str:
        """Return the task and the program of a variant in one line."""
        task, program = self.tasks.get(variant), self.variants[variant]
        parts = [task.describe()] if task else []
        return "; ".join([*parts, program.describe()] if program.edits or not parts else parts)

    @property
    def sampling(self) -> Sampling:
        """The settings alone."""
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})

    def request(self) -> dict[str, Any]:
        """Return the experiment as plain values for YAML."""
        left_out = {"model", "variants", "capture", "references", "tasks", "inputs", *unchanged(self)}
        values = {key: value for key, value in vars(self).items() if key not in left_out}
        model = self.model.values()
        variants = {name: program.to_config() for name, program in self.variants.items()}
        lists = {"prompts": list(self.prompts), "seeds": list(self.seeds)}
        capture = compact(self.capture.to_config()) if self.capture else {}
        asked = {**values, **lists, "model": model, "variants": variants, "capture": capture}
        if self.references:
            asked["references"] = [[image.values() for image in images] for images in self.references]
        if self.tasks:
            asked["tasks"] = {name: task.values() for name, task in self.tasks.items()}
            asked["inputs"] = [one.values() for one in self.inputs]
        return asked

    @property
    def digest(self) -> str:
        """Return 12 hex digits of everything that the images depend on. They name the default run folder."""
        settings = {key: value for key, value in self.model.values().items() if key not in ("name", "path", *_SOURCES)}
        asked = {
            "schema": SCHEMA,
            "model": [self.model_digest, settings],
            "variants": {name: program.digest for name, program in self.variants.items()},
            **{key: value for key, value in self.request().items() if key not in _NOT_IN_DIGEST},
        }
        if self.references:
            asked["references"] = [[image.sha256 for image in images] for images in self.references]
        if self.tasks:
            asked["tasks"] = {name: task.digest for name, task in self.tasks.items()}
            asked["inputs"] = [one.hashes for one in self.inputs]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def captures(self) -> str:
        """Return 12 hex digits of the requests, without the budget. Empty without a capture."""
        requests = [[request.name, request.to_config()] for request in self.capture.requests]  # order shows in a file
        return hashlib.sha256(json.dumps([SCHEMA, requests]).encode()).hexdigest()[:12] if requests else ""


_SOURCES = ("autoencoder", "text", "tokenizers", "variant", "scenes", "lora", "references")
_NOT_IN_DIGEST = ("name", "caption", "model", "model_digest", "variants", "clip", "dino", "capture", "references")
_NOT_IN_DIGEST += ("tasks", "inputs")


FIRST = ("steps", "height", "width", "guidance", "true_cfg", "negative_prompt", "dtype", "device")
"""The settings of release 0.1. Digests always contain these, and the others only if they differ from their default."""


def unchanged(settings: Sampling) -> set[str]:
    """Return the settings that digests and stores leave out: those added after release 0.1, at their default."""
    return {f.name for f in fields(Sampling) if f.name not in FIRST and getattr(settings, f.name) == f.default}


def from_request(request: Mapping[str, Any]) -> Experiment:
    """Return the experiment whose `request()` this is, for instance of a store's experiment.yaml."""
    model = dict(request["model"])
    values = {
        **request,
        "model": ModelRow(
            **{
                **model,
                "size": tuple(model["size"]) if model.get("size") else None,
                "lora": read_loras(model.get("lora")) or None,
            }
        ),
        "variants": read_variants(request["variants"]),
        "prompts": tuple(request["prompts"]),
        "seeds": tuple(request["seeds"]),
        "capture": Capture.from_config(request["capture"] or None),
        "references": from_values(request.get("references", ())),
        "tasks": {name: read_task(task, f"variants.{name}.task") for name, task in request.get("tasks", {}).items()},
        "inputs": given.from_values(request.get("inputs", ())),
    }
    return checked(Experiment(**values))


def checked(experiment: Experiment) -> Experiment:
    """Return the experiment with normalised numbers. Raises UserError naming the key, its value and the remedy."""
    if not re.fullmatch(r"\w[\w.-]*", experiment.name) or len(experiment.name) > LONGEST_NAME:
        raise UserError(
            f"name={show(experiment.name)[1:-1]}: names a folder; use at most {LONGEST_NAME} letters, digits, -, . or _"
        )
    if not experiment.variants:
        raise UserError("variants={}: expected at least one variant, for instance variants.baseline={}")
    check_baseline(experiment.baseline, experiment.variants)
    if not experiment.prompts:
        raise UserError("prompts=[]: expected at least one prompt")
    twice = [prompt for prompt, count in Counter(experiment.prompts).items() if count > 1]
    if twice:
        raise UserError(f"prompts: {show(twice[0])} occurs twice; its images would be equal")
    experiment.sampling.check()
    if experiment.device:
        check_device(experiment.device)
    for request in experiment.capture.requests:
        if request.kind == "similarity":
            raise UserError(
                f"{join(request.path, 'kind')}: similarity compares samples of one batch; a run has its own batches.\n"
                "Capture words and compare what is stored: fluxlab.probes.similarity(a, b), fluxlab.probes.read(out).\n"
                "Or put what is to be compared into one pipe.generate(probe=…)."
            )
    check_sources(experiment.variants, experiment.baseline, experiment.prompts, experiment.seeds)
    check_tasks(experiment.tasks, experiment.inputs)
    if experiment.tasks:
        _check_with_tasks(experiment)
        experiment = _sized(experiment)
    for key, largest in _LARGEST.items():
        value = getattr(experiment, key)
        if value is not None and value > largest:
            raise UserError(f"{key}={value}: expected a whole number from 1 to {largest}")
    numbers = {key: _number(key, getattr(experiment, key)) for key in ("guidance", "true_cfg")}
    return replace(experiment, **numbers)


def _check_with_tasks(experiment: Experiment) -> None:
    """Raise `UserError` for what has no effect in images that a task makes."""
    if experiment.capture:
        raise UserError("capture: has no effect on a task; leave out capture=, or task and image")
    if experiment.references:
        raise UserError("references: have no effect on a task; leave them out, or task and image")
    further = {f"{name}.task": task.source_programs for name, task in experiment.tasks.items() if task.source_programs}
    for name, program in {**experiment.variants, **further}.items():
        for path, _ in sources_of(program):
            raise UserError(f"{path}: inject takes from cells of its batch, which a task does not have; leave it out")
        if split_resample(program)[1] is not None:
            raise UserError(f"variants.{name}: resample does not work in a run with tasks; leave it out")


def _sized(experiment: Experiment) -> Experiment:
    """Return the experiment with the size of its results, which follows from the given images."""
    height, width = size_of(experiment.tasks, experiment.inputs)
    if experiment.enlarge is not None:
        raise UserError(f"enlarge={experiment.enlarge:g}: the given images make the size; leave it out")
    check_sizes(experiment.tasks, experiment.inputs, (height, width))
    for key, value, expected in (("height", experiment.height, height), ("width", experiment.width, width)):
        if value not in (None, expected):
            raise UserError(f"{key}={value}: the given images make results of {height} × {width} pixels; leave it out")
    return replace(experiment, height=height, width=width)


def check_baseline(baseline: str, variants: Mapping[str, Any]) -> None:
    """Raise UserError if the variant that the others are compared with is missing."""
    if baseline not in variants:
        raise UserError(
            f"baseline={baseline}: no such variant, with which the others are compared; "
            f"there are {', '.join(map(str, variants))}{nearest(baseline, map(str, variants))}"
        )


def _number(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if abs(value) > _LARGEST_FLOAT:
        raise UserError(f"{key}={show(value)}: expected a number of at most {_LARGEST_FLOAT:.2g}, the largest float32")
    return float(value)


def read_variants(variants: Mapping[str, Any]) -> dict[str, Program]:
    """Return programs by name. Raises UserError with the path of the wrong value, such as `variants.half.a.factor`."""
    for name in map(str, variants):
        if not re.fullmatch(r"\w[\w.+ -]*", name) or name in REFERENCE_NAMES or len(name) > LONGEST_NAME:
            raise UserError(
                f"variants: {show(name)} is not a valid name; "
                f"use at most {LONGEST_NAME} letters, digits, spaces, -, +, . and _"
            )
    return {str(name): Program.from_config(program, f"variants.{name}") for name, program in variants.items()}


def read_seeds(seeds: Any) -> tuple[int, ...]:
    """Return the seeds: 0 … 3 for `4`, 3 and 5 for `[3, 5]`. Raises UserError for other values."""
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        if seeds > 1_000_000:
            raise UserError(
                f"seeds={show(seeds)}: a count of at most 1000000; for one seed write seeds=[{show(seeds)}]"
            )
        return tuple(range(seeds))
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds:
        raise UserError(f"seeds={show(seeds)}: expected a count such as 4, or a list such as [3,5]")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed <= _LARGEST_SEED:
            raise UserError(f"seeds={show(seeds)}: {show(seed)}, expected whole numbers from 0 to 2^63 - 1")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={show(seeds)}: a seed occurs twice")
    return tuple(map(int, seeds))
