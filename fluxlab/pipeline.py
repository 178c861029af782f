"""The pipeline: prompts and seeds to images, and images back to noise."""

import math
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab import batching, picking, placement, positions, sampling
from fluxlab import references as refs
from fluxlab.batching import Programs
from fluxlab.errors import UserError
from fluxlab.memory import Plan
from fluxlab.model.compiling import compile_blocks
from fluxlab.parts import ModelParts
from fluxlab.pixels import Images
from fluxlab.positions import Program
from fluxlab.probes import Probe
from fluxlab.progress import Progress
from fluxlab.resampling import at_own_size, check_resampled, is_resampled, resampled
from fluxlab.sampling import FiniteCheck, Sampling

if TYPE_CHECKING:
    from PIL import Image

OUTPUTS = ("pil", "latent", "pt")

Edits = tuple[batching.OnDevice, positions.Interventions | None]
"""Compiled programs of a batch: tables and masks, and edits of activations."""


@dataclass
class Pipeline(ModelParts):
    """Sample images from prompts and seeds, and invert images to noise. The fields are those of `ModelParts`."""

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] = 0,
        programs: Programs = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        *,
        references: Any = None,
        lora: Any = None,
        latents: Tensor | None = None,
        output: str = "pil",
        max_sequence_length: int | None = None,
        truncate: bool = False,
        unknown_words: str = "warn",
        timestep_rounding: str | None = None,
        on_step: sampling.OnStep | None = None,
        probe: Probe | None = None,
        progress: bool = False,
        compile: bool = False,
    ) -> "list[Image.Image] | Tensor":
        """Return one image for each (prompt, seed, program), sampled as one batch.

        A list of length one, or a single value, serves the whole batch. None means the model's own value.

        programs: edits of position ids and attention (`fluxlab.positions`). A program that names words finds them in
            the prompt of its sample, and leaves the negative prompt alone.
        height, width: in pixels.
        references: a list of images per sample, of any number and size; one list serves all (`fluxlab.references`).
        lora: LoRAs that are merged for this call only, as in `load_pipeline`. The weights are the same afterwards.
        latents: packed noise `(B, N, C)` in place of the seeds.
        true_cfg: above 1, guide away from `negative_prompts` ("" by default) with a second forward per step.
        output: "pil" for PIL images, "pt" for a tensor `(B, 3, H, W)` in 0 … 1, "latent" for packed latents
            `(B, N, C)` in fp32.
        truncate: cut prompts of more than `max_sequence_length` T5 tokens. By default they are an error.
        unknown_words: "warn", "error" or "allow" for words that a text encoder does not know. It reads a placeholder
            for each, so that prompts that differ in these words alone give equal images. A run refuses them.
        timestep_rounding: "bfl" or "diffusers" feeds the model the timesteps of a bf16 run of that implementation.
        on_step: called as `on_step(i, t, x)` with the latents after each step.
        probe: observes attention (`fluxlab.probes`). The results are in `probe.arrays` afterwards.
        progress: show the step on the terminal.
        compile: run compiled blocks (`fluxlab.model.compiling`), which are compiled in the first steps.

        Raises `UserError` for arguments that do not fit together or do not fit the model, and `NonFiniteError` if a
        sample becomes NaN or infinite: no image is made of it. The error holds the images of the other samples.
        """
        settings = Sampling(
            steps=steps,
            height=height,
            width=width,
            guidance=guidance,
            true_cfg=true_cfg,
            max_sequence_length=max_sequence_length,
            timestep_rounding=timestep_rounding,
            truncate=truncate,
            unknown_words=unknown_words,
            compile=compile,
        )
        with self.with_loras(lora):
            return self.sample(
                prompts,
                seeds,
                programs,
                settings,
                negative_prompts=negative_prompts,
                references=references,
                latents=latents,
                output=output,
                on_step=on_step,
                probe=probe,
                progress=progress,
            )

    @torch.inference_mode()
    def sample(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        programs: Programs,
        settings: Sampling,
        *,
        negative_prompts: str | Sequence[str] | None = None,
        references: Any = None,
        latents: Tensor | None = None,
        output: str = "pil",
        on_step: sampling.OnStep | None = None,
        probe: Probe | None = None,
        progress: bool = False,
        share: bool = True,
        at_once: int | None = None,
    ) -> "list[Image.Image] | Tensor":
        """Return the images of `generate`, with its settings as one object.

        negative_prompts: one per sample, in place of `settings.negative_prompt`. share: compute samples of one prompt
        and seed once as long as their programs act alike. With an `on_step`, which may change a sample, nothing is
        shared. at_once: the number of samples in one forward, and in one call of the decoder; None means all.
        """
        if output not in OUTPUTS:
            raise UserError(f"output={output!r}: expected {', '.join(OUTPUTS)}")
        if probe is not None and not isinstance(probe, Probe):
            raise UserError(f"probe={probe!r}: expected a fluxlab.probes.Probe, for instance Probe('words')")
        settings = self.resolve(settings)
        batch = batching.zipped(
            prompts=prompts,
            seeds=seeds,
            negative_prompts=settings.negative_prompt if negative_prompts is None else negative_prompts,
            latents=latents,
            programs=batching.read_programs(programs),
            references=refs.read(references),
        )
        if is_resampled(batch["programs"]):
            check_resampled(output, latents=latents, probe=probe, on_step=on_step)

            def part(chosen: Sequence[int], programs: Sequence[Program], settings: Sampling) -> "list[Image.Image]":
                keys = ("prompts", "seeds", "negative_prompts", "references")
                texts, seeds, negatives, images = (refs.pick(batch[key], chosen) for key in keys)
                more = {"negative_prompts": negatives, "references": images, "progress": progress}
                more |= {"share": share, "at_once": at_once}
                return self.sample(texts, seeds, programs, settings, **more)

            return resampled(batch["programs"], settings, part)
        compile_blocks(self.transformer, settings.compile)
        rows, cols = self.grid(settings.height, settings.width)
        extra = batch["references"] and refs.encoded(batch["references"], self.grid, self.encode)
        sigmas = self.schedule.times(settings.steps, rows * cols)
        shape = len(batch["prompts"]), 4 * self.autoencoder.params.z_channels
        x = batching.start(batch["seeds"], latents, *shape, (rows, cols), self.dtype, self.family).to(self.device)
        most = None if any(map(positions.has_interventions, batch["programs"] or ())) else at_once
        self.prepare(settings, batch["prompts"], probe, references=refs.most_tokens(extra), at_once=most)
        velocity = self._velocity(
            batch["prompts"],
            batch["negative_prompts"],
            batch["programs"],
            settings,
            (rows, cols),
            sigmas,
            probe,
            extra,
            batching.starts(batch) if share and latents is None and on_step is None else None,
            at_once,
        )
        names = sampling.sample_names(batch["prompts"], batch["seeds"] if latents is None else None)
        finite = FiniteCheck(
            names, settings.steps, self.dtype, lambda i: self._text_fault(batch["prompts"][i], settings)
        )
        with Progress("sampling", settings.steps) if progress else nullcontext() as bar:
            x = sampling.euler(velocity, x, sigmas, finite.watch(on_step, bar))
        if self.streaming is not None and output != "latent":
            self.streaming.before_decoding()
        images = x if output == "latent" else self._decode(x, rows, cols, output, finite, at_once)
        finite.finish(images)
        return images

    @torch.inference_mode()
    def check(
        self,
        prompts: Sequence[str],
        programs: Sequence[Program] | None,
        settings: Sampling,
        probe: Probe | None = None,
        references: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """Raise the `UserError` that `sample` would raise for a batch of (prompt, program) pairs, without sampling.

        references: the sizes (height, width) in pixels of each sample's reference images.
        """
        settings = self.resolve(settings)
        if is_resampled(programs):
            settings, programs = at_own_size(settings, programs)
        negatives = None if settings.negative_prompt is None else [settings.negative_prompt] * len(prompts)
        rows, cols = self.grid(settings.height, settings.width)
        sigmas = self.schedule.times(settings.steps, rows * cols)
        extra = references and refs.sized(references, self.grid)
        self._velocity(prompts, negatives, programs, settings, (rows, cols), sigmas, probe, extra)

    @torch.inference_mode()
    def invert(
        self,
        images: Images,
        prompts: str | Sequence[str],
        steps: int | None = None,
        guidance: float | None = None,
        *,
        programs: Programs = None,
        references: Any = None,
        iterations: int = 3,
        max_sequence_length: int | None = None,
        truncate: bool = False,
        unknown_words: str = "warn",
        value_range: tuple[float, float] = (0, 1),
        on_step: sampling.OnStep | None = None,
    ) -> Tensor:
        """Return packed noise `(B, N, C)`, fp32, of which `generate(prompts, latents=noise)` makes the images again,
        given the same programs and references.

        images, value_range: as in `encode`. iterations: as in `sampling.invert`. The other arguments: as in
        `generate`. Raises `NonFiniteError` if the latents become NaN or infinite.
        """
        x, rows, cols = self.encode(images, value_range)
        settings = self.resolve(
            Sampling(
                steps=steps,
                guidance=guidance,
                max_sequence_length=max_sequence_length,
                truncate=truncate,
                unknown_words=unknown_words,
            )
        )
        batch = batching.zipped(
            prompts=prompts, latents=x, programs=batching.read_programs(programs), references=refs.read(references)
        )
        prompts = batch["prompts"]
        extra = batch["references"] and refs.encoded(batch["references"], self.grid, self.encode)
        sigmas = self.schedule.times(settings.steps, rows * cols)
        side = self.pixels_per_token
        sized = replace(settings, height=rows * side, width=cols * side)
        self.prepare(sized, prompts, references=refs.most_tokens(extra))
        velocity = self._velocity(prompts, None, batch["programs"], settings, (rows, cols), sigmas, None, extra)
        finite = FiniteCheck(
            sampling.sample_names(prompts), settings.steps, self.dtype, lambda i: self._text_fault(prompts[i], settings)
        )
        noise = sampling.invert(velocity, x.expand(len(prompts), -1, -1), sigmas, iterations, finite.watch(on_step))
        finite.finish(noise)
        return noise

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
        groups = refs.layouts(references)
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
        grid, behind = refs.joined(grid, references)
        batch, length, rounding = len(prompts), settings.max_sequence_length, settings.timestep_rounding
        batching.check_negatives(settings.true_cfg, negative_prompts)
        self.text.check([*prompts, *(negative_prompts or ())], length, settings.truncate, settings.unknown_words)
        guidance = placement.guidance_of(self, batch, settings)

        def edits(texts: Sequence[str | None]) -> picking.Steady | picking.Picking:
            def make(programs: Sequence[Program] | None) -> Edits:
                return tuple(
                    part(programs, texts, length, grid, sigmas) for part in (self._compile, self._interventions)
                )

            return picking.edits_of(programs, batch, lambda: self.context(None, length, grid, sigmas), make)

        positive = edits(prompts)
        if probe is not None:
            probe.begin(self.context(prompts, length, grid, sigmas), batch)
            batching.check_captured(probe, programs)
        steps = [sampling.own_rows(batch)] * (len(sigmas) - 1)
        injects = any(map(positions.has_interventions, programs or ()))
        if starts is not None and not injects:
            acting = {program: positions.actions(program, sigmas) for program in programs or [Program()]}
            steps = sampling.shared_rows(starts, [acting[program] for program in programs or [Program()] * batch])
        most = None if injects else at_once
        together = [[samples for samples, _ in rows.parts(most)] for rows in steps]

        def conditioned(
            texts: Sequence[str], edits: picking.Steady | picking.Picking, probe: Probe | None = None
        ) -> sampling.Velocity:
            encoded = [self.encode_prompt(text, length, truncate=True, unknown_words="allow") for text in texts]
            txt, *pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))
            known = placement.modulations(self, texts, settings, sigmas, together)

            def forward(
                x: Tensor, t: float, edits: Edits, samples: Sequence[int], probe: Probe | None, taps: Sequence | None
            ) -> Tensor:
                compiled, interventions = edits
                times = sampling.round_timesteps(placement.filled(len(samples), t, self.device), rounding)
                rotary, mask = compiled.at(t, samples, x)
                step, p = compiled.step(t), self.transformer.params
                sites = batching.block_sites(interventions, probe, step, t, rotary, p.depth + p.depth_single_blocks)
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
            return conditioned(prompts, positive, probe)
        negatives = [""] * batch if negative_prompts is None else negative_prompts
        # edits of words do not apply to negative prompts
        named = any(program.names_words for program in programs or ())
        negative = edits([None] * batch) if named else positive
        return sampling.with_negative(
            conditioned(prompts, positive, probe), conditioned(negatives, negative), settings.true_cfg
        )

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
        settings = self.resolve(settings)
        length, grid = settings.max_sequence_length, self.grid(settings.height, settings.width)
        context = self.context(prompts, length, grid, self.schedule.times(settings.steps, math.prod(grid)))
        probes = placement.probe_bytes(probe, context, len(prompts), self.device)
        work = placement.workload(settings, len(prompts), batches, probes, references, at_once)
        plan = self.streaming.prepare(work)
        if plan.decoder == "host":
            self.autoencoder.to("cpu")
        return plan

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
