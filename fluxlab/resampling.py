"""Samples whose program has the op `resample`: computed at the model's own size, then resized."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fluxlab.errors import NonFiniteError, UserError
from fluxlab.positions import Program, sources_of, split_resample
from fluxlab.settings import Sampling

if TYPE_CHECKING:
    from PIL import Image

Sample = Callable[[Sequence[int], Sequence[Program], Sampling], "list[Image.Image]"]
"""Computes some samples of a batch, by their indices, with these programs and settings."""


def is_resampled(programs: Sequence[Program] | None) -> bool:
    """Return whether a program of the batch has the op `resample`."""
    return any(split_resample(program)[1] for program in programs or ())


def at_own_size(settings: Sampling, programs: Sequence[Program]) -> tuple[Sampling, list[Program]]:
    """Return the settings and programs with which resized samples are computed."""
    return replace(settings, height=None, width=None), [split_resample(program)[0] for program in programs]


def check_resampled(output: str, **unused: Any) -> None:
    """Raise `UserError` for what a sample of another size does not have."""
    if output != "pil":
        raise UserError(f"output={output!r}: the op resample returns images; leave output out")
    for key, value in unused.items():
        if value is not None:
            raise UserError(
                f"{key}: not possible with the op resample, whose image has another size while it is computed"
            )


def resampled(programs: Sequence[Program], settings: Sampling, sample: Sample) -> "list[Image.Image]":
    """Return the images of a batch in order. settings: complete, with the size asked for.

    Raises `NonFiniteError` for the whole batch, as `Pipeline.sample` does.
    """
    from PIL import Image

    parts = [split_resample(program) for program in programs]
    together = any(sources_of(program) for program in programs)  # whose sources are numbers within the batch
    images: list = [None] * len(programs)
    errors: list[tuple[list[int], NonFiniteError]] = []
    for at_own_size in (False, True):
        chosen = [i for i, (_, method) in enumerate(parts) if bool(method) == at_own_size]
        size = {"height": None, "width": None, "enlarge": None} if at_own_size else {}
        if not chosen:
            continue
        computed = range(len(programs)) if together else chosen
        try:
            found = sample(computed, [parts[i][0] for i in computed], replace(settings, **size))
        except NonFiniteError as error:
            errors.append((list(computed), error))
            found = error.results or [None] * len(computed)
        for i, image in zip(computed, found, strict=True):
            if i not in chosen:
                continue
            method = parts[i][1]
            if method and image is not None:
                image = image.resize((settings.width, settings.height), Image.Resampling[method.upper()])
            images[i] = image
    if errors:
        steps = {computed[i]: step for computed, error in errors for i, step in error.steps.items()}
        reasons = {computed[i]: reason for computed, error in errors for i, reason in error.reasons.items()}
        raise NonFiniteError("\n".join(str(error) for _, error in errors), steps, reasons, images)
    return images
