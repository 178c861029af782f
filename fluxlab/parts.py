"""The parts of a FLUX model: networks, text encoders, schedule and defaults. Prompts and images are encoded here."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fluxlab import batching, sampling
from fluxlab.config import read_loras
from fluxlab.errors import UserError
from fluxlab.families import Family, family_of
from fluxlab.memory.streaming import Streaming
from fluxlab.model import AutoEncoder
from fluxlab.model.protocols import Text, Transformer
from fluxlab.pixels import Images, image_tensor, to_pil
from fluxlab.sampling import FiniteCheck, Sampling

if TYPE_CHECKING:
    from os import PathLike

    from PIL import Image

KEPT = 64
"""Encoded prompts that stay on the device: 4 MB each for FLUX.1 at 512 tokens in bf16."""


@dataclass
class ModelParts:
    """A FLUX model with all its parts, and the settings it was trained for.

    `size` is (height, width) in pixels. `guidance` is the distilled guidance strength, None for a model without it.
    `distilled` says that it was distilled to few steps and takes no guidance, as FLUX.2 [klein]. `true_cfg` is
    the scale of classifier-free guidance of a model that needs it.
    """

    transformer: Transformer
    autoencoder: AutoEncoder
    text: Text
    schedule: sampling.Schedule
    steps: int
    guidance: float | None
    max_sequence_length: int
    size: tuple[int, int]
    name: str = ""
    distilled: bool = False
    true_cfg: float | None = None
    streaming: Streaming | None = None
    """What places the transformer's weights; None if all of them are on the device."""
    _encoded: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def family(self) -> Family:
        return family_of(self.transformer.params)

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype

    @property
    def pixels_per_token(self) -> int:
        return self.family.pixels_per_token(self.autoencoder.params)

    def to(self, device: str | torch.device) -> Self:
        """Move all parts to `device`, such as "cuda" or "mps", and return the pipeline itself.

        Raises `UserError` if the device does not exist here.
        """
        from fluxlab.checkpoints import check_device

        device = check_device(device)
        if self.streaming is not None and device == self.device:
            return self
        if self.streaming is not None:
            raise UserError(f"to({str(device)!r}): blocks are streamed to {self.device}; load the model with device=")
        for part in (self.transformer, self.autoencoder, self.text):
            part.to(device)
        self._encoded.clear()
        return self

    def save(self, folder: "str | PathLike[str]") -> None:
        """Write a Diffusers folder, which fluxlab and Diffusers' `FluxPipeline.from_pretrained` both load."""
        from fluxlab.checkpoints import save_pipeline

        if any(weight.is_meta for weight in self.transformer.parameters()):
            raise UserError(f"save: blocks are streamed to {self.device}; load the model with memory='resident'")
        save_pipeline(folder, self.transformer, self.autoencoder, self.text, self.schedule, self.distilled)

    def with_loras(self, lora: Any) -> AbstractContextManager[None]:
        """Return a context in which LoRAs, given as in `load_pipeline(lora=…)`, are merged into the transformer."""
        from fluxlab.checkpoints import merged

        loras = read_loras(lora)
        if loras and self.streaming is not None:
            raise UserError("lora: blocks are streamed; merge it when the model is loaded: load_pipeline(lora=…)")
        return merged(self.transformer, loras)

    @property
    def defaults(self) -> Sampling:
        """The settings that replace None."""
        return Sampling(
            steps=self.steps,
            height=self.size[0],
            width=self.size[1],
            guidance=self.guidance if self.transformer.params.guidance_embed else None,
            true_cfg=self.true_cfg,
            max_sequence_length=self.max_sequence_length,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
        )

    def resolve(self, settings: Sampling) -> Sampling:
        """Return `settings` with the model's own values in place of None.

        Raises `UserError` for a value that does not fit this model, and for another dtype or device than it is on.
        """
        settings.check()
        p, channels = self.transformer.params, self.family.channels(self.autoencoder.params)
        batching.check_channels(self.name, p.in_channels, channels)
        batching.check_guidance(p.guidance_embed, settings.guidance)
        defaults = self.defaults
        if settings.dtype not in (None, defaults.dtype):
            raise UserError(
                f"dtype={settings.dtype}: the model is loaded as {defaults.dtype}; load it again with dtype"
            )
        device = torch.device(settings.device or self.device)
        if device.type != self.device.type or device.index not in (None, self.device.index):
            raise UserError(f"device={settings.device}: the model is on {self.device}; move it with pipe.to(device)")
        if settings.enlarge is not None:
            step = self.pixels_per_token
            height, width = (max(1, round(settings.enlarge * n / step)) * step for n in self.size)
            settings = replace(settings, height=height, width=width, enlarge=None)
        return settings.filled(defaults)

    def grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the token rows and columns of an image size. None means the model's own.

        Raises `UserError` with the nearest sizes if the size is not a multiple of a token's.
        """
        height, width = self.size[0] if height is None else height, self.size[1] if width is None else width
        return batching.token_grid(height, width, self.pixels_per_token)

    @torch.inference_mode()
    def encode(self, images: Images, value_range: tuple[float, float] = (0, 1)) -> tuple[Tensor, int, int]:
        """Return the packed latents `(B, N, C)`, fp32, of images of one size, and their token grid (rows, cols).

        images: PIL images, uint8 `(H, W, 3)`, or floats in `value_range`, which is (0, 1) or (-1, 1); one, a batch or
        a list (`fluxlab.pixels.image_tensor`). Raises `UserError` for anything else.
        """
        tensor = image_tensor(images, value_range)
        rows, cols = self.grid(*tensor.shape[-2:])
        weight = self.autoencoder.encoder.conv_in.weight
        x = self.family.pack(self.autoencoder.encode(2 * tensor.to(weight.device, weight.dtype) - 1)).float()
        finite = FiniteCheck([f"image {i}" for i in range(len(x))], 0, weight.dtype)
        finite.encoded(x)
        finite.finish(None)
        return x.to(self.device), rows, cols

    @torch.inference_mode()
    def decode(self, x: Tensor, rows: int, cols: int, output: str = "pil") -> "list[Image.Image] | Tensor":
        """Return the images of packed latents `(B, rows · cols, C)`: PIL images, or with output="pt" a tensor
        `(B, 3, H, W)` in 0 … 1.

        Raises `NonFiniteError` if an image is not finite.
        """
        finite = FiniteCheck([f"image {i}" for i in range(len(x))], 0, self.dtype)
        images = self._decode(x, rows, cols, output, finite)
        finite.finish(images)
        return images

    def _decode(
        self, x: Tensor, rows: int, cols: int, output: str, finite: FiniteCheck, at_once: int | None = None
    ) -> "list[Image.Image] | Tensor":
        """Return the images, decoded `at_once` at a time. None means all."""
        weight = self.autoencoder.decoder.conv_in.weight
        z = self.family.unpack(x, rows, cols).to(weight.device, weight.dtype)
        images = torch.cat([self.autoencoder.decode(part).float() / 2 + 0.5 for part in z.split(at_once or len(z))])
        finite.images(images)
        images = images.clamp(0, 1)
        return (
            images if output == "pt" else to_pil(images.nan_to_num())
        )  # `finite` keeps images with NaN from the caller

    def encode_prompt(
        self, prompt: str, length: int | None = None, truncate: bool = False, unknown_words: str = "error"
    ) -> tuple[Tensor, ...]:
        """Return `(txt, y)` of a prompt, `(1, L, C)` and `(1, V)`, of FLUX.2 `(txt,)`. The last `KEPT` prompts are kept
        on the device.

        Raises `UserError` as `TextEncoders.check` does.
        """
        length = self.max_sequence_length if length is None else length
        self.text.check([prompt], length, truncate, unknown_words)
        if (prompt, length) not in self._encoded:
            encoded = self.text.encode(prompt, length, truncate=True, unknown_words="allow")
            while len(self._encoded) >= KEPT:
                self._encoded.pop(next(iter(self._encoded)))
            self._encoded[prompt, length] = tuple(part.to(self.device, self.dtype) for part in encoded)
        return self._encoded[prompt, length]

    def _text_fault(self, prompt: str, settings: Sampling) -> str | None:
        """Return what is wrong with the encoded prompt of a sample that became non-finite in the first step."""
        encoded = self.encode_prompt(prompt, settings.max_sequence_length, truncate=True, unknown_words="allow")
        for name, part in zip(self.text.titles, encoded, strict=True):
            if not part.isfinite().all():
                return f"{name} encodes its prompt to NaN or infinity"
        return None
