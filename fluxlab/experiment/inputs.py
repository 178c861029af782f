"""The images that a task works on (`fluxlab.experiment.tasks`): one set of them for each prompt, or one for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fluxlab.config import PACKAGE
from fluxlab.errors import UserError, nearest, show
from fluxlab.experiment.reference_images import ReferenceImage
from fluxlab.files import sha256_of
from fluxlab.images import open_image, read_pixels
from fluxlab.scenes import cases
from fluxlab.select.masks import read_mask

PARTS = cases.PARTS
SCENES = ("kind", "count", "scale")
"""The keys of `scenes`."""


@dataclass(frozen=True)
class Inputs:
    """Image files, or names of drawn ones (`fluxlab.scenes.cases`).

    image: what the task is given. mask: white where inpainting samples again. target: what the result is compared
    with. No image depends on it but those of `decode` with `of: target`.
    """

    image: ReferenceImage
    mask: ReferenceImage | None = None
    target: ReferenceImage | None = None

    def values(self) -> dict[str, Any]:
        """Return them as plain values for YAML."""
        return {part: getattr(self, part).values() for part in PARTS if getattr(self, part)}

    @property
    def hashes(self) -> dict[str, str]:
        """The hashes by part."""
        return {part: getattr(self, part).sha256 for part in PARTS if getattr(self, part)}

    def open(self, part: str) -> np.ndarray | None:
        """Return the pixels of a part: uint8 `(H, W, 3)`, boolean `(H, W)` for the mask; None if there is none.

        Raises `UserError` if a file is not the one that the experiment was made with.
        """
        file = getattr(self, part)
        if file is None:
            return None
        try:
            same = _hash(file.path) == file.sha256
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{part}: {file.path} cannot be read ({reason}); put the file back there") from None
        if not same:
            raise UserError(f"{file.path}: this image has changed since the run started; run the command again")
        return _pixels(file.path, part)


def from_values(values: Sequence[Mapping[str, Any]]) -> tuple[Inputs, ...]:
    """Return what `values()` were made from, without reading the files."""
    return tuple(
        Inputs(**{part: ReferenceImage(**{**v, "size": tuple(v["size"])}) for part, v in parts.items()})
        for parts in values
    )


def read_inputs(image: Any, mask: Any, target: Any, prompts: int) -> tuple[Inputs, ...]:
    """Return the inputs of a config: for each key a path for all prompts, or a list with one path per prompt.

    A path that starts with `fluxlab/` is inside the package. Raises `UserError` naming the entry for a missing or
    unreadable file, for a mask or target without an image, and for a wrong number of paths.
    """
    given = {part: value for part, value in zip(PARTS, (image, mask, target), strict=True) if value is not None}
    if not given:
        return ()
    if "image" not in given:
        part, value = next(iter(given.items()))
        raise UserError(f"{part}={show(value)}: needs an image too, image=<file>")
    lists = {part: isinstance(value, Sequence) and not isinstance(value, str) for part, value in given.items()}
    for part, value in given.items():
        if lists[part] and len(value) != prompts:
            raise UserError(f"{part}: {len(value)} files for {prompts} prompts; expected one per prompt, or one path")
    if not any(lists.values()):
        return (Inputs(**{part: _read(value, part, part) for part, value in given.items()}),)
    return tuple(
        Inputs(
            **{
                part: _read(value[n], part, f"{part}[{n}]") if lists[part] else _read(value, part, part)
                for part, value in given.items()
            }
        )
        for n in range(prompts)
    )


def read_scenes(value: Any, own: tuple[int, int] | None) -> tuple[list[str], dict[str, list[str]]]:
    """Return the prompts of drawn scenes, and the names of their images by part.

    value: `{kind, count, scale}`; without a scale, scenes are drawn at the model's own size. own: (height, width) of
    that, None if the config does not say.

    Raises `UserError` naming the key, its value and what is expected.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"scenes={show(value)}: expected a mapping, such as {{kind: exchange, count: 64}}")
    for key in value:
        if key not in SCENES:
            raise UserError(f"scenes.{key}: unknown, expected {', '.join(SCENES)}{nearest(str(key), SCENES)}")
    kind, count, scale = (value.get(key) for key in SCENES)
    if not isinstance(kind, str) or kind not in cases.KINDS:
        raise UserError(f"scenes.kind={show(kind)}: expected {', '.join(cases.KINDS)}{nearest(str(kind), cases.KINDS)}")
    if scale is None:
        height, width = own or (0, 1)
        if height != width or height % cases.SIDE:
            about = f"the model's own size is {height} × {width}" if own else "the model's own size is not known"
            raise UserError(f"scenes.scale=null: {about}; set how many times as large as {cases.SIDE} px scenes are")
        scale = height // cases.SIDE
    for key, number, most in (("count", count, 10_000), ("scale", scale, 64)):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
            raise UserError(f"scenes.{key}={show(number)}: expected a whole number from 1 to {most}")
    every = cases.cases(kind, count, scale)
    named = [cases.names_of(kind, one, scale) for one in every]
    return [one.prompt for one in every], {part: [names[part] for names in named] for part in named[0]}


def _read(value: Any, part: str, where: str) -> ReferenceImage:
    if not isinstance(value, str | PathLike) or not str(value):
        raise UserError(f"{where}={show(value)}: expected the path of an image")
    path = str(value)
    if not cases.is_name(path):
        path = str(PACKAGE.parent / path if path.startswith("fluxlab/") else Path(path).expanduser().absolute())
    try:
        height, width = _pixels(path, part).shape[:2]
        return ReferenceImage(path, _hash(path), (height, width))
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(f"{where}: ") else f"{where}: {message}") from None


def _pixels(path: str, part: str) -> np.ndarray:
    if cases.is_name(path):
        return cases.part_of(path)
    if part == "mask":
        open_image(path)  # whose error says that it is missing
        return read_mask(path, part)
    return read_pixels(path)


def _hash(path: str) -> str:
    """Return the hash of a file's content. That of a drawn image is of its pixels."""
    if not cases.is_name(path):
        return sha256_of(Path(path))
    pixels = cases.part_of(path)
    return sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
