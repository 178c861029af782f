"""Objectives: what a learned argument is to make large. Each is a score of `fluxlab.gradients` with its images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fluxlab import gradients, scenes
from fluxlab.errors import UserError, nearest, show, unknown_key
from fluxlab.experiment.reading import read_run
from fluxlab.images import open_image
from fluxlab.learning.place import place, side_of
from fluxlab.sampling import Sampling

if TYPE_CHECKING:
    from PIL import Image

    from fluxlab.pipeline import Pipeline
    from fluxlab.positions import Program

OBJECTIVES = {
    "denoising": ("minus the denoising loss", ("images", "variant")),
    "likeness": ("minus the squared distance of latents", ("images", "variant", "coarse")),
    "attention": ("share of attention in the box", ("word", "box")),
    "sharpness": ("mean gradient magnitude", ()),
    "place": ("content towards the side of the prompt, tokens", ()),
}
"""The title of each score, and the keys of its objective. A score is better the larger it is."""

SCENES, SAMPLED = "scenes", "sampled"
"""Values of `objective.images` that are no file: drawn from each prompt, and what the model itself samples."""

TRIES = 20_000
"""Scenes that are drawn to find one arranged as a prompt describes."""


@dataclass(frozen=True)
class Place:
    """A prompt and a seed: what a cell is besides its program."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Objective:
    """score(places): the score of `fluxlab.gradients` for a batch of places. title: what it measures.

    coarse: a score with a smoother landscape, which takes the place of `score` for the first `coarse_share` of updates.
    """

    name: str
    title: str
    score: Callable[[Sequence[Place]], gradients.Score]
    coarse: Callable[[Sequence[Place]], gradients.Score] | None = None
    coarse_share: float = 0.0


def read_objective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked config of an objective. Raises UserError naming the key, its value and what is expected."""
    name = config.get("name")
    if name not in OBJECTIVES:
        raise UserError(f"objective={name}: expected one of {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}")
    known = OBJECTIVES[name][1]
    for key, value in config.items():
        if key != "name" and key not in known and value is not None:
            raise unknown_key("objective", key, value, known, f"key of {name}")
    given = {key: config.get(key) for key in known}
    needed = {
        "images": "scenes, sampled, a run folder, or a list of files",
        "word": "{words: [cat]}",
        "box": "{box: [0, 0, 8, 8]}",
    }
    for key, accepted in needed.items():
        if key in given and given[key] in (None, "", [], {}):
            raise UserError(f"objective.{key}: missing, {name} needs {accepted}")
    if given.get("variant") is not None and not _is_folder(given["images"]):
        raise UserError(f"objective.variant={given['variant']}: belongs to the images of a run folder; leave it out")
    if "coarse" in given:
        share = 0.5 if given["coarse"] is None else given["coarse"]
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise UserError(f"objective.coarse={show(share)}: expected a share of the updates, from 0 to below 1")
        given["coarse"] = float(share)
    return {"name": name, **given}


def check_prompts(config: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Raise UserError for a prompt that an objective cannot score. config: checked by `read_objective`."""
    if config["name"] == "place":
        for prompt in prompts:
            side_of(prompt)


def make_objective(
    config: Mapping[str, Any],
    pipe: "Pipeline",
    prompts: Sequence[str],
    places: Sequence[Place],
    settings: Sampling,
    program: "Program | None" = None,
) -> Objective:
    """Return an objective with the images of all its places. prompts: all, in the order of a list of files.

    program: with which images: sampled are made; None for unchanged ids. Raises UserError for an image that is missing
    or of another size.
    """
    title = OBJECTIVES[config["name"]][0]
    if config["name"] == "place":
        return Objective("place", title, lambda batch: place([one.prompt for one in batch]))
    if config["name"] == "attention":
        score = gradients.attention(config["word"], config["box"])
        return Objective("attention", title, lambda batch: score)
    if config["name"] == "sharpness":
        return Objective("sharpness", title, lambda batch: gradients.sharpness())
    size = settings.height, settings.width
    if config["images"] == SAMPLED:
        latents = cache(lambda where: _sampled(pipe, where, program, settings))
    else:
        images = {where: _image(config, prompts, where, size) for where in places}
        latents = {where: _encoded(pipe, image, size, where) for where, image in images.items()}.__getitem__

    def of(make: Callable[[torch.Tensor], gradients.Score]) -> Callable[[Sequence[Place]], gradients.Score]:
        return lambda batch: make(torch.cat([latents(where) for where in batch]))

    if config["name"] == "denoising":
        return Objective("denoising", title, of(gradients.denoising))
    return Objective("likeness", title, of(gradients.likeness), of(gradients.denoising), config["coarse"])


def _is_folder(images: Any) -> bool:
    return isinstance(images, str) and images not in (SCENES, SAMPLED)


def _image(config: Mapping[str, Any], prompts: Sequence[str], place: Place, size: tuple[int, int]) -> "Image.Image":
    images = config["images"]
    if images == SCENES:
        return rendered(place, size)
    if isinstance(images, str) and Path(images).is_file():
        images = [images]
    if isinstance(images, str):
        run = read_run(Path(images).expanduser())
        variant = config["variant"] or run.baseline
        try:
            return run.open(variant, place.prompt, place.seed)
        except KeyError:
            have = f"variants {', '.join(run.variants)}" if variant not in run.variants else "other prompts and seeds"
            raise UserError(
                f"objective.images={images}: has no image of variant {variant}, prompt {show(place.prompt)}, seed "
                f"{place.seed}; it has {have}"
            ) from None
    if not isinstance(images, Sequence) or len(images) not in (1, len(prompts)):
        raise UserError(
            f"objective.images={show(images)}: expected scenes, sampled, a run folder, one file, or {len(prompts)} "
            "files, one for each prompt, those held out last"
        )
    return open_image(Path(images[0 if len(images) == 1 else prompts.index(place.prompt)]).expanduser())


def rendered(place: Place, size: tuple[int, int]) -> "Image.Image":
    """Return a scene that the prompt describes, drawn at random for (prompt, seed).

    Raises UserError for a prompt that does not describe a scene, and for one whose scenes are too rare to draw.
    """
    from PIL import Image

    wanted = scenes.parse(place.prompt)
    hashed = hashlib.sha256(f"{place.prompt} {place.seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(hashed[:8], "big"))
    for _ in range(TRIES):
        scene = scenes.sample_scene(rng, size, "all")
        if _arranged(wanted, scenes.wanted_of(scene)):
            return Image.fromarray(scenes.render(_as_asked(scene, wanted)))
    raise UserError(f"objective.images=scenes: no scene found for {show(place.prompt)}; shorten the prompt")


def _arranged(wanted: scenes.Wanted, scene: scenes.Wanted) -> bool:
    """Return whether a scene has the arrangement of a caption: relation, place, and the lengths of the sign's words."""
    return (
        wanted.relation == scene.relation
        and wanted.place in (None, scene.place)
        and _lengths(wanted) == _lengths(scene)
    )


def _lengths(wanted: scenes.Wanted) -> tuple[int, int]:
    """Number of words of a sign, and the length of the longest: its board has the same size for equal ones."""
    return (len(wanted.sign), max(map(len, wanted.sign))) if wanted.sign else (0, 0)


def _as_asked(scene: scenes.Scene, wanted: scenes.Wanted) -> scenes.Scene:
    """Return a scene with the things, colours and words of the caption, which do not depend on its arrangement."""
    asked = ((wanted.thing, wanted.colour), (wanted.second, wanted.second_colour))
    things = tuple(
        replace(thing, name=name or thing.name, colour=colour or thing.colour)
        for thing, (name, colour) in zip(scene.things, asked, strict=False)
    )
    sign = scene.sign if wanted.sign is None else replace(scene.sign, words=wanted.sign)
    return replace(scene, things=things, sign=sign)


def _encoded(pipe: "Pipeline", image: "Image.Image", size: tuple[int, int], place: Place) -> torch.Tensor:
    if (image.height, image.width) != size:
        raise UserError(
            f"objective.images: the image for {show(place.prompt)} has {image.height} × {image.width} pixels, expected "
            f"{size[0]} × {size[1]}; set height= and width="
        )
    return pipe.encode([image])[0].clone()


def _sampled(pipe: "Pipeline", place: Place, program: "Program | None", settings: Sampling) -> torch.Tensor:
    """Return the latents that the model samples for a place, `(1, N, C)` in at least fp32, in its own number of steps.

    With few steps the noise of the cell would lead straight to the image, and the loss would be about 0.
    """
    latents = pipe.sample([place.prompt], [place.seed], program, replace(settings, steps=None), output="latent")
    return latents.to(torch.promote_types(latents.dtype, torch.float32), copy=True)
