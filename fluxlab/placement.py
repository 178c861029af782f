"""What a model whose transformer is streamed needs to know in advance: sizes of batches, and their conditioning."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fluxlab import batching, sampling
from fluxlab.memory import Memory, ModelSizes, Plan, Room, Workload, make_plan
from fluxlab.memory.modulations import Conditions, Inputs, Steps
from fluxlab.memory.streaming import resident_bytes, room_of
from fluxlab.parts import ModelParts
from fluxlab.positions import Context
from fluxlab.probes import WORKING, Probe, memory, resolve
from fluxlab.sampling import Sampling


def workload(
    settings: Sampling,
    batch: int,
    batches: int = 1,
    probe_bytes: int = 0,
    references: int = 0,
    at_once: int | None = None,
) -> Workload:
    """Return the sizes of a batch. settings: resolved. references: tokens of reference images. at_once: samples of one
    forward; None means all."""
    forwards = settings.steps * (1 if settings.true_cfg in (None, 1) else 2)
    return Workload(
        batch=min(batch, at_once or batch),
        height=settings.height,
        width=settings.width,
        text=settings.max_sequence_length,
        steps=forwards,
        references=references,
        probe_bytes=probe_bytes,
        batches=batches,
        samples=batch,
    )


def resident_plan(parts: ModelParts, work: Callable[[], Workload]) -> Plan:
    """Return the plan of a model that is on the device as a whole, which says what it takes.

    On a CPU the process counts as it is now, without the weights.
    """
    transformer, autoencoder = parts.transformer, parts.autoencoder
    weights = [weight for part in (transformer, autoencoder) for weight in part.parameters()]
    sizes = ModelSizes(
        transformer.params,
        autoencoder.params,
        dtype=parts.dtype,
        stored=parts.dtype,
        autoencoder_dtype=next(autoencoder.parameters()).dtype,
        text_bytes=0,  # they have left the device
        text_layer_bytes=0,
    )
    room = room_of(parts.device)
    if room.device == "cpu":
        room = Room("cpu", room.free, max(0, resident_bytes() - sum(weight.nbytes for weight in weights)))
    elif room.free is not None:
        room = Room(room.device, room.free + sum(weight.nbytes for weight in weights))
    return make_plan(sizes, work(), Memory("resident"), room)


def probe_bytes(probe: Probe | None, context: Context, batch: int, device: torch.device) -> int:
    """Return what a probe takes of the device. Its results are on the host, which on a CPU is the device."""
    if probe is None:
        return 0
    needed = memory(resolve(probe.capture, context, batch), context)
    return sum(needed.values()) if device.type == "cpu" else needed[WORKING]


def filled(batch: int, value: float, device: torch.device) -> Tensor:
    """Return `(batch,)` in fp32."""
    return torch.full((batch,), float(value), dtype=torch.float32, device=device)


def guidance_of(parts: ModelParts, batch: int, settings: Sampling) -> Tensor | None:
    """Return the distilled guidance `(batch,)` as the model reads it; None for a model without it."""
    if not parts.transformer.params.guidance_embed:
        return None
    guidance = filled(batch, settings.guidance, parts.device)
    return sampling.round_timesteps(guidance, settings.timestep_rounding and "bfl")


Together = Sequence[Sequence[Sequence[int]]]
"""For each step, the samples of each of its forwards."""


def conditions_of(
    parts: ModelParts, texts: Sequence[str], settings: Sampling, sigmas: Sequence[float], together: Together
) -> tuple[Hashable, Callable[[], Conditions]]:
    """Return what the modulations of a batch depend on: a key, and a function that returns the tensors.

    A forward is known by its time and its samples: on a GPU the bits of a row may depend on the number of rows.
    """
    length, rounding = settings.max_sequence_length, settings.timestep_rounding
    forwards = tuple((t, tuple(samples)) for t, step in zip(sigmas[:-1], together, strict=True) for samples in step)

    def conditions() -> Conditions:
        encoded = [parts.encode_prompt(text, length, truncate=True, unknown_words="allow") for text in texts]
        pooled = [torch.cat(part) for part in list(zip(*encoded, strict=True))[1:]]  # FLUX.2 has none
        guidance = guidance_of(parts, len(texts), settings)

        def inputs(now: tuple[float, tuple[int, ...]]) -> Inputs:
            t, samples = now
            times = sampling.round_timesteps(filled(len(samples), t, parts.device), rounding)
            return times, *(batching.rows(part, samples) for part in (*pooled, guidance))

        return Conditions(forwards, inputs, sum(len(samples) for _, samples in forwards))

    return (tuple(texts), length, settings.guidance, rounding, forwards), conditions


def modulations(
    parts: ModelParts, texts: Sequence[str], settings: Sampling, sigmas: Sequence[float], together: Together
) -> Steps | None:
    """Return the modulations of a batch, known in advance; None for a model that is on the device as a whole."""
    if parts.streaming is None:
        return None
    return parts.streaming.residency.modulations(*conditions_of(parts, texts, settings, sigmas, together))


def announce(
    parts: ModelParts,
    batches: Sequence[Sequence[str]],
    settings: Sampling,
    sigmas: Sequence[float],
    at_once: int | None,
) -> None:
    """Note the prompts of batches that will be sampled with these settings.

    It is a guess: samples that turn out to share steps get their modulations when they are sampled.
    """
    for prompts in dict.fromkeys(map(tuple, batches)):
        rows = [samples for samples, _ in sampling.own_rows(len(prompts)).parts(at_once)]
        together = [rows] * (len(sigmas) - 1)
        parts.streaming.residency.known.announce(*conditions_of(parts, prompts, settings, sigmas, together))
