"""Check the inputs of a batch and give them equal lengths: prompts, seeds, programs, sizes, images. No weights."""

from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.families import Family, family_of
from fluxlab.model import Rotary
from fluxlab.model.groups import KeyGroups
from fluxlab.model.protocols import TransformerSizes
from fluxlab.model.sites import Observed, Site
from fluxlab.positions import Compiled, Context, Interventions, Layout, Placement, Program, Prompt
from fluxlab.probes import Probe

T = TypeVar("T")

Programs = Program | Mapping[str, Any] | Sequence[Program | Mapping[str, Any] | None] | None
"""One program for all samples, or one a sample: a `Program`, a config of edits, or None for untouched ids."""


def read_programs(programs: Programs) -> list[Program] | None:
    """Return the programs of a batch as a list. Errors name `programs`, and in a list the index."""
    if programs is None:
        return None
    if isinstance(programs, str | Program | Mapping) or not isinstance(programs, Sequence):
        return [Program.from_config(programs, "programs")]
    return [Program.from_config(program, f"programs[{i}]") for i, program in enumerate(programs)]


def zipped(**columns: "T | Sequence[T] | None") -> "dict[str, list[T] | None]":
    """Return every column as a list of the batch's length. A single value is repeated, and None stays None.

    Raises `UserError` for lengths that differ, and for prompts that are not strings.
    """
    if columns["prompts"] is None:
        raise UserError("prompts=None: expected a prompt or a list of prompts")
    lists = {key: _as_list(key, value) for key, value in columns.items() if value is not None}
    sizes = {key: len(value) for key, value in lists.items()}
    batch = max(sizes.values())
    if any(size not in (1, batch) or size == 0 for size in sizes.values()):
        counts = ", ".join(f"{size} {key}" for key, size in sizes.items())
        raise UserError(f"{counts}: expected equal numbers, or one for the whole batch")
    for key in {"prompts", "negative_prompts"} & set(lists):
        wrong = [value for value in lists[key] if not isinstance(value, str)]
        if wrong:
            raise UserError(f"{key} holds {wrong[0]!r}: expected strings")
    return {key: lists[key] * (batch // sizes[key]) if key in lists else None for key in columns}


def _as_list(key: str, value: "T | Sequence[T]") -> "list[T]":
    if isinstance(value, str | Integral):
        return [value]
    if not hasattr(value, "__iter__"):
        raise UserError(f"{key}={value!r}: expected a string or whole number, or a list of them")
    return list(value)


def check_guidance(distilled: bool, guidance: float | None) -> None:
    """Raise `UserError` for a guidance strength that the model cannot take."""
    if guidance is not None and not distilled:
        raise UserError(f"guidance={guidance}: this model is not guidance-distilled; leave it out or use true_cfg")


def check_negatives(true_cfg: float | None, negative_prompts: Sequence[str] | None) -> None:
    """Raise `UserError` for negative prompts without `true_cfg`."""
    if true_cfg is None and negative_prompts is not None:
        raise UserError("negative_prompts have no effect without true_cfg: add it, for instance true_cfg=4")


def check_channels(name: str, expected: int, latents: int) -> None:
    """Raise `UserError` if the transformer expects another number of channels per token than latents have."""
    if expected != latents:
        raise UserError(
            f"{name or 'this model'} reads {expected} channels per token, latents have {latents}: Fill, Canny and "
            "Depth need an image as condition, which generate() does not take"
        )


def check_captured(probe: Probe, programs: Sequence[Program] | None) -> None:
    """Raise `UserError` if a probe reads attention that is an average over several tables. Call it after `begin`."""
    for program in programs or () if probe.reads_attention else ():
        for edit in program.edits:
            if edit.acts_on == "windows":
                raise UserError(
                    f"{edit.path}: {edit.op} has several tables, whose attention is averaged and has no single value; "
                    f"leave the capture of {', '.join(probe.reads_attention)} out, or the edit"
                )


def token_grid(height: int, width: int, step: int) -> tuple[int, int]:
    """Return the token rows and columns of an image size in pixels. A token covers `step` × `step` pixels."""
    for key, pixels in (("height", height), ("width", width)):
        if isinstance(pixels, bool) or not isinstance(pixels, Integral):
            raise UserError(f"{key}={pixels!r}: expected a whole number of pixels")
        if pixels < step or pixels % step:
            below = max(step, pixels // step * step)
            raise UserError(f"{key}={pixels}: must be a multiple of {step}, for instance {below} or {below + step}")
    return height // step, width // step


def context(
    p: TransformerSizes,
    layout: Layout,
    sigmas: Sequence[float],
    prompts: Sequence[Prompt | None] | None,
    device: torch.device,
    dtype: torch.dtype,
    trained: tuple[int, int],
    trained_text: int,
) -> Context:
    """Return the context in which programs and probes are resolved, with ids `(1, N, A)` in `dtype` on the host.

    device: of the model. trained, trained_text: the token grid and the number of text tokens that it was trained on.
    """
    text, *images = family_of(p).ids(layout.text, layout.grids)
    texts = 1 + (layout.further // layout.text if layout.further else 0)  # each text of a region as that of the prompt
    ids = torch.cat([*[text] * texts, *images])
    return Context(
        ids=ids[None].to(dtype),
        layout=layout,
        axes_dim=p.axes_dim,
        theta=p.theta,
        double=p.depth,
        single=p.depth_single_blocks,
        heads=p.num_heads,
        sigmas=sigmas,
        prompts=prompts,
        trained=trained,
        trained_text=trained_text,
        mlp_ratio=p.mlp_ratio,
        device=device,
    )


def start(
    seeds: Sequence[int],
    latents: Tensor | None,
    batch: int,
    channels: int,
    grid: tuple[int, int],
    dtype: torch.dtype,
    family: Family,
) -> Tensor:
    """Return the packed starting noise `(B, N, C)` in fp32, on the CPU unless `latents` are given.

    Noise is drawn in the model's `dtype`, as in both reference implementations. Raises `UserError` for latents of
    another shape, or with NaN or infinity.
    """
    rows, cols = grid
    if latents is None:
        return family.noise(seeds, channels // family.patch**2, rows, cols, dtype).float()
    if latents.ndim != 3 or latents.shape[1:] != (rows * cols, channels):
        raise UserError(
            f"latents have shape {tuple(latents.shape)}: expected packed latents ({batch}, {rows * cols}, {channels}) "
            "for this size"
        )
    if not latents.isfinite().all():
        raise UserError("latents hold NaN or infinity: expected finite numbers")
    return latents.float().expand(batch, -1, -1)


def starts(batch: Mapping[str, Any]) -> list[Hashable]:
    """Return for each sample of `zipped` columns what its noise and conditioning depend on but for its program."""
    columns = [batch["prompts"], batch["seeds"], batch["negative_prompts"], batch["references"]]
    given = [column for column in columns if column is not None]
    return [tuple(_identity(part) for part in parts) for parts in zip(*given, strict=True)]


def _identity(part: Any) -> Hashable:
    return tuple(map(id, part)) if isinstance(part, list) else part


def rows(x: Tensor | None, samples: Sequence[int]) -> Tensor | None:
    """Return the rows of `samples`, of a tensor with one row per sample. All of them in order are x itself."""
    if x is None or tuple(samples) == tuple(range(len(x))):
        return x
    return x[torch.tensor(samples).to(x.device)]


def block_sites(
    interventions: Interventions | None, probe: Probe | None, step: int, t: float, rotary: Any, blocks: int
) -> list[Site | None] | None:
    """Return the `sites` of `Flux.forward` at one step: edits of activations, and activations to capture.

    rotary: the tables of this step. Call it after `probe.taps`.
    """
    if interventions is None and probe is None:
        return None
    tables = [(rotary, rotary)] * blocks if isinstance(rotary, Rotary) else rotary
    changed = None if interventions is None else interventions.at(step, t, tables)
    observers = None if probe is None else probe.observers(tables)
    if observers is None:
        return changed
    pairs = zip(observers, changed or [None] * blocks, strict=True)
    return [change if observe is None else Observed(observe, change) for observe, change in pairs]


class OnDevice:
    """The tables and masks of compiled programs on the device of the model, each moved once.

    Programs are compiled on the host: nothing is read back from the device, and it needs no fp64, which MPS lacks.
    dtype: of the model, to which masks are converted before they are moved.
    """

    def __init__(self, compiled: Compiled, device: torch.device, dtype: torch.dtype):
        self._compiled, self._device, self._dtype = compiled, device, dtype
        self._last: tuple[Placement, Placement] | None = None
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # on the host and on the device, by the id of the former

    def step(self, t: float) -> int:
        return self._compiled.step(t)

    def at(self, t: float, samples: Sequence[int] | None, x: Tensor) -> Placement:
        """Return what `Compiled.at` returns, on the device. What the step before used too is not moved again.

        x: the latents of the whole batch. They are read back only for programs that depend on them.
        """
        placement = self._compiled.at(t, samples, x.cpu() if self._compiled.sees_latents else None)
        if self._device.type == "cpu":
            return placement
        if self._last is None or self._last[0] is not placement:
            before, self._known = self._known, {}
            memo: dict[int, Any] = {}
            rotary = self._moved(placement.rotary, None, before, memo)
            mask = self._moved(placement.mask, self._dtype, before, memo)
            self._last = placement, Placement(rotary, mask)
        return self._last[1]

    def _moved(self, x: Any, dtype: torch.dtype | None, before: dict, memo: dict[int, Any]) -> Any:
        """Return nested tuples, lists and named tuples of tensors on the device. One object stays one object."""
        if isinstance(x, Tensor):
            if id(x) not in self._known:
                self._known[id(x)] = before.get(id(x)) or (x, x.to(dtype or x.dtype).to(self._device))
            return self._known[id(x)][1]
        if isinstance(x, list | tuple) and id(x) not in memo:
            parts = [self._moved(part, dtype, before, memo) for part in x]
            moved = type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
            memo[id(x)] = moved._replace(on_host=x.queries) if isinstance(x, KeyGroups) else moved
        return memo.get(id(x), x)
