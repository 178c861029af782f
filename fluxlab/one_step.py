"""How much programs change the velocity of one forward, with the blocks before a program acts computed once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxlab import batching, positions, sampling
from fluxlab.errors import UserError
from fluxlab.pipeline import Pipeline
from fluxlab.pixels import Images
from fluxlab.positions import Program
from fluxlab.sampling import Sampling
from fluxlab.select.where import resolve_blocks

CHUNK = 16
"""Samples of one forward. Outputs of all blocks are kept for so many samples: 26 MB per block each for FLUX.1."""


class OneStep(NamedTuple):
    """change: `(samples, programs)`, fp64 on the CPU, in dB. evaluations: blocks that were computed, once per sample.
    naive: those of one whole forward per program and one without."""

    change: Tensor
    evaluations: int
    naive: int


@torch.inference_mode()
def one_step(
    pipe: Pipeline,
    images: Images,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    programs: batching.Programs,
    sigma: float = 0.75,
    settings: Sampling | None = None,
) -> OneStep:
    """Return the change of the velocity that each program makes at one noise level, 10·log10(|v - v'|² / |v|²).

    It is -inf for a program that changes nothing, and 0 dB where the change is as large as the velocity. The velocity
    is that at x = (1 - σ)·image + σ·noise, with the noise of the seed. A program shares the blocks before the first
    one in which it acts with the forward without a program, with the same bits. So one edit in each of n blocks costs
    about half of n forwards.

    images: one per sample, as `Pipeline.encode` takes them. programs: each is applied to every sample. Raises
    `UserError` for σ outside of 0 … 1, a streamed model, programs that change sizes, activations or the text,
    or pick tokens, and `NonFiniteError` if a velocity is not finite.
    """
    if isinstance(sigma, bool) or not 0 < sigma <= 1:
        raise UserError(f"sigma={sigma!r}: expected a noise level above 0 and at most 1")
    if pipe.streaming is not None:
        raise UserError("one_step: blocks are streamed, but it needs all of them; load the model with memory=resident")
    listed = batching.read_programs(programs) or [Program()]
    blocks = [*pipe.transformer.double_blocks, *pipe.transformer.single_blocks]
    first = [_first_block(program, pipe) for program in listed]
    x, rows, cols = pipe.encode(images)
    batch = batching.zipped(prompts=prompts, seeds=seeds, images=list(x))
    side = pipe.pixels_per_token
    resolved = pipe.resolve(settings or Sampling(height=rows * side, width=cols * side))
    clean = torch.stack(batch["images"])
    channels = pipe.autoencoder.params.z_channels
    noise = pipe.family.noise(batch["seeds"], channels, rows, cols, pipe.dtype).float().to(clean.device)
    noisy, changes, computed = (1 - sigma) * clean + sigma * noise, [], 0
    finite = sampling.FiniteCheck(sampling.sample_names(batch["prompts"], batch["seeds"]), 1, pipe.dtype)
    for start in range(0, len(noisy), CHUNK):
        part, texts = noisy[start : start + CHUNK], batch["prompts"][start : start + CHUNK]

        def velocity(program: Program, part: Tensor = part, texts: Sequence[str] = texts) -> Tensor:
            field = pipe._velocity(texts, None, [program], resolved, (rows, cols), (sigma, 0.0))
            return field(part, sigma).double().cpu()

        with replayed(blocks) as replay:
            plain, columns = velocity(Program()), []
            for program, block in zip(listed, first, strict=True):
                replay.start(block)
                edited = velocity(program)
                columns.append((edited - plain).square().sum((1, 2)) / plain.square().sum((1, 2)))
        computed += replay.evaluations * len(part)
        changes.append(10 * torch.stack(columns, 1).log10())
    change = torch.cat(changes)
    finite.latents(0, change.nan_to_num(nan=float("nan"), neginf=0.0))
    finite.finish(None)
    return OneStep(change, computed, len(noisy) * len(blocks) * (1 + len(listed)))


def _first_block(program: Program, pipe: Pipeline) -> int:
    """Return the first block in which a program acts; the number of blocks for a program that acts in none.

    Raises `UserError` for a program whose effect begins elsewhere.
    """
    p = pipe.transformer.params
    resampled = positions.split_resample(program)[1] is not None
    if resampled or positions.has_interventions(program) or positions.region_prompts(program):
        raise UserError(
            f"programs: one step cannot compare {program.describe()}, which acts on activations, sizes or the text"
        )
    blocks = [resolve_blocks(e.where["blocks"], p.depth, p.depth_single_blocks, e.path) for e in program.edits]
    return min((min(chosen) for chosen in blocks), default=p.depth + p.depth_single_blocks)


class Replay:
    """Outputs of blocks in the first forward, returned again by the blocks before `start` in later ones."""

    def __init__(self) -> None:
        self.outputs: dict[int, Any] = {}
        self.before = 0
        self.evaluations = 0

    def start(self, block: int) -> None:
        """Compute the next forward from this block on."""
        self.before = block

    def call(self, number: int, compute: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if number < self.before:
            return self.outputs[number]
        self.evaluations += 1
        result = compute(*arguments, **named)
        return self.outputs.setdefault(number, result) if self.before == 0 and number not in self.outputs else result


@contextmanager
def replayed(blocks: Sequence[torch.nn.Module]) -> Iterator[Replay]:
    """Return a `Replay` that stands between a model and its blocks inside the context."""
    replay = Replay()
    try:
        for number, block in enumerate(blocks):
            compute = block.forward
            block.forward = lambda *a, _n=number, _f=compute, **k: replay.call(_n, _f, *a, **k)
        yield replay
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
