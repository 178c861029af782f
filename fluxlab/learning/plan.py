"""What a gradient through a model takes: memory, counted without weights, and forwards."""

from typing import TYPE_CHECKING

import torch

from fluxlab.checkpoints.memory import free_memory
from fluxlab.checkpoints.stored import published, stored
from fluxlab.config import ModelRow
from fluxlab.loading import pipeline_without_weights
from fluxlab.memory.costs import gb
from fluxlab.memory.gradients import GradientMemory, decoder_bytes, gradient_memory, keeps
from fluxlab.sampling import Sampling

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline


def needed(pipe: "Pipeline", settings: Sampling, batch: int, objective: str) -> GradientMemory:
    """Return the memory of a gradient of an objective through a batch. settings: resolved."""
    rows, cols = pipe.grid(settings.height, settings.width)
    found = gradient_memory(
        pipe.transformer.params,
        batch,
        settings.max_sequence_length,
        rows * cols,
        settings.steps,
        pipe.dtype,
        every_step=objective == "attention",
    )
    if objective != "sharpness":
        return found
    params, dtype = pipe.autoencoder.params, next(pipe.autoencoder.parameters()).dtype
    return found.with_decoder(decoder_bytes(pipe.family, params, batch, rows, cols, dtype))


def keeps_all(pipe: "Pipeline", settings: Sampling, batch: int, objective: str, memory_gb: float | None) -> bool:
    """Return whether all activations are kept: they fit into `memory_gb`, by default half of the free memory."""
    return keeps(needed(pipe, settings, batch, objective), free_memory(pipe.device), memory_gb)


def memory_lines(
    row: ModelRow,
    dtype: torch.dtype | None,
    device: torch.device,
    settings: Sampling,
    batch: int,
    objective: str,
    memory_gb: float | None,
) -> tuple["Pipeline", Sampling, list[str]]:
    """Return a pipeline without weights, the resolved settings, and lines about model and memory for a plan."""
    known = stored(row)
    parts = known or published(row)
    pipe = pipeline_without_weights(row, parts, dtype, device)
    settings = pipe.resolve(settings)
    found, free = needed(pipe, settings, batch, objective), free_memory(device)
    weights = sum(part.bytes_as(dtype) for part in parts.values())
    keep = keeps(found, None if free is None else max(0, free - weights), memory_gb)
    peak = found.whole if keep else found.checkpointed
    rows, cols = pipe.grid(settings.height, settings.width)
    room = "" if free is None else f"; {device} has {gb(free)} free{', not enough' if weights + peak > free else ''}"
    return (
        pipe,
        settings,
        [
            f"model      {row.name}, {settings.height} × {settings.width} px, {settings.steps} steps, {device}, "
            f"{str(pipe.dtype).removeprefix('torch.')}; {rows * cols + settings.max_sequence_length:,} tokens"
            + ("" if known else ", not downloaded yet"),
            f"gradient   {found.describe(keep)}, a batch of {batch}",
            f"memory     about {gb(weights + peak)}: weights {gb(weights)}, gradient {gb(peak)}{room}",
        ],
    )


def forwards(cells: int, steps: int, evaluations: int, gradients: int) -> str:
    """Return how many forwards of one cell are computed, and how many of them with a backward pass."""
    each = cells * steps
    return f"{each * (evaluations + gradients):,} forwards of one cell, {each * gradients:,} of them with gradients"
