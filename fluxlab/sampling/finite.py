"""Detect NaN and infinity while images are sampled: they are reported, and never returned as an image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import NonFiniteError, show
from fluxlab.sampling.denoise import OnStep


def finite_samples(x: Tensor) -> list[bool]:
    """Return for each sample of `x` `(B, …)` whether all its values are finite."""
    return x.isfinite().flatten(1).all(dim=1).tolist()


class FiniteCheck:
    """Records which samples of a batch become non-finite, and when. Samples of a batch do not affect each other.

    On the CPU each step is checked at once. Another device would have to finish the step first: there the checks are
    read together, by `finish`.

    names: one name per sample for the error message. steps: the number of sampling steps. dtype: of the model.
    cause: returns for a sample that failed in the first step what came before it and was not finite, or None.
    """

    def __init__(
        self, names: Sequence[str], steps: int, dtype: torch.dtype, cause: Callable[[int], str | None] | None = None
    ):
        self.names, self.total, self.dtype, self.cause = names, steps, dtype, cause
        self.steps: dict[int, int | None] = {}
        self.reasons: dict[int, str] = {}
        self._unread: list[tuple[Tensor, int | None, str]] = []

    def latents(self, step: int, x: Tensor) -> None:
        """Check the latents `(B, N, C)` after `step`, counted from 0.

        Raises `NonFiniteError` if no sample is left, on another device than the CPU not before `finish`.
        """
        self._record(x, step, f"its latents are not finite after step {step + 1} of {self.total}")
        if len(self.steps) == len(self.names):
            raise self.error(None)

    def watch(self, on_step: OnStep | None = None, progress: Callable[[int], None] | None = None) -> OnStep:
        """Return an `on_step` that checks the latents, then calls `on_step` and reports to `progress`."""

        def after_step(i: int, t: float, x: Tensor) -> None:
            self.latents(i, x)
            if on_step is not None:
                on_step(i, t, x)
            if progress is not None:
                progress(i + 1)

        return after_step

    def encoded(self, x: Tensor) -> None:
        """Check the latents `(B, N, C)` of encoded images."""
        self._record(x, None, "the autoencoder encodes it to NaN or infinity")

    def images(self, images: Tensor) -> None:
        """Check decoded images `(B, 3, H, W)`."""
        self._record(images, None, "its latents are finite, but the autoencoder decodes them to NaN or infinity")

    def finish(self, results: Sequence[Any] | None) -> None:
        """Raise `NonFiniteError` if a sample was not finite. `results` are those of the whole batch."""
        if self._unread:
            flags = torch.stack([flag for flag, _, _ in self._unread]).cpu().tolist()
            for wrong, (_, step, reason) in zip(flags, self._unread, strict=True):
                self._note(wrong, step, reason)
            self._unread.clear()
        if self.steps:
            raise self.error(results)

    def _record(self, x: Tensor, step: int | None, reason: str) -> None:
        if x.device.type == "cpu":
            self._note([not finite for finite in finite_samples(x)], step, reason)
        else:
            self._unread.append((x.isfinite().logical_not().flatten(1).any(dim=1), step, reason))

    def _note(self, wrong: Sequence[bool], step: int | None, reason: str) -> None:
        for i in (i for i, one in enumerate(wrong) if one and i not in self.steps):
            earlier = self.cause(i) if step == 0 and self.cause else None
            self.steps[i], self.reasons[i] = step, earlier or reason

    def error(self, results: Sequence[Any] | None) -> NonFiniteError:
        """Return the error for the recorded samples. `results` are those of the whole batch."""
        first = min(self.steps)
        others = f"; and {len(self.steps) - 1} more of {len(self.names)} samples" if len(self.steps) > 1 else ""
        lines = [f"{self.names[first]}: {self.reasons[first]}{others}"]
        if self.dtype == torch.float16:
            lines.append("float16 overflows above 65504: load the model with dtype bfloat16 or float32.")
        kept = None if results is None else [None if i in self.steps else result for i, result in enumerate(results)]
        return NonFiniteError("\n".join(lines), self.steps, self.reasons, kept)


def sample_names(prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
    """Return the names of a batch's samples for an error message."""
    seeds = [None] * len(prompts) if seeds is None else seeds
    return [
        f"sample {i} (prompt {show(prompt)}{'' if seed is None else f', seed {seed}'})"
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
