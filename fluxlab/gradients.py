"""A batch whose velocity has gradients: with respect to arguments of programs, gains of rotary tables, and patches.

`attribution` and `learn` use it. `Pipeline.sample` computes the same without gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fluxlab import batching
from fluxlab.errors import UserError
from fluxlab.model.attention import Attended, Tap, score_factors
from fluxlab.model.sites import Site
from fluxlab.positions import Compiled, Context, Program, compile_programs, region_prompts
from fluxlab.references import Grids
from fluxlab.sampling import Sampling
from fluxlab.select.layout import IMAGE
from fluxlab.select.tokens import parse_tokens, resolve_tokens

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline

Step = Callable[[int, Tensor], Tensor]
"""(step, packed latents `(B, N, C)`) → velocity."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the velocity of a batch depends on besides its programs. noise: `(B, N, C)`. context: that of programs.

    pooled: FLUX.1's pooled text, `(B, V)`; nothing for FLUX.2. keep: keep the activations of every step for the
    backward pass instead of computing them again. regions: prompts of regions, whose text follows that of each sample.
    """

    pipe: "Pipeline"
    txt: Tensor
    pooled: tuple[Tensor, ...]
    guidance: Tensor | None
    noise: Tensor
    context: Context
    keep: bool = False
    regions: tuple[str, ...] = ()

    @property
    def sigmas(self) -> Sequence[float]:
        return self.context.sigmas

    def times(self, step: int) -> Tensor:
        return torch.full((len(self.noise),), self.sigmas[step], dtype=self.noise.dtype, device=self.noise.device)


def prepare(
    pipe: "Pipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sampling | None = None,
    keep: bool = False,
    regions: Sequence[str] = (),
) -> Prepared:
    """Encode the prompts and draw the noise of a batch. keep, regions: as in `Prepared`.

    Raises UserError as `Pipeline.sample` does.
    """
    if pipe.streaming is not None and not pipe.streaming.residency.mapped:
        raise UserError("gradients need every block's weights in memory: load the model with memory='resident'")
    settings = pipe.resolve(settings or Sampling())
    if settings.true_cfg not in (None, 1):
        raise UserError(f"true_cfg={settings.true_cfg}: gradients go through one forward per step, leave it out")
    length, (rows, cols) = settings.max_sequence_length, pipe.grid(settings.height, settings.width)
    pipe.text.check([*prompts, *regions], length, settings.truncate, settings.unknown_words)
    txt, *pooled = (part.clone() for part in pipe.text_tokens(prompts, [regions] * len(prompts), length))
    exact = torch.promote_types(pipe.dtype, torch.float32)
    guidance = None
    if pipe.transformer.params.guidance_embed:
        guidance = torch.full((len(prompts),), float(settings.guidance), dtype=exact, device=pipe.device)
    channels = pipe.family.channels(pipe.autoencoder.params)
    noise = batching.start(seeds, None, len(prompts), channels, (rows, cols), pipe.dtype, pipe.family)
    noise = noise.to(pipe.device, exact)
    grids = Grids((rows, cols), further=len(regions) * length)
    context = pipe.context(prompts, length, grids, pipe.schedule.times(settings.steps, rows * cols))
    return Prepared(pipe, txt, tuple(pooled), guidance, noise, context, keep, tuple(regions))


def compiled(prepared: Prepared, programs: Program | Sequence[Program]) -> Compiled:
    """Compile one program for the whole batch, or one per sample. Arguments may be tensors with gradients.

    Raises UserError for edits of activations, of which gradients are not computed, and for other prompts of regions
    than those of `prepared`.
    """
    programs, context = [programs] if isinstance(programs, Program) else list(programs), prepared.context
    for edit in [edit for program in programs for edit in program.edits if edit.acts_on == "activations"]:
        raise UserError(f"{edit.path}: gradients are computed for edits of positions and attention, not for {edit.op}")
    for prompts in map(region_prompts, programs):
        if prompts != prepared.regions:
            raise UserError(f"programs: prompts of regions {list(prompts)}, but the batch has {list(prepared.regions)}")
    if any(program.sees_latent for program in programs) and len(programs) == 1:
        programs = programs * len(prepared.noise)
    if not any(program.names_words for program in programs):
        context = replace(context, prompts=None)
    return compile_programs(programs, context)


@contextmanager
def checkpointed(pipe: "Pipeline") -> Iterator[None]:
    """Keep the inputs of each block only. The rest of a block's activations are computed again in the backward pass."""
    blocks = [*pipe.transformer.double_blocks, *pipe.transformer.single_blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class frozen:
    """Keep the weights of a pipeline from receiving gradients for the time of a block."""

    def __init__(self, pipe: "Pipeline"):
        modules = (pipe.transformer, pipe.autoencoder)
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)


def stepping(
    prepared: Prepared,
    programs: Compiled,
    *,
    gains: Tensor | None = None,
    sites: Callable[[int], Sequence[Site | None]] | None = None,
    taps: Callable[[int], Sequence[Tap | None]] | None = None,
) -> Step:
    """Return the velocity of a batch with gradients.

    gains: `(steps, blocks, H, d/2)`, factors of the queries' rotary tables. A factor g multiplies the part of every
    score that its pair of channels contributes. sites, taps: those of a step.
    """
    model, placed = prepared.pipe.transformer, batching.OnDevice(programs, prepared.pipe.device, prepared.pipe.dtype)
    # made here and not in a step: steps are checkpointed, and what is computed again must read the same tables
    placements = None if programs.sees_latents else [placed.at(t, None, prepared.noise) for t in prepared.sigmas[:-1]]

    def velocity(step: int, x: Tensor) -> Tensor:
        placement, chosen = placements and placements[step], sites and sites(step)
        if placement is None:  # edits that see latents are constants of them
            placement = placed.at(prepared.sigmas[step], None, x.detach())
        if gains is not None:
            assert chosen is None, "gains and sites both act at the sites of a block"
            chosen = [_Gain(gain) for gain in gains[step]]
        extra = {"sites": chosen, "taps": taps and taps(step)}
        args = (x.to(prepared.pipe.dtype), None, prepared.txt, None, prepared.times(step), *prepared.pooled)
        v = model(*args, prepared.guidance, rotary=placement.rotary, mask=placement.mask, **extra)
        return v.to(x.dtype)

    return velocity


class _Gain(Site):
    """Multiplies each pair of channels of the rotated queries by a factor `(H, d/2)`.

    That equals a factor of the queries' table. Done in the block, it needs no table of its own for each block.
    """

    def __init__(self, gain: Tensor):
        self.gain = gain

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name != "queries":
            return x
        return x * self.gain[:, None].repeat_interleave(2, -1).to(x.dtype)


# ---- scores: functions of a batch and its velocity that return one number per sample

Make = Callable[..., Step]
"""Returns the velocity, in which `taps=` observe attention as those of `stepping` do."""

Score = Callable[[Prepared, Make], Tensor]
"""Returns a number per sample, `(B,)`."""


def _again(prepared: Prepared, velocity: Step, step: int, x: Tensor) -> Tensor:
    """Return the velocity of a step, whose activations are computed again for gradients unless they are kept."""
    if prepared.keep or not torch.is_grad_enabled():
        return velocity(step, x)
    return checkpoint(velocity, step, x, use_reentrant=False)


def sampled(prepared: Prepared, velocity: Step) -> Tensor:
    """Return the latents of the images. Each step keeps its latents only; the rest is computed again for gradients."""
    x = prepared.noise
    for step, (t, t_next) in enumerate(zip(prepared.sigmas, prepared.sigmas[1:], strict=False)):
        v = _again(prepared, velocity, step, x)
        x = x + (t_next - t) * v
    return x


def likeness(target: Tensor) -> Score:
    """Return the score -‖x - target‖², the mean over latents `(B, N, C)` of the sampled image."""

    def score(prepared: Prepared, make: Make) -> Tensor:
        return -(sampled(prepared, make()) - target).square().mean((1, 2))

    return score


def denoising(pictures: Tensor) -> Score:
    """Return minus the denoising loss on pictures, packed latents `(B, N, C)`, with the noise of the batch.

    It is ‖v(x_t, t) - (noise - x₀)‖² at x_t = (1 - t)·x₀ + t·noise, the mean over channels, tokens and the run's times.
    """

    def score(prepared: Prepared, make: Make) -> Tensor:
        velocity, total = make(), torch.zeros_like(prepared.noise[:, 0, 0])
        for step, t in enumerate(prepared.sigmas[:-1]):
            x = (1 - t) * pictures + t * prepared.noise
            error = _again(prepared, velocity, step, x) - (prepared.noise - pictures)
            total = total - error.square().mean((1, 2))
        return total / (len(prepared.sigmas) - 1)

    return score


def sharpness() -> Score:
    """Return the mean gradient magnitude of the luma of the decoded image, as the metric `sharpness` computes it."""

    def score(prepared: Prepared, make: Make) -> Tensor:
        rows, cols = prepared.context.layout.grid
        decoder, family = prepared.pipe.autoencoder, prepared.pipe.family
        z = family.unpack(sampled(prepared, make()), rows, cols).to(decoder.decoder.conv_in.weight.dtype)
        images = decoder.decode(z, stripe=None)
        images = (images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)
        weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=images.dtype, device=images.device)
        luma = torch.einsum("bchw,c->bhw", images, weights)
        down, right = (F.pad(luma.diff(dim=dim), pad) for dim, pad in ((1, (0, 0, 0, 1)), (2, (0, 1))))
        return (down.square() + right.square() + 1e-12).sqrt().mean((1, 2))

    return score


def attention(word: Any, box: Any) -> Score:
    """Return the share in a box of a word's attention to the image: the mean over steps, blocks and heads.

    word: a selection of text tokens, such as {words: [cat]}. box: a selection of image tokens.
    """
    word, box = parse_tokens(word, "score.word"), parse_tokens(box, "score.box")

    def score(prepared: Prepared, make: Make) -> Tensor:
        context, shares = prepared.context, []
        rows = [resolve_tokens(word, context, b, "score.word") for b in range(len(prepared.noise))]
        columns, (start, stop) = resolve_tokens(box, context, 0, "score.box"), context.layout.range(IMAGE)

        def tap(attended: Attended) -> None:
            if attended.queries is not None:
                raise UserError("score: attention is split into groups of queries (seen_by), which is not supported")
            of_samples = []
            for b, queries in enumerate(rows):
                logits = attended.q[b][:, queries] @ attended.k[b].mT / attended.q.shape[-1] ** 0.5
                if attended.factors:
                    own = [f._replace(factor=f.factor[queries]) for f in attended.factors[b]]
                    logits = score_factors(logits, own, slice(None))
                if attended.mask is not None:
                    mask = attended.mask[b if len(attended.mask) > 1 else 0]
                    logits = logits + (mask if mask.shape[1] == 1 else mask[:, queries])
                p = logits.softmax(-1)
                of_samples.append((p[..., columns].sum(-1) / p[..., start:stop].sum(-1)).mean())
            shares.append(torch.stack(of_samples))

        x, velocity = prepared.noise, make(taps=lambda step: [tap] * context.blocks)
        for step, (t, t_next) in enumerate(zip(prepared.sigmas, prepared.sigmas[1:], strict=False)):
            x = x + (t_next - t) * velocity(step, x)
        return torch.stack(shares).mean(0)

    return score
