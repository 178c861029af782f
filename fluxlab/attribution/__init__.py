"""Which parts of rotary tables, and which activations, does a score depend on? First-order answers from one backward.

    found = fluxlab.attribution.of_gains(pipe, ["a red fox"], [0], fluxlab.gradients.denoising(pictures))
    found.sel(block=3).mean("step")                     # head × pair of channels, with its axis and wavelength

`of_gains` is the derivative of a score with respect to a gain of 1 at every (step, block, head, pair of channels) of
the rotary tables: the score changes by about minus the derivative if the pair no longer contributes. `of_patches` is
attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348): the effect, to first order, of taking an activation
from another cell, for every site, step, block and head at once.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import UserError
from fluxlab.gradients import Prepared, Score, checkpointed, compiled, frozen, prepare, stepping
from fluxlab.model.rope import frequencies
from fluxlab.model.sites import OF_HEADS, SITES, Site
from fluxlab.positions import Program, region_prompts
from fluxlab.probes import Captured
from fluxlab.sampling import Sampling
from fluxlab.select.arguments import EVERY_AXIS

if TYPE_CHECKING:
    from fluxlab.pipeline import Pipeline


def of_gains(
    pipe: "Pipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    score: Score,
    *,
    program: Program | Mapping[str, Any] | None = None,
    settings: Sampling | None = None,
) -> Captured:
    """Return the derivative of the mean score with respect to gains of the queries' rotary tables, at 1.

    Its axes are step, block, head and pair. A gain of g multiplies what a pair of channels adds to every score q·k of
    its head by g. Gradients are exact. Memory: the hidden states between the blocks of one step, the activations of
    one block, and the latents of each step. Raises UserError for what does not fit the model.
    """
    program = Program.from_config(program, "program")
    prepared = prepare(pipe, prompts, seeds, settings, regions=region_prompts(program))
    edits = compiled(prepared, program)
    gains = ones(prepared).requires_grad_()
    with torch.enable_grad(), checkpointed(pipe), frozen(pipe):
        (found,) = torch.autograd.grad(score(prepared, partial(stepping, prepared, edits, gains=gains)).mean(), gains)
    return labelled(found, prepared)


def with_gains(
    pipe: "Pipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    score: Score,
    gains: Sequence[Tensor],
    *,
    program: Program | Mapping[str, Any] | None = None,
    settings: Sampling | None = None,
) -> Tensor:
    """Return the scores `(len(gains), B)` under gains `(steps or 1, blocks, H, d/2)` of the queries' tables."""
    program = Program.from_config(program, "program")
    prepared = prepare(pipe, prompts, seeds, settings, regions=region_prompts(program))
    edits = compiled(prepared, program)
    whole = ones(prepared)
    with torch.no_grad():
        every = [score(prepared, partial(stepping, prepared, edits, gains=whole * gain.to(whole))) for gain in gains]
    return torch.stack(every)


def ones(prepared: Prepared) -> Tensor:
    """Return gains of 1, `(steps, blocks, H, d/2)`."""
    p, steps = prepared.pipe.transformer.params, prepared.context.steps
    shape = steps, prepared.context.blocks, p.num_heads, sum(p.axes_dim) // 2
    return torch.ones(shape, dtype=prepared.noise.dtype, device=prepared.noise.device)


def labels_of_pairs(dims: Sequence[int], theta: float) -> tuple[list[str], list[float]]:
    """Return the axis of each pair of channels, and its wavelength in tokens. dims: channels of each axis."""
    axis = [name for name, dim in zip(EVERY_AXIS[: len(dims)], dims, strict=True) for _ in range(dim // 2)]
    turns = torch.cat([frequencies(dim, theta) for dim in dims])
    return axis, (2 * torch.pi / turns).tolist()


def labelled(values: Tensor, prepared: Prepared) -> Captured:
    context = prepared.context
    axis, wavelength = labels_of_pairs(context.axes_dim, context.theta)
    coords = {
        **_coords(context.sigmas, context.double, context.blocks),
        "head": (("head",), list(range(context.heads))),
        "pair": (("pair",), list(range(len(axis)))),
        "axis": (("pair",), axis),
        "wavelength": (("pair",), wavelength),
    }
    about = {"unit": "score per gain"}
    return Captured(values.detach().cpu().numpy(), ("step", "block", "head", "pair"), coords, about)


def _coords(sigmas: Sequence[float], double: int, blocks: int) -> dict[str, Any]:
    return {
        "step": (("step",), list(range(len(sigmas) - 1))),
        "sigma": (("step",), [float(t) for t in sigmas[:-1]]),
        "block": (("block",), list(range(blocks))),
        "stream": (("block",), ["double" if n < double else "single" for n in range(blocks)]),
    }


class _Dial(Site):
    """Moves sample 1 from its own activations towards those of sample 0. dials: by site, `(H,)` or `()`."""

    def __init__(self, dials: Mapping[str, Tensor], tokens: Tensor | None):
        self.dials, self.tokens = dials, tokens

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.dials:
            return x
        share = self.dials[name].to(x.dtype)
        change = (x[0] - x[1]).detach() * (share[:, None, None] if name in OF_HEADS else share)
        if self.tokens is not None:
            kept = torch.zeros(x.shape[-2], dtype=x.dtype, device=x.device)
            kept[self.tokens] = 1
            change = change * kept[:, None]
        return torch.stack((x[0], x[1] + change))


def of_patches(
    pipe: "Pipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    score: Score,
    *,
    what: Sequence[str] = ("keys", "values", "attention", "mlp", "residual"),
    tokens: Tensor | None = None,
    programs: Sequence[Program | Mapping[str, Any] | None] = (None, None),
    settings: Sampling | None = None,
) -> dict[str, Captured]:
    """Return the first-order effect on the score of taking each activation of the first sample into the second.

    prompts, seeds, programs: of two samples, the source first. what: sites. tokens: their numbers in the sequence, by
    default all. The result has one array per site, with the axes step, block and, where the site has heads, head. It
    is the derivative of the second sample's score with respect to the strength of the `inject`, at 0.
    """
    if len(prompts) != 2 or len(seeds) != 2:
        raise UserError(f"{len(prompts)} prompts, {len(seeds)} seeds: expected two, the source and the target")
    for name in what:
        if name not in SITES:
            raise UserError(f"what: {name!r}, expected some of {', '.join(SITES)}")
    programs = [Program.from_config(program, "programs") for program in programs]
    prepared = prepare(pipe, prompts, seeds, settings, regions=region_prompts(programs[0]))
    context, edits = prepared.context, compiled(prepared, programs)
    like = {"dtype": prepared.noise.dtype, "device": prepared.noise.device}
    dials = {
        name: torch.zeros(
            (context.steps, context.blocks, *((context.heads,) if name in OF_HEADS else ())), **like
        ).requires_grad_()
        for name in what
    }

    def sites(step: int) -> list[Site]:
        return [_Dial({name: dial[step, n] for name, dial in dials.items()}, tokens) for n in range(context.blocks)]

    with torch.enable_grad(), checkpointed(pipe), frozen(pipe):
        target = score(prepared, partial(stepping, prepared, edits, sites=sites))[1]
        found = torch.autograd.grad(target, list(dials.values()))
    coords = _coords(context.sigmas, context.double, context.blocks)
    arrays = {}
    for name, values in zip(dials, found, strict=True):
        heads = {"head": (("head",), list(range(context.heads)))} if name in OF_HEADS else {}
        axes = ("step", "block", *heads)
        arrays[name] = Captured(values.cpu().numpy(), axes, {**coords, **heads}, {"unit": "score per strength"})
    return arrays
