"""The images of cells that have a task: what is checked before anything is computed, and how they are made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fluxlab.editing.inpaint import filled, hole_tokens
from fluxlab.editing.upscale import enlarged
from fluxlab.errors import NonFiniteError, UserError, show
from fluxlab.experiment.cell import Cell
from fluxlab.experiment.cells import Settings
from fluxlab.experiment.inputs import Inputs
from fluxlab.experiment.tasks import Task
from fluxlab.pipeline import Pipeline
from fluxlab.pixels import image_tensor
from fluxlab.sampling import Sampling

if TYPE_CHECKING:
    from PIL import Image

WITHOUT = {"timestep_rounding": None, "compile": False}
"""Settings that the methods of tasks do not have, and the value that changes nothing."""


def check(tasks: Mapping[str, Task], inputs: Sequence[Inputs], pipe: Pipeline, settings: Settings, prompt: str) -> None:
    """Raise `UserError` for settings and inputs that do not fit the tasks or the model, before anything is computed.

    prompt: one with which programs are checked.
    """
    names = sorted({task.name for task in tasks.values() if task.samples})
    for key, neutral in WITHOUT.items():
        value = getattr(settings, key)
        if names and value not in (None, neutral):
            raise UserError(f"{key}={value}: the task {names[0]} does not have it; set {key}={show(neutral)}")
    for one in inputs:
        grid = pipe.grid(*one.image.size)
        if one.mask is not None:
            hole_tokens(one.open("mask"), one.image.size, grid)
    for task in tasks.values():
        if task.source_programs is not None:
            height, width = inputs[0].image.size
            small = replace(settings.sampling, height=height, width=width)
            pipe.check([prompt], [task.source_programs], small)


def images_of(pipe: Pipeline, cells: Sequence[Cell], settings: Settings) -> "list[Image.Image]":
    """Return the images of cells, with and without a task. Raises `NonFiniteError` as `Pipeline.sample` does."""
    found: list[Any] = [None] * len(cells)
    steps: dict[int, int | None] = {}
    reasons: dict[int, str] = {}
    alike: dict[Any, list[int]] = {}
    for i, cell in enumerate(cells):
        mask = cell.inputs.mask if cell.task and "mask" in cell.task.parts else None
        alike.setdefault((cell.task, mask and mask.sha256), []).append(i)
    for (task, _), chosen in alike.items():
        try:
            one = [cells[i] for i in chosen]
            if task is None:
                images = _generate(pipe, one, settings.sampling)
            else:
                images = MAKE[task.name](pipe, one, dict(task.arguments), settings.sampling)
        except NonFiniteError as error:
            images = [None] * len(chosen)
            if error.results is not None and not any(isinstance(one, torch.Tensor) for one in error.results):
                images = error.results
            steps |= {chosen[i]: step for i, step in error.steps.items()}
            reasons |= {chosen[i]: text for i, text in error.reasons.items()}
            for i in range(len(chosen)):  # an inversion that fails for one image gives none of the others
                if images[i] is None and i not in error.reasons:
                    reasons[chosen[i]] = "an image that is computed with it is not finite"
                    steps[chosen[i]] = None
        for i, image in zip(chosen, images, strict=True):
            found[i] = image
    if reasons:
        raise NonFiniteError("; ".join(reasons.values()), steps, reasons, found)
    return found


def _arguments(cells: Sequence[Cell], sampling: Sampling) -> dict[str, Any]:
    """Return the arguments that all methods take."""
    keys = ("steps", "guidance", "true_cfg", "max_sequence_length", "truncate", "unknown_words")
    return {
        "prompt": [cell.prompt for cell in cells],
        "seed": [cell.seed for cell in cells],
        "programs": [cell.program for cell in cells],
        "negative_prompts": sampling.negative_prompt,
        **{key: getattr(sampling, key) for key in keys},
    }


def _generate(pipe: Pipeline, cells: Sequence[Cell], sampling: Sampling) -> Sequence[Any]:
    prompts, seeds, programs = zip(*((cell.prompt, cell.seed, cell.program) for cell in cells), strict=True)
    return pipe.sample(list(prompts), list(seeds), list(programs), sampling)


def _opened(cells: Sequence[Cell], part: str) -> torch.Tensor:
    return torch.cat([image_tensor(cell.inputs.open(part)) for cell in cells])


def _inpaint(pipe: Pipeline, cells: Sequence[Cell], given: Mapping[str, Any], sampling: Sampling) -> Sequence[Any]:
    mask = cells[0].inputs.open("mask")
    return pipe.inpaint(_opened(cells, "image"), mask, **_arguments(cells, sampling), **given)


def _upscale(pipe: Pipeline, cells: Sequence[Cell], given: Mapping[str, Any], sampling: Sampling) -> Sequence[Any]:
    return pipe.upscale(_opened(cells, "image"), **_arguments(cells, sampling), **given)


def _decode(pipe: Pipeline, cells: Sequence[Cell], given: Mapping[str, Any], sampling: Sampling) -> Sequence[Any]:
    of = given.get("of", "image")
    images = _opened(cells, "target" if of == "target" else "image")
    if of == "filled":
        images = filled(images, torch.from_numpy(cells[0].inputs.open("mask")))
    if of == "enlarged":
        images = enlarged(images, sampling.height // images.shape[-2])
    return pipe.decode(*pipe.encode(images))


def _resize(pipe: Pipeline, cells: Sequence[Cell], given: Mapping[str, Any], sampling: Sampling) -> Sequence[Any]:
    from PIL import Image

    size = sampling.width, sampling.height
    return [Image.fromarray(cell.inputs.open("image")).resize(size, Image.Resampling.BICUBIC) for cell in cells]


Make = Callable[[Pipeline, Sequence[Cell], Mapping[str, Any], Sampling], Sequence[Any]]
MAKE: dict[str, Make] = {"inpaint": _inpaint, "upscale": _upscale, "decode": _decode, "resize": _resize}
"""The function that makes the images of cells with one task and one mask."""
