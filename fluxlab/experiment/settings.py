"""The settings of a run: those of the experiment, the rest from the model, the device and the store."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fluxlab.checkpoints import default_device
from fluxlab.errors import UserError
from fluxlab.experiment.cells import Settings
from fluxlab.experiment.spec import Experiment
from fluxlab.model.attention import kernel
from fluxlab.pipeline import Pipeline

CPU_BATCH_TOKENS = 4480
"""Tokens per batch on a CPU: 16 images of the embedded model, one of FLUX.1. Larger batches are not faster there."""


def resolve(
    experiment: Experiment, pipe: Pipeline, known: Settings | None, batch_tokens: int | None, threads: int | None
) -> Settings:
    """Return the settings, with the values that the experiment leaves to the model, the device and the store.

    known: the settings of the images that the store has.
    """
    sampling = pipe.resolve(replace(experiment.sampling, dtype=None, device=None))
    rows, cols = pipe.grid(sampling.height, sampling.width)
    tokens = rows * cols + sampling.max_sequence_length
    device = pipe.device.type if pipe.device.index is None else str(pipe.device)
    parts = (pipe.transformer, pipe.autoencoder)
    dtypes = [next(part.parameters()).dtype for part in parts] + [*pipe.text.dtypes]  # may differ if left as stored
    if _same_device(known, device):
        batch_tokens = batch_tokens or known.batch_tokens
    dtype = "+".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return Settings(
        **asdict(replace(sampling, dtype=dtype, device=device)),
        model_digest=experiment.model_digest,
        schedule=pipe.schedule.config(),
        batch_tokens=batch_tokens or default_batch_tokens(pipe),
        threads=threads_of(device, known, threads),
        kernel=kernel(pipe.device.type, pipe.dtype, tokens),
        tokens=tokens,
        pixels_per_token=pipe.pixels_per_token,
        trained=[*pipe.grid(None, None), pipe.max_sequence_length],
    )


def threads_of(device: str, known: Settings | None, threads: int | None) -> int:
    """Return the number of threads: the requested one, else the store's if it was computed on such a device."""
    if threads is None and _same_device(known, device):
        threads = known.threads
    return threads or torch.get_num_threads()


def _same_device(known: Settings | None, device: str) -> bool:
    return known is not None and known.device.split(":")[0] == device.split(":")[0]


def default_batch_tokens(pipe: Pipeline, unloaded: int = 0, streams: bool = False) -> int:
    """Return the tokens per batch that use half the device's free memory, at the widest block's bytes per token.

    unloaded: bytes of weights that will still be loaded. streams: whether blocks will be streamed.
    """
    if pipe.device.type != "cuda":
        return CPU_BATCH_TOKENS
    if streams or pipe.streaming is not None:
        return 1  # one image at a time leaves the most room for blocks; several batches share a block that is loaded
    free = torch.cuda.mem_get_info(pipe.device)[0] - unloaded
    return max(1, int(free / 2 / bytes_per_token(pipe)))


def bytes_per_token(pipe: Pipeline) -> float:
    """Return the bytes of a token in the widest block: q, k, v, the MLP, and their inputs and copies."""
    return pipe.dtype.itemsize * pipe.transformer.params.hidden_size * (12 + 4 * pipe.transformer.params.mlp_ratio)


def device_of(experiment: Experiment, known: Settings | None) -> str:
    """Return the requested device, else the store's, else the default one (CUDA, mps, CPU)."""
    if experiment.device:
        return experiment.device
    return known.device if known else default_device()


def check_counts(**counts: int | None) -> None:
    """Raise `UserError` for a number of tokens or threads below 1."""
    for key, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{key}={value}: expected a whole number of at least 1, or null")


def check_unchanged(settings: Settings, out: Path | None, **values: int | None) -> None:
    """Raise `UserError` for a value that differs from the one that the store's images were computed with."""
    for key, value in values.items():
        if value is not None and value != getattr(settings, key):
            raise UserError(
                f"{key}={value}: the images in {out} were computed with {getattr(settings, key)}, and another value "
                "changes their last bits; leave it out, or name another out= folder"
            )


def check_kernel(pipe: Pipeline, settings: Settings) -> None:
    """Raise `UserError` if this machine computes attention with another kernel than the store's images."""
    current = kernel(pipe.device.type, pipe.dtype, settings.tokens)
    if current != settings.kernel:
        raise UserError(
            f"the images in this folder were computed with the attention kernel {settings.kernel!r}, this machine uses "
            f"{current!r}; name another out= folder"
        )


def halved(settings: Settings, error: Exception) -> Settings:
    """Return the settings with half the batch, and print that. Raises errors that are not about memory again."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in message:
        raise error
    if settings.batch_tokens // settings.tokens <= 1:
        raise UserError(
            f"out of memory with one image of {settings.height} × {settings.width} ({message[:120]}); "
            "use a smaller height= and width=, or dtype=bfloat16"
        ) from error
    half = settings.batch_tokens // 2
    print(f"out of memory: batch_tokens {settings.batch_tokens} → {half}, kept for this folder", file=sys.stderr)
    if settings.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return replace(settings, batch_tokens=half)
