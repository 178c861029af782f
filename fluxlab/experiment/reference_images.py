"""The reference images of an experiment: files, known by the hash of their content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.config import PACKAGE
from fluxlab.errors import UserError, show
from fluxlab.files import sha256_of
from fluxlab.images import open_image

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ReferenceImage:
    """An image file. sha256: of its content. size: (height, width) in pixels."""

    path: str
    sha256: str
    size: tuple[int, int]

    def values(self) -> dict[str, Any]:
        """Return it as plain values for YAML."""
        return {"path": self.path, "sha256": self.sha256, "size": list(self.size)}

    def open(self) -> "Image.Image":
        """Return the image. Raises `UserError` if the file is not the one that the experiment was made with."""
        image = open_image(self.path)
        if sha256_of(Path(self.path)) != self.sha256:
            raise UserError(
                f"{self.path}: this reference image has changed since the run started; run the command again"
            )
        return image


PerPrompt = tuple[tuple[ReferenceImage, ...], ...]
"""A list of reference images per prompt; one list serves all prompts, and none means no references."""


def read_references(value: Any, prompts: int) -> PerPrompt:
    """Return the reference images of a config: a list of paths for every prompt, or one list of paths per prompt.

    A path that starts with `fluxlab/` is inside the package. Raises `UserError` naming the entry for a missing or
    unreadable file, for lists and paths side by side, and for a wrong number of lists.
    """
    if value is None:
        return ()
    if isinstance(value, str | PathLike):
        value = [value]
    if not isinstance(value, Sequence):
        raise UserError(f"references={show(value)}: expected a list of image files, such as [cat.png]")
    lists = [isinstance(part, Sequence) and not isinstance(part, str) for part in value]
    if not any(lists):
        every = tuple(_read(part, f"references[{i}]") for i, part in enumerate(value))
        return (every,) if every else ()
    if not all(lists):
        i = lists.index(False)
        raise UserError(f"references[{i}]={show(value[i])}: expected a list, as each prompt has one; [] for none")
    if len(value) != prompts:
        raise UserError(f"references: {len(value)} lists for {prompts} prompts; expected one per prompt")
    per_prompt = tuple(
        tuple(_read(part, f"references[{i}][{j}]") for j, part in enumerate(parts)) for i, parts in enumerate(value)
    )
    return per_prompt if any(per_prompt) else ()


def _read(value: Any, where: str) -> ReferenceImage:
    if not isinstance(value, str | PathLike) or not str(value):
        raise UserError(f"{where}={show(value)}: expected the path of an image")
    path = PACKAGE.parent / str(value) if str(value).startswith("fluxlab/") else Path(value).expanduser().absolute()
    try:
        width, height = open_image(path).size
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return ReferenceImage(str(path), sha256_of(path), (height, width))


def from_values(values: Sequence[Sequence[Mapping[str, Any]]]) -> PerPrompt:
    """Return what `values()` were made from, without reading the files."""
    return tuple(tuple(ReferenceImage(**{**v, "size": tuple(v["size"])}) for v in part) for part in values)


def grids(images: Sequence[ReferenceImage], pixels_per_token: int) -> tuple[tuple[int, int], ...]:
    """Return the token grids (rows, cols) of images whose sizes have been checked."""
    return tuple((height // pixels_per_token, width // pixels_per_token) for height, width in (i.size for i in images))


def tokens(images: Sequence[ReferenceImage], pixels_per_token: int) -> int:
    """Return the number of tokens of images."""
    return sum(rows * cols for rows, cols in grids(images, pixels_per_token))


def opened(samples: Sequence[Sequence[ReferenceImage]]) -> "list[list[Image.Image]] | None":
    """Return the images of each sample, as `Pipeline.sample` takes them; None if no sample has any."""
    return [[image.open() for image in images] for images in samples] if any(samples) else None


def sizes(samples: Sequence[Sequence[ReferenceImage]]) -> list[list[tuple[int, int]]] | None:
    """Return the sizes of each sample's images, as `Pipeline.check` takes them; None if no sample has any."""
    return [[image.size for image in images] for images in samples] if any(samples) else None
