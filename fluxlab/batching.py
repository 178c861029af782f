"""What a batch is given, made equal and checked: prompts, seeds, programs, sizes, images. No weights in here."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from fluxlab import sampling
from fluxlab.errors import UserError
from fluxlab.model import FluxParams
from fluxlab.positions import Context, Layout, Program, Prompt

T = TypeVar("T")

Programs = Program | Mapping[str, Any] | Sequence[Program | Mapping[str, Any] | None] | None
"""One program for all samples, or one a sample: a `Program`, a config of edits, or None for untouched ids."""


def read_programs(programs: Programs) -> list[Program] | None:
    """Read one program or a list of them; errors name `programs` and, in a list, which."""
    if programs is None:
        return None
    if isinstance(programs, str | Program | Mapping) or not isinstance(programs, Sequence):
        return [Program.from_config(programs, "programs")]
    return [Program.from_config(program, f"programs[{i}]") for i, program in enumerate(programs)]


def zipped(**columns: "T | Sequence[T] | None") -> "dict[str, list[T] | None]":
    """Every column at the batch's length; a single value or a sequence of one is repeated, None stays."""
    if columns["prompts"] is None:
        raise UserError("prompts=None: a prompt or a list of them is needed")
    lists = {key: _as_list(key, value) for key, value in columns.items() if value is not None}
    sizes = {key: len(value) for key, value in lists.items()}
    batch = max(sizes.values())
    if any(size not in (1, batch) or size == 0 for size in sizes.values()):
        counts = ", ".join(f"{size} {key}" for key, size in sizes.items())
        raise UserError(f"{counts}: equal numbers are needed, or one that serves all")
    for key in {"prompts", "negative_prompts"} & set(lists):
        wrong = [value for value in lists[key] if not isinstance(value, str)]
        if wrong:
            raise UserError(f"{key} holds {wrong[0]!r}: strings are needed")
    return {key: lists[key] * (batch // sizes[key]) if key in lists else None for key in columns}


def _as_list(key: str, value: "T | Sequence[T]") -> "list[T]":
    if isinstance(value, str | Integral):
        return [value]
    if not hasattr(value, "__iter__"):
        raise UserError(f"{key}={value!r}: one value or a list of them is needed, of strings or whole numbers")
    return list(value)


def check_guidance(
    distilled: bool, guidance: float | None, true_cfg: float | None, negative_prompts: Sequence[str] | None
) -> None:
    """Raise for what guides and does not fit the model, or each other."""
    for key, value in (("guidance", guidance), ("true_cfg", true_cfg)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{key}={value!r}: a finite number is needed")
    if guidance is not None and not distilled:
        raise UserError(f"guidance={guidance}: this model is not guidance-distilled; leave it out or use true_cfg")
    if true_cfg is None and negative_prompts is not None:
        raise UserError("negative_prompts act through true_cfg: give it too, for instance true_cfg=4")


def check_length(length: int) -> int:
    """The number of T5 tokens, a whole number from 1."""
    if isinstance(length, bool) or not isinstance(length, Integral) or length < 1:
        raise UserError(f"max_sequence_length={length!r}: a whole number from 1 is needed")
    return length


def check_channels(name: str, read: int, held: int) -> None:
    """Raise for a transformer that reads more channels a token than latents hold."""
    if read != held:
        raise UserError(
            f"{name or 'this model'} reads {read} channels a token, latents have {held}: Fill, Canny and Depth need an "
            "image as condition, which generate() does not take"
        )


def token_grid(height: int, width: int, step: int) -> tuple[int, int]:
    """Token rows and columns of a size in pixels, `step` of them a token."""
    for key, pixels in (("height", height), ("width", width)):
        if isinstance(pixels, bool) or not isinstance(pixels, Integral):
            raise UserError(f"{key}={pixels!r}: a whole number of pixels is needed")
        if pixels < step or pixels % step:
            below = max(step, pixels // step * step)
            raise UserError(f"{key}={pixels}: must be a multiple of {step}, for instance {below} or {below + step}")
    return height // step, width // step


def context(
    p: FluxParams,
    layout: Layout,
    sigmas: Sequence[float],
    prompts: Sequence[Prompt | None] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Context:
    """What programs and probes are settled against, for a model of these sizes; dtype: that of the ids."""
    axes = len(p.axes_dim)
    ids = torch.cat((sampling.text_ids(1, layout.text, axes), sampling.image_ids(1, *layout.grid, axes)), 1)
    return Context(
        ids=ids.to(device, dtype),
        layout=layout,
        axes_dim=p.axes_dim,
        theta=p.theta,
        double=p.depth,
        single=p.depth_single_blocks,
        heads=p.num_heads,
        sigmas=sigmas,
        prompts=prompts,
    )


def start(
    seeds: Sequence[int], latents: Tensor | None, batch: int, channels: int, grid: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Packed starting noise `(B, N, C)` in fp32: `latents`, or drawn in the model's dtype, as both implementations do.

    Raises `UserError` for latents of another shape.
    """
    rows, cols = grid
    if latents is None:
        return sampling.pack(sampling.noise(seeds, channels // 4, 2 * rows, 2 * cols, dtype)).float()
    if latents.ndim != 3 or latents.shape[1:] != (rows * cols, channels):
        raise UserError(
            f"latents have shape {tuple(latents.shape)}: packed latents ({batch}, {rows * cols}, {channels}) are "
            "needed for this size"
        )
    return latents.float().expand(batch, -1, -1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of a tensor `(B, 3, H, W)` in 0 … 1."""
    array = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in array]


def as_tensor(images: Sequence[Image.Image]) -> Tensor:
    """`(B, 3, H, W)`, fp32 in 0 … 1, of PIL images of one size."""
    import numpy as np

    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise UserError(f"images of one size are needed, these have {sorted(sizes)} (width, height)")
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
