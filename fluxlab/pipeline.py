"""The pipeline: prompts and seeds to images, and images back to noise."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab import batching, editing, positions, sampling
from fluxlab import references as refs
from fluxlab.batching import Programs
from fluxlab.errors import UserError
from fluxlab.model.compiling import compile_blocks
from fluxlab.model.packing import packed_weights
from fluxlab.pixels import Images
from fluxlab.positions import Program
from fluxlab.probes import Probe
from fluxlab.progress import Progress
from fluxlab.resampling import at_own_size, check_resampled, is_resampled, resampled
from fluxlab.sampling import FiniteCheck, Sampling
from fluxlab.velocity import Velocities

if TYPE_CHECKING:
    from PIL import Image

OUTPUTS = ("pil", "latent", "pt")


@dataclass
class Pipeline(Velocities):
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
        first: int = 0,
    ) -> "list[Image.Image] | Tensor":
        """Return the images of `generate`, with its settings as one object.

        negative_prompts: one per sample, in place of `settings.negative_prompt`. share: compute samples of one prompt
        and seed once as long as their programs act alike. With an `on_step`, which may change a sample, nothing is
        shared. at_once: the number of samples in one forward, and in one call of the decoder; None means all. first:
        the step to begin with, at whose noise level `latents` are.
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
        shape = len(batch["prompts"]), self.family.channels(self.autoencoder.params)
        x = batching.start(batch["seeds"], latents, *shape, (rows, cols), self.dtype, self.family).to(self.device)
        most = None if any(map(positions.has_interventions, batch["programs"] or ())) else at_once
        further = refs.most_tokens(
            extra, map(positions.region_prompts, batch["programs"] or ()), settings.max_sequence_length
        )
        self.prepare(settings, batch["prompts"], probe, references=further, at_once=most)
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
        progress_bar = Progress("sampling", settings.steps) if progress else nullcontext()
        with packed_weights(self.transformer, self.streaming is None), progress_bar as bar:
            x = sampling.euler(velocity, x, sigmas, finite.watch(on_step, bar), first)
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
        true_cfg: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        *,
        programs: Programs = None,
        references: Any = None,
        iterations: int = 3,
        max_sequence_length: int | None = None,
        truncate: bool = False,
        unknown_words: str = "warn",
        value_range: tuple[float, float] = (0, 1),
        on_step: sampling.OnStep | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Tensor:
        """Return packed noise `(B, N, C)`, fp32, of which `generate(prompts, latents=noise)` makes the images again,
        given the same guidance, programs and references.

        images, value_range: as in `encode`. iterations: as in `sampling.invert`. sigmas: a schedule in place of that of
        this size and number of steps. The other arguments: as in `generate`. Raises `NonFiniteError` if the latents
        become NaN or infinite.
        """
        x, rows, cols = self.encode(images, value_range)
        settings = self.resolve(
            Sampling(
                steps=steps,
                guidance=guidance,
                true_cfg=true_cfg,
                max_sequence_length=max_sequence_length,
                truncate=truncate,
                unknown_words=unknown_words,
            )
        )
        batch = batching.zipped(
            prompts=prompts,
            negative_prompts=negative_prompts,
            latents=x,
            programs=batching.read_programs(programs),
            references=refs.read(references),
        )
        prompts = batch["prompts"]
        extra = batch["references"] and refs.encoded(batch["references"], self.grid, self.encode)
        sigmas = self.schedule.times(settings.steps, rows * cols) if sigmas is None else sigmas
        side = self.pixels_per_token
        sized = replace(settings, height=rows * side, width=cols * side)
        further = refs.most_tokens(
            extra, map(positions.region_prompts, batch["programs"] or ()), settings.max_sequence_length
        )
        self.prepare(sized, prompts, references=further)
        velocity = self._velocity(
            prompts, batch["negative_prompts"], batch["programs"], settings, (rows, cols), sigmas, None, extra
        )
        finite = FiniteCheck(
            sampling.sample_names(prompts), settings.steps, self.dtype, lambda i: self._text_fault(prompts[i], settings)
        )
        with packed_weights(self.transformer, self.streaming is None):
            noise = sampling.invert(velocity, x.expand(len(prompts), -1, -1), sigmas, iterations, finite.watch(on_step))
        finite.finish(noise)
        return noise

    # functions of (pipe, image, …) in a package of their own
    inpaint = editing.inpaint
    upscale = editing.upscale
