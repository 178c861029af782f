"""Reference images: further tokens behind those of the image, with ids of their own. Any number and size a sample."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fluxlab.errors import UserError, show
from fluxlab.pixels import image_tensor

Size = tuple[int, int]
T = TypeVar("T")


class Grids(NamedTuple):
    """The token grids of a sequence, each (rows, cols): the image's, and those of its reference images in order.

    further: tokens of the texts of regions, in addition to those of the prompt.
    """

    image: Size
    references: tuple[Size, ...] = ()
    further: int = 0

    @classmethod
    def of(cls, grid: "Size | Grids") -> "Grids":
        """Return `grid` itself, or an image's grid without references."""
        return grid if isinstance(grid, Grids) else cls(grid)


class References(NamedTuple):
    """The reference images of one sample: the grid of each, and packed latents `(1, R, C)` in fp32 of all in order.

    tokens: None where nothing is computed, or without references.
    """

    grids: tuple[Size, ...] = ()
    tokens: Tensor | None = None


def read(references: Any) -> list[list[Tensor]] | None:
    """Return the reference images of each sample, each `(1, 3, H, W)` in 0 … 1; one list serves the whole batch.

    references: a list per sample of images as `image_tensor` takes them, None or [] for a sample without any; or one
    image, which serves every sample. Raises `UserError` for anything else.
    """
    if references is None:
        return None
    if not isinstance(references, list | tuple):
        references = [[references]]
    if not references:
        raise UserError("references=[]: expected a list of images per sample, [[]] for none")
    for i, sample in enumerate(references):
        if not isinstance(sample, list | tuple | None):
            raise UserError(
                f"references[{i}]: {show(sample)}, expected a list of images per sample; [[a, b]] gives both to every "
                "sample, [[a], [b]] one to each"
            )
    return [[_one(image, f"references[{i}][{j}]") for j, image in enumerate(s or ())] for i, s in enumerate(references)]


def _one(image: Any, where: str) -> Tensor:
    try:
        tensor = image_tensor(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if len(tensor) != 1:
        raise UserError(f"{where}: a batch of {len(tensor)} images, expected one image")
    return tensor


def sized(sizes: Sequence[Sequence[Size]], grid_of: Callable[[int, int], Size], where: str = "references") -> list:
    """Return `References` of images of these sizes (height, width) in pixels, without tokens.

    grid_of: token rows and columns of a size. Raises `UserError` for a size that is not a multiple of a token's.
    """

    def grid(size: Size, path: str) -> Size:
        try:
            return grid_of(*size)
        except UserError as error:
            raise UserError(f"{path}: {error}; resize or crop the image") from None

    return [
        References(tuple(grid(size, f"{where}[{i}][{j}]") for j, size in enumerate(sample)))
        for i, sample in enumerate(sizes)
    ]


def encoded(
    images: Sequence[Sequence[Tensor]],
    grid_of: Callable[[int, int], Size],
    encode: Callable[[Tensor], tuple[Tensor, int, int]],
) -> list[References]:
    """Return the references of each sample with their tokens. Equal images are encoded once, and each by itself, so
    that its tokens do not depend on the batch.
    """
    known: dict[tuple, Tensor] = {}

    def tokens(image: Tensor) -> Tensor:
        content = hashlib.sha256(np.ascontiguousarray(image.numpy()).data).hexdigest()
        key = (tuple(image.shape), content)
        if key not in known:
            known[key] = encode(image)[0]
        return known[key]

    sizes = sized([[tuple(image.shape[-2:]) for image in sample] for sample in images], grid_of)
    return [
        References(one.grids, torch.cat([tokens(image) for image in sample], 1) if sample else None)
        for one, sample in zip(sizes, images, strict=True)
    ]


def most_tokens(references: Sequence[References] | None, texts: Iterable[Sequence[str]] = (), length: int = 0) -> int:
    """Return the largest numbers of tokens that references and further texts of `length` tokens add to a sample."""
    most = max((sum(rows * cols for rows, cols in one.grids) for one in references or ()), default=0)
    return most + length * max(map(len, texts), default=0)


def joined(grid: "Size | Grids", references: Sequence[References] | None) -> tuple[Grids, Tensor | None]:
    """Return the grids of a batch of one layout, and the tokens `(B, R, C)` behind those of its images."""
    image = Grids.of(grid).image
    if not references:
        return Grids(image), None
    tokens = [one.tokens for one in references]
    return Grids(image, references[0].grids), None if tokens[0] is None else torch.cat(tokens)


def behind(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the image tokens `(B, N, C)` followed by those of the references, in the dtype of `x`."""
    return x if tokens is None else torch.cat((x, tokens.to(x.dtype)), 1)


def layouts(references: Sequence[References] | None, texts: Sequence[Sequence[str]] = ()) -> list[list[int]]:
    """Return the samples with equal token grids and numbers of further texts, in order of appearance.

    No list without references and texts.
    """
    groups: dict[tuple, list[int]] = {}
    for i in range(max(len(references or ()), len(texts))):
        key = (references[i].grids if references else (), len(texts[i]) if texts else 0)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def check_uniform(probe: Any, injects: bool) -> None:
    """Raise `UserError` for what needs samples of one layout: a probe, whose arrays have one shape, and `inject`."""
    if probe is not None or injects:
        what = "probe: its arrays have one shape" if probe is not None else "programs: inject takes from another sample"
        raise UserError(
            f"{what}, but the samples differ in the number or size of reference images, or in the number of prompts "
            "of regions; call generate() once for each"
        )


def pick(values: Sequence[T] | None, samples: Sequence[int]) -> list[T] | None:
    """Return the values of some samples; None stays None."""
    return None if values is None else [values[i] for i in samples]


def split(
    groups: Sequence[Sequence[int]], field_of: Callable[[Sequence[int]], Callable[[Tensor, float], Tensor]]
) -> Callable[[Tensor, float], Tensor]:
    """Return the velocity of a batch whose samples have different layouts: one forward for each layout.

    field_of: the velocity of some samples. Padding with a mask would change the bits of a sample with its batch.
    """
    fields = [field_of(group) for group in groups]
    order = torch.tensor([i for group in groups for i in group]).argsort()

    def velocity(x: Tensor, t: float) -> Tensor:
        parts = [field(x[list(group)], t) for group, field in zip(groups, fields, strict=True)]
        return torch.cat(parts)[order.to(x.device)]

    return velocity
