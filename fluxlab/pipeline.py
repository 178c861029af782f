"""Text and image ends around the transformer: prompts and seeds in, images out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from fluxlab import batching, positions, sampling
from fluxlab.batching import Programs
from fluxlab.errors import UserError
from fluxlab.model import AutoEncoder, Flux
from fluxlab.model.text import TextEncoders
from fluxlab.positions import Program
from fluxlab.probes import Probe

if TYPE_CHECKING:
    from os import PathLike


@dataclass
class Pipeline:
    """A FLUX model with all its parts, and the settings it was made for.

    `size` is (height, width) in pixels; `guidance` is the distilled guidance strength, None for a model without.
    """

    transformer: Flux
    autoencoder: AutoEncoder
    text: TextEncoders
    schedule: sampling.Schedule
    steps: int
    guidance: float | None
    max_sequence_length: int
    size: tuple[int, int]
    name: str = ""
    _encoded: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype

    @property
    def pixels_per_token(self) -> int:
        return 2 * self.autoencoder.params.factor

    @torch.inference_mode()
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
        latents: Tensor | None = None,
        output: str = "pil",
        max_sequence_length: int | None = None,
        truncate: bool = False,
        timestep_rounding: str | None = None,
        on_step: sampling.OnStep | None = None,
        probe: Probe | None = None,
    ) -> "list[Image.Image] | Tensor":
        """One image for each (prompt, seed, program), in one batch; a list of length one serves all. None means the
        model's own.

        `programs` edit position ids and attention (`fluxlab.positions`); a program that names words finds them in its
        sample's prompt, and leaves a negative prompt's words alone.
        height and width in pixels; `latents` packed noise `(B, N, C)` in the seeds' place. `true_cfg` > 1 guides away
        from `negative_prompts` ("" unless given) with a second forward a step. `truncate` lets a prompt of more than
        `max_sequence_length` T5 tokens lose its end. `timestep_rounding` ("bfl", "diffusers") feeds the model the
        timesteps that a bf16 run of that implementation would. `on_step(i, t, x)` sees the latents after each step.
        A `probe` looks on at attention (`fluxlab.probes`), and has what it saw in `probe.arrays` afterwards.

        Returns PIL images, or with output="latent" the packed latents `(B, N, C)` in fp32, or with output="pt" images
        `(B, 3, H, W)` in 0 … 1. Raises `UserError` for whatever does not fit together.
        """
        if output not in ("pil", "latent", "pt"):
            raise UserError(f"output {output!r}: expected pil, latent or pt")
        if probe is not None and not isinstance(probe, Probe):
            raise UserError(f"probe={probe!r}: a fluxlab.probes.Probe is needed, for instance Probe('words')")
        rows, cols = self.grid(height, width)
        length = batching.check_length(self.max_sequence_length if max_sequence_length is None else max_sequence_length)
        batch = batching.zipped(
            prompts=prompts,
            seeds=seeds,
            negative_prompts=negative_prompts,
            latents=latents,
            programs=batching.read_programs(programs),
        )
        shape = len(batch["prompts"]), 4 * self.autoencoder.params.z_channels
        x = batching.start(batch["seeds"], latents, *shape, (rows, cols), self.dtype).to(self.device)
        sigmas = self.schedule.times(self.steps if steps is None else steps, rows * cols)
        velocity = self._velocity(
            batch["prompts"],
            batch["negative_prompts"],
            (rows, cols),
            sigmas,
            programs=batch["programs"],
            guidance=guidance,
            true_cfg=true_cfg,
            length=length,
            truncate=truncate,
            rounding=timestep_rounding,
            probe=probe,
        )
        x = sampling.euler(velocity, x, sigmas, on_step)
        return x if output == "latent" else self.decode(x, rows, cols, output)

    @torch.inference_mode()
    def check(
        self,
        prompts: Sequence[str],
        programs: Sequence[Program] | None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        negative_prompt: str | None = None,
        probe: Probe | None = None,
    ) -> None:
        """Raise the `UserError` that `generate` would for a batch of (prompt, program) pairs, before it is run."""
        rows, cols = self.grid(height, width)
        sigmas = self.schedule.times(self.steps if steps is None else steps, rows * cols)
        negatives = None if negative_prompt is None else [negative_prompt] * len(prompts)
        self._velocity(
            prompts,
            negatives,
            (rows, cols),
            sigmas,
            programs=programs,
            guidance=guidance,
            true_cfg=true_cfg,
            probe=probe,
        )

    @torch.inference_mode()
    def invert(
        self,
        images: "Image.Image | Sequence[Image.Image] | Tensor",
        prompts: str | Sequence[str],
        steps: int | None = None,
        guidance: float | None = None,
        *,
        programs: Programs = None,
        iterations: int = 3,
        truncate: bool = False,
        on_step: sampling.OnStep | None = None,
    ) -> Tensor:
        """Packed noise `(B, N, C)`, fp32, from which `generate(prompts, latents=noise)` returns to the images.

        `images` are PIL images or a tensor `(B, 3, H, W)` in 0 … 1; `iterations` as in `sampling.invert`, `programs` as
        in `generate`.
        """
        x, rows, cols = self.encode(images)
        batch = batching.zipped(prompts=prompts, latents=x, programs=batching.read_programs(programs))
        sigmas = self.schedule.times(self.steps if steps is None else steps, rows * cols)
        velocity = self._velocity(
            batch["prompts"],
            None,
            (rows, cols),
            sigmas,
            programs=batch["programs"],
            guidance=guidance,
            truncate=truncate,
        )
        return sampling.invert(velocity, x.expand(len(batch["prompts"]), -1, -1), sigmas, iterations, on_step)

    @torch.inference_mode()
    def encode(self, images: "Image.Image | Sequence[Image.Image] | Tensor") -> tuple[Tensor, int, int]:
        """Packed latents `(B, N, C)`, fp32, of images of one size, and their token grid (rows, cols)."""
        if not isinstance(images, Tensor):
            images = batching.as_tensor([images] if isinstance(images, Image.Image) else images)
        rows, cols = self.grid(*images.shape[-2:])
        weight = self.autoencoder.encoder.conv_in.weight
        z = self.autoencoder.encode(2 * images.to(weight.device, weight.dtype) - 1)
        return sampling.pack(z).float().to(self.device), rows, cols

    @torch.inference_mode()
    def decode(self, x: Tensor, rows: int, cols: int, output: str = "pil") -> "list[Image.Image] | Tensor":
        """Images of packed latents `(B, rows · cols, C)`: PIL, or a tensor `(B, 3, H, W)` in 0 … 1 for output="pt"."""
        weight = self.autoencoder.decoder.conv_in.weight
        z = sampling.unpack(x, rows, cols).to(weight.device, weight.dtype)
        images = (self.autoencoder.decode(z).float() / 2 + 0.5).clamp(0, 1)
        return images if output == "pt" else batching.to_pil(images)

    def encode_prompt(self, prompt: str, length: int | None = None, truncate: bool = False) -> tuple[Tensor, Tensor]:
        """`(txt, y)` of a prompt, `(1, L, C)` and `(1, V)`; encoded once and kept."""
        length = self.max_sequence_length if length is None else length
        if (prompt, length) not in self._encoded:
            txt, y = self.text.encode(prompt, length, truncate)
            self._encoded[prompt, length] = tuple(part.to(self.device, self.dtype) for part in (txt, y))
        return self._encoded[prompt, length]

    def save(self, folder: "str | PathLike[str]") -> None:
        """Write a Diffusers folder: fluxlab and Diffusers' `FluxPipeline.from_pretrained` both load it."""
        from fluxlab.checkpoints import save_pipeline

        save_pipeline(folder, self.transformer, self.autoencoder, self.text, self.schedule)

    def _velocity(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        grid: tuple[int, int],
        sigmas: Sequence[float],
        *,
        programs: Sequence[Program] | None = None,
        guidance: float | None = None,
        true_cfg: float | None = None,
        length: int | None = None,
        truncate: bool = False,
        rounding: str | None = None,
        probe: Probe | None = None,
    ) -> sampling.Velocity:
        """The velocity field of a batch: everything but x and t is settled here, once."""
        p = self.transformer.params
        batching.check_channels(self.name, p.in_channels, 4 * self.autoencoder.params.z_channels)
        batching.check_guidance(p.guidance_embed, guidance, true_cfg, negative_prompts)
        batch = len(prompts)
        strength = None
        if p.guidance_embed:
            strength = torch.full((batch,), float(self.guidance if guidance is None else guidance), device=self.device)
            strength = sampling.round_timesteps(strength, rounding and "bfl")

        length = self.max_sequence_length if length is None else length
        compiled = self._compile(programs, prompts, length, grid, sigmas)
        if probe is not None:
            probe.begin(self.context(prompts, length, grid, sigmas), batch)

        def conditioned(
            texts: Sequence[str], compiled: positions.Compiled, probe: Probe | None = None
        ) -> sampling.Velocity:
            encoded = [self.encode_prompt(text, length, truncate) for text in texts]
            txt, y = (torch.cat(parts) for parts in zip(*encoded, strict=True))

            def velocity(x: Tensor, t: float) -> Tensor:
                times = sampling.round_timesteps(torch.full((batch,), t, device=self.device), rounding)
                rotary, mask = compiled.at(t)
                taps = None if probe is None else probe.taps(compiled.step(t))
                x = x.to(self.dtype)
                return self.transformer(x, None, txt, None, times, y, strength, rotary=rotary, mask=mask, taps=taps)

            return velocity

        if true_cfg is None or true_cfg == 1:  # v⁻ + 1 · (v⁺ - v⁻) is v⁺
            return conditioned(prompts, compiled, probe)
        negatives = [""] * batch if negative_prompts is None else negative_prompts
        without = compiled  # a negative prompt's words are others: edits of words leave them alone
        if any(program.names_words for program in programs or ()):
            without = self._compile(programs, None, length, grid, sigmas)
        return sampling.with_negative(conditioned(prompts, compiled, probe), conditioned(negatives, without), true_cfg)

    def _compile(
        self,
        programs: Sequence[Program] | None,
        prompts: Sequence[str] | None,
        length: int,
        grid: tuple[int, int],
        sigmas: Sequence[float],
    ) -> positions.Compiled:
        """Rotary tables and masks of a batch of programs; `prompts` None for texts that have none of their words."""
        programs = programs or [Program()]
        named = None
        if any(program.names_words for program in programs):
            named = [None] if prompts is None else prompts
        return positions.compile_programs(programs, self.context(named, length, grid, sigmas))

    def context(
        self, prompts: Sequence[str | None] | None, length: int, grid: tuple[int, int], sigmas: Sequence[float]
    ) -> positions.Context:
        """What programs and probes are settled against: `length` text tokens, a token grid, one value more than steps.

        `prompts` None where nothing depends on words, a None among them for a text that has none of them.
        """
        layout = positions.Layout(length, grid, pixels_per_token=self.pixels_per_token)
        spelt = prompts and [None if prompt is None else self._prompt(prompt, length) for prompt in prompts]
        ids = torch.float64 if self.dtype == torch.float64 else torch.float32
        return batching.context(self.transformer.params, layout, sigmas, spelt, self.device, ids)

    def _prompt(self, prompt: str, length: int) -> positions.Prompt:
        """A prompt with the characters that each of its T5 tokens stands for."""
        spans = self.text.t5_tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True)
        return positions.Prompt(prompt, tuple(map(tuple, spans.offset_mapping)))

    def grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Token rows and columns of an image size; `UserError` with the nearest sizes for one that does not divide."""
        height, width = self.size[0] if height is None else height, self.size[1] if width is None else width
        return batching.token_grid(height, width, self.pixels_per_token)
