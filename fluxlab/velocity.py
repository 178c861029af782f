"""The velocity field of a batch: the model with programs, guidance, probes and references, as a function of x and t."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxlab import batching, picking, placement, positions, sampling
from fluxlab import references as refs
from fluxlab.concepts import Concepts
from fluxlab.memory import Plan, Workload
from fluxlab.parts import ModelParts
from fluxlab.positions import Program
from fluxlab.probes import Probe
from fluxlab.sampling import Sampling

Edits = tuple[batching.OnDevice, positions.Interventions | None]
"""Compiled programs of a batch: tables and masks, and edits of activations."""


@dataclass
class Velocities(ModelParts):
    """The part of a pipeline that turns prompts and programs into a velocity field, and places weights for it."""

    def _velocity(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        programs: Sequence[Program] | None,
        settings: Sampling,
        grid: tuple[int, int],
        sigmas: Sequence[float],
        probe: Probe | None = None,
        references: Sequence[refs.References] | None = None,
        starts: Sequence[Hashable] | None = None,
        at_once: int | None = None,
    ) -> sampling.Velocity:
        """Return the velocity field of a batch, a function of x and t. Everything else is computed here, once.

        starts: for each sample, its noise and what conditions it. Samples with equal ones share the steps before their
        programs part (`sampling.shared_rows`). at_once: the number of samples in one forward. With edits of activations
        all samples are in one forward, and nothing is shared.
        """
        of_programs = [positions.region_prompts(program) for program in programs or [Program()]]
        further = of_programs * len(prompts) if len(of_programs) == 1 else of_programs  # one may stand for all samples
        groups = refs.layouts(references, further)
        if len(groups) > 1:
            refs.check_uniform(probe, any(map(positions.sources_of, programs or ())))
            columns = (prompts, negative_prompts, programs)
            return refs.split(
                groups,
                lambda group: self._velocity(
                    *(refs.pick(c, group) for c in columns),
                    settings,
                    grid,
                    sigmas,
                    None,
                    refs.pick(references, group),
                    refs.pick(starts, group),
                    at_once,
                ),
            )
        own_grid, behind = refs.joined(grid, references)
        batch, length, rounding = len(prompts), settings.max_sequence_length, settings.timestep_rounding
        with_regions = own_grid._replace(further=len(further[0]) * length)
        batching.check_negatives(settings.true_cfg, negative_prompts)
        every_text = [*prompts, *sum(further, ()), *(negative_prompts or ())]
        self.text.check(every_text, length, settings.truncate, settings.unknown_words)
        guidance = placement.guidance_of(self, batch, settings)

        def edits(
            texts: Sequence[str | None], programs: Sequence[Program] | None, grid: refs.Grids
        ) -> picking.Steady | picking.Picking:
            def make(programs: Sequence[Program] | None) -> Edits:
                return tuple(
                    part(programs, texts, length, grid, sigmas) for part in (self._compile, self._interventions)
                )

            return picking.edits_of(programs, batch, lambda: self.context(None, length, grid, sigmas), make)

        positive = edits(prompts, programs, with_regions)
        if probe is not None:
            probe.begin(self.context(prompts, length, with_regions, sigmas), batch)
            batching.check_captured(probe, programs)
        steps = [sampling.own_rows(batch)] * (len(sigmas) - 1)
        injects = any(map(positions.has_interventions, programs or ()))
        if starts is not None and not injects:
            acting = {program: positions.actions(program, sigmas) for program in programs or [Program()]}
            steps = sampling.shared_rows(starts, [acting[program] for program in programs or [Program()] * batch])
        most = None if injects else at_once
        together = [[samples for samples, _ in rows.parts(most)] for rows in steps]

        def conditioned(
            texts: Sequence[str],
            further: Sequence[Sequence[str]],
            edits: picking.Steady | picking.Picking,
            probe: Probe | None = None,
        ) -> sampling.Velocity:
            txt, *pooled = self.text_tokens(texts, further, length)
            known = placement.modulations(self, texts, settings, sigmas, together)
            layout = self.context(None, length, with_regions, sigmas).layout
            words = Concepts(self, probe, settings, sigmas, layout) if probe is not None and probe.concepts else None

            def forward(
                x: Tensor, t: float, edits: Edits, samples: Sequence[int], probe: Probe | None, taps: Sequence | None
            ) -> Tensor:
                compiled, interventions = edits
                times = sampling.round_timesteps(placement.filled(len(samples), t, self.device), rounding)
                rotary, mask = compiled.at(t, samples, x)
                step, p = compiled.step(t), self.transformer.params
                sites = batching.block_sites(interventions, probe, step, t, rotary, p.depth + p.depth_single_blocks)
                if words is not None and words.probe is probe:
                    sites = words.sites(sites, step, t, rotary)
                tables = {"rotary": rotary, "mask": mask, "taps": taps, "sites": sites}
                if known is not None:
                    tables["modulations"] = known.at((t, tuple(samples)))
                img, texts, strength = (
                    batching.rows(part, samples) for part in (refs.behind(x.to(self.dtype), behind), txt, guidance)
                )
                vectors = (batching.rows(part, samples) for part in pooled)
                v = self.transformer(img, None, texts, None, times, *vectors, strength, **tables)
                return (v if interventions is None else interventions.velocity(step, t, v))[:, : x.shape[1]]

            def measure(x: Tensor, t: float, edits: Edits, samples: Sequence[int], probe: Probe) -> None:
                forward(x, t, edits, samples, probe, probe.taps(edits[0].step(t)))

            def velocity(x: Tensor, t: float) -> Tensor:
                step = max((i for i in range(len(sigmas) - 1) if sigmas[i] >= t), default=0)
                shares = list(steps[step].parts(most))
                now = edits.at(x, t, step, [samples for samples, _ in shares], measure)
                taps = None if probe is None else probe.taps(step)
                parts = []
                for samples, of in shares:
                    if probe is not None:
                        probe.serve(of)
                    parts.append(forward(x, t, now, samples, probe, taps))
                return batching.rows(torch.cat(parts), steps[step].of)

            return velocity

        if settings.true_cfg in (None, 1):  # v⁻ + 1 · (v⁺ - v⁻) is v⁺
            return conditioned(prompts, further, positive, probe)
        negatives = [""] * batch if negative_prompts is None else negative_prompts
        negative = positive
        # edits of words and texts of regions do not apply to negative prompts
        if any(program.names_words for program in programs or ()) or further[0]:
            negative = edits([None] * batch, [positions.without_regions(p) for p in programs], own_grid)
        return sampling.with_negative(
            conditioned(prompts, further, positive, probe),
            conditioned(negatives, [()] * batch, negative),
            settings.true_cfg,
        )

    def text_tokens(self, texts: Sequence[str], further: Sequence[Sequence[str]], length: int) -> tuple[Tensor, ...]:
        """Return the text tokens of a batch, each sample's followed by those of its regions, and what is pooled."""

        def encode(text: str) -> tuple[Tensor, ...]:
            return self.encode_prompt(text, length, truncate=True, unknown_words="allow")

        tokens, *pooled = zip(*map(encode, texts), strict=True)
        rows = [torch.cat([own, *(encode(p)[0] for p in more)], 1) for own, more in zip(tokens, further, strict=True)]
        return torch.cat(rows), *map(torch.cat, pooled)

    def prepare(
        self,
        settings: Sampling,
        prompts: Sequence[str],
        probe: Probe | None = None,
        batches: int = 1,
        references: int = 0,
        at_once: int | None = None,
    ) -> Plan | None:
        """Place the weights for batches as large as this one. A smaller batch afterwards changes nothing.

        batches: how many will be sampled. references: tokens of reference images. at_once: as in `sample`. Returns the
        plan, None for a model that is on the device as a whole. Raises `UserError` if not even one block at a time
        fits.
        """
        if self.streaming is None:
            return None
        plan = self.streaming.prepare(self.workload(settings, prompts, probe, batches, references, at_once))
        if plan.decoder == "host":
            self.autoencoder.to("cpu")
        return plan

    def workload(
        self,
        settings: Sampling,
        prompts: Sequence[str],
        probe: Probe | None = None,
        batches: int = 1,
        references: int = 0,
        at_once: int | None = None,
    ) -> Workload:
        """Return what batches as large as this one ask of the device. Arguments as for `prepare`."""
        settings = self.resolve(settings)
        length, grid = settings.max_sequence_length, self.grid(settings.height, settings.width)
        context = self.context(prompts, length, grid, self.schedule.times(settings.steps, math.prod(grid)))
        probes = placement.probe_bytes(probe, context, len(prompts), self.device)
        return placement.workload(settings, len(prompts), batches, probes, references, at_once)

    def announce(self, batches: Sequence[Sequence[str]], settings: Sampling, at_once: int | None = None) -> None:
        """Note the prompts of batches that will be sampled: a streamed model computes their modulations together."""
        if self.streaming is not None:
            settings = self.resolve(settings)
            sigmas = self.schedule.times(settings.steps, math.prod(self.grid(settings.height, settings.width)))
            placement.announce(self, batches, settings, sigmas, at_once)

    def _interventions(
        self,
        programs: Sequence[Program] | None,
        prompts: Sequence[str | None],
        length: int,
        grid: tuple[int, int],
        sigmas: Sequence[float],
    ) -> positions.Interventions | None:
        """Return the edits of activations of a batch, whose tokens and sources depend on all of its prompts."""
        if not any(map(positions.has_interventions, programs or ())):
            return None
        named = prompts if any(program.names_words for program in programs) else None
        return positions.compile_interventions(programs, self.context(named, length, grid, sigmas), len(prompts))

    def _compile(
        self,
        programs: Sequence[Program] | None,
        prompts: Sequence[str] | None,
        length: int,
        grid: tuple[int, int],
        sigmas: Sequence[float],
    ) -> batching.OnDevice:
        """Compile the programs of a batch. `prompts` is None for texts that do not have the words of the programs."""
        programs = programs or [Program()]
        named = None
        if any(program.names_words for program in programs):
            named = [None] if prompts is None else prompts
        compiled = positions.compile_programs(programs, self.context(named, length, grid, sigmas))
        return batching.OnDevice(compiled, self.device, self.dtype)

    def context(
        self,
        prompts: Sequence[str | None] | None,
        length: int,
        grid: tuple[int, int] | refs.Grids,
        sigmas: Sequence[float],
    ) -> positions.Context:
        """Return the context in which programs and probes are resolved.

        prompts: None if nothing depends on words; None in the list for a text without the words that are named.
        length: number of text tokens. grid: token rows and columns, or `Grids` with reference images. sigmas: one value
        more than there are steps.
        """
        layout = positions.Layout(length, *refs.Grids.of(grid), pixels_per_token=self.pixels_per_token)
        spans = prompts and [None if prompt is None else self._prompt(prompt, length) for prompt in prompts]
        ids = torch.float64 if self.dtype == torch.float64 else torch.float32
        trained = self.grid(None, None), self.max_sequence_length
        return batching.context(self.transformer.params, layout, sigmas, spans, self.device, ids, *trained)

    def _prompt(self, prompt: str, length: int) -> positions.Prompt:
        """Return a prompt with the range of characters that each text token covers."""
        return positions.Prompt(prompt, self.text.spans(prompt, length))
