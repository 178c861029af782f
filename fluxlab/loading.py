"""A pipeline from a name under `configs/model`, a folder, a file or a hub id."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from fluxlab import checkpoints, sampling
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.checkpoints.stored import ENCODERS, Stored, local, on_meta
from fluxlab.config import ModelRow, find_row
from fluxlab.errors import UserError
from fluxlab.model import AutoEncoder, Flux
from fluxlab.model.text import TextEncoders
from fluxlab.pipeline import Pipeline

if TYPE_CHECKING:
    from os import PathLike


def load_pipeline(
    name: "str | PathLike[str]",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    autoencoder: "str | PathLike[str] | None" = None,
    text: "str | PathLike[str] | None" = None,
    variant: str | None = None,
) -> Pipeline:
    """Load a model: a name under `configs/model`, a Diffusers folder, a BFL single file, or a hub id.

    `dtype` None keeps each part as it is stored. A BFL file holds the transformer only: `autoencoder` names its
    `ae.safetensors` (or a folder) and `text` a Diffusers folder or hub id with both text encoders. `variant` chooses
    files such as `….fp16.safetensors`. Raises `UserError` for what is missing, damaged or does not fit the device.
    """
    row = find_row(name)
    given = {"autoencoder": autoencoder, "text": text, "variant": variant}
    return load_row(
        replace(row, **{key: str(value) for key, value in given.items() if value is not None}), dtype, device
    )


def load_row(row: ModelRow, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Pipeline:
    """As `load_pipeline`, for a row of `configs/model` or one made from the command line."""
    device = checkpoints.check_device(device)
    found = checkpoints.find(row.path, variant=row.variant)
    verify_manifest(found.path)
    if found.kind == "autoencoder":
        raise UserError(f"{row.path}: an autoencoder; pass the transformer's file, and this one as autoencoder=")
    lacks = {"pipeline": (), "originals": ("text",), "transformer": ("autoencoder", "text")}[found.kind]
    for part in lacks:
        if getattr(row, part) is None:
            what = {"autoencoder": "ae.safetensors or a folder", "text": "a Diffusers folder or hub id of FLUX.1"}[part]
            raise UserError(f"{row.path}: holds no {part}; pass {part}=, {what}")
    common = {"dtype": dtype, "device": device, "variant": row.variant}
    transformer = checkpoints.load_transformer(found.path, **common)
    autoencoder = checkpoints.load_autoencoder(row.autoencoder or found.path, **common)
    text = TextEncoders(*checkpoints.load_text_encoders(row.text or found.path, **common))
    for module in (transformer, autoencoder, text.clip, text.t5):
        module.eval().requires_grad_(False)
    return assemble(row, found, transformer, autoencoder, text)


def assemble(
    row: ModelRow, found: checkpoints.Found | None, transformer: Flux, autoencoder: AutoEncoder, text: TextEncoders
) -> Pipeline:
    """The pipeline of these parts, with the settings that the row and the folder leave open.

    found: what lies at the row's path; None for a model that is not here yet.
    """
    distilled = transformer.params.guidance_embed
    if found is not None and found.kind == "pipeline":
        schedule = sampling.read_schedule(found.path / "scheduler")
    else:  # the original release shifts for every model but schnell
        schedule = replace(sampling.FLUX_SCHEDULE, use_dynamic_shifting=distilled, shift=1.0)
    side = 128 * autoencoder.params.factor  # 64 tokens, as FLUX.1 and Diffusers have it
    # a folder does not say how many steps or how much guidance it wants: FLUX.1 dev's and schnell's, as it is distilled
    return Pipeline(
        transformer,
        autoencoder,
        text,
        schedule,
        steps=row.steps or (28 if distilled else 4),
        guidance=(3.5 if row.guidance is None else row.guidance) if distilled else None,
        max_sequence_length=row.max_sequence_length or 512,
        size=row.size or (side, side),
        name=row.name,
    )


def hollow(row: ModelRow, parts: dict[str, Stored], dtype: torch.dtype | None, device: torch.device) -> Pipeline:
    """The pipeline that `load_row` makes, but without weights: enough to settle sizes, and to check prompts, programs.

    parts: of `checkpoints.stored`. Only the transformer's first layer lies on `device`: a pipeline knows its device and
    dtype by it. The tokenizers are None for a model that is not here yet.
    """
    transformer, autoencoder = (
        on_meta(parts[name].params).to(dtype or parts[name].dtype) for name in ("transformer", "autoencoder")
    )
    transformer.img_in.to_empty(device=device)
    p, like = transformer.params, transformer.img_in.weight
    clip = _Silent(p.vec_in_dim, dtype or parts["clip"].dtype, like)
    t5 = _Silent(p.context_in_dim, dtype or parts["t5"].dtype, like)
    found, tokenizers = None, dict.fromkeys(ENCODERS)
    if parts["t5"].files:
        from transformers import AutoTokenizer

        found = checkpoints.find(local(row.path, "transformer", row.variant))
        root = parts["t5"].files[0].parents[1]
        tokenizers = {
            name: AutoTokenizer.from_pretrained(root / folder, local_files_only=True)
            for name, (_, folder) in ENCODERS.items()
        }
    return assemble(row, found, transformer, autoencoder, TextEncoders(tokenizers["clip"], clip, tokenizers["t5"], t5))


class _Silent(nn.Module):
    """In a text encoder's place: states of the right shape, always 0."""

    def __init__(self, width: int, dtype: torch.dtype, like: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype))
        self.zeros = like.new_zeros(width)
        self.device = like.device

    def forward(self, ids: torch.Tensor) -> "_States":
        return _States((self.zeros.expand(*ids.shape, -1),))


class _States(tuple):
    @property
    def pooler_output(self) -> torch.Tensor:
        return self[0][:, 0]
