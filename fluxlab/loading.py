"""Load a pipeline from a name under `configs/model`, a folder, files or a hub id."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fluxlab import checkpoints, schedules
from fluxlab.cache import open_cache
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import FLOAT8
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.checkpoints.memory import default_device
from fluxlab.checkpoints.networks import family_at
from fluxlab.checkpoints.stored import Stored, local, on_meta, part_paths, stored
from fluxlab.conditioning import Texts
from fluxlab.config import Lora, ModelRow, find_row, with_loras
from fluxlab.families import architecture_of, family_of
from fluxlab.memory import Memory, ModelSizes, Room, Workload, make_plan
from fluxlab.memory.costs import text_activation_bytes
from fluxlab.memory.load import load_ends
from fluxlab.memory.pages import let_go
from fluxlab.memory.sizes import open_row, sizes_of
from fluxlab.memory.streaming import Streaming, room_of
from fluxlab.model import AutoEncoder
from fluxlab.model.protocols import Text, Transformer
from fluxlab.pipeline import Pipeline

if TYPE_CHECKING:
    from os import PathLike

TEXT_LENGTH = 512
"""Text tokens of a model that does not say how many it was trained with: what FLUX.1 dev takes at most."""


def load_pipeline(
    name: "str | PathLike[str]",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    autoencoder: "str | PathLike[str] | None" = None,
    text: "str | PathLike[str] | None" = None,
    variant: str | None = None,
    tokenizers: "str | PathLike[str] | None" = None,
    like: str | None = None,
    schedule: Mapping[str, Any] | None = None,
    lora: "str | PathLike[str] | Lora | Mapping[str, Any] | Sequence[Any] | None" = None,
    cache: "str | PathLike[str] | None" = None,
    memory: Memory | Mapping[str, Any] | str | None = None,
) -> Pipeline:
    """Load a model: a name under `configs/model`, a Diffusers folder, a single file, a folder of single files, or a
    hub id.

    dtype: None means that of the row, else the dtype of most parameters, separately for each network. device: None
    means a GPU if there is one (CUDA, then mps), else the CPU. autoencoder, text, tokenizers: the parts that `name`
    does not hold, such as `ae.safetensors`, a folder with `clip_l.safetensors` and `t5xxl_fp16.safetensors`, and a
    folder with `tokenizer` and `tokenizer_2`. variant: for files such as `….fp16.safetensors`. like, schedule: how a
    single file samples, if it does not say (see `fluxlab.schedules`): "dev" or "schnell", {"shift": 3.0} or {"mu":
    1.15}. lora: what to merge into the transformer: a path, {"path": …, "scale": 0.8}, or a list of these
    (`fluxlab.checkpoints.merge_loras`).
    cache: a folder for encoded prompts, or "none" (see `fluxlab.cache`). The text encoders are loaded for a prompt that
    it does not have.
    memory: "auto", "resident", "streamed", or {"mode": "auto", "limit_gb": 12} (`fluxlab.memory.Memory`).

    Raises UserError for what is missing, damaged, of another model, or does not fit the device. docs/checkpoints.md
    lists what can be read.
    """
    row = find_row(name)
    paths = {"autoencoder": autoencoder, "text": text, "variant": variant, "tokenizers": tokenizers, "like": like}
    settings = {key: str(value) for key, value in paths.items() if value is not None}
    if schedule is not None:
        settings["schedule"] = schedule
    return load_row(with_loras(replace(row, **settings), lora), dtype, device, cache=cache, memory=memory)


def load_row(
    row: ModelRow,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    texts: Texts | None = None,
    *,
    cache: "str | PathLike[str] | None" = None,
    memory: Memory | Mapping[str, Any] | str | None = None,
) -> Pipeline:
    """Load a row of `configs/model`, or one made from the command line. Arguments as for `load_pipeline`.

    texts: are encoded first. The text encoders leave the device before the transformer is loaded.
    """
    dtype = dtype or checkpoints.dtype_of(None, row)
    device = checkpoints.check_device(default_device() if device is None else device)
    found = checkpoints.find(row.path, variant=row.variant)
    verify_manifest(found.path, of_text=False)
    paths = part_paths(row, found)
    family = family_at(found.path, row.variant)
    text = family.conditioning().open_text(paths["text"], dtype, device, row.variant, row.tokenizers, open_cache(cache))
    request, room = Memory.from_config(memory), room_of(device)
    parts = stored(row, open_cache(cache)) if request.mode != "resident" else None
    sizes = streamed_sizes(row, parts, dtype, device, request, room)
    if sizes:
        text.room = text_limit(sizes, request, room, texts)
        text.after_block = lambda module: let_go(module.parameters())
    if texts is not None:
        text.prepare(texts, row.max_sequence_length or TEXT_LENGTH)
    common = {"dtype": dtype, "device": device, "variant": row.variant}
    streaming = None
    if sizes:
        streaming = Streaming(load_ends(open_row(row, dtype, device), row.lora), sizes, request, room)
        transformer = streaming.residency.flux
    else:
        transformer = checkpoints.load_transformer(found.path, **common)
        checkpoints.merge_loras(transformer, row.lora)
    decision = schedules.decide(row, found, transformer.params)
    autoencoder = checkpoints.load_autoencoder(paths["autoencoder"], **common)
    for module in (transformer, autoencoder):
        module.eval().requires_grad_(False)
    pipe = assemble(row, decision, transformer, autoencoder, text)
    pipe.streaming = streaming
    return pipe


def streamed_sizes(
    row: ModelRow,
    parts: dict[str, Stored] | None,
    dtype: torch.dtype | None,
    device: torch.device,
    memory: Memory,
    room: Room,
) -> ModelSizes | None:
    """Return the sizes of a model whose transformer is to be streamed; None for one that is loaded as a whole.

    It is streamed if `memory` asks for it, if not all of it fits, and if its file is in float8. One image at the
    model's own settings decides, before any size is known. parts: of `checkpoints.stored`, if they are known.
    """
    if memory.mode == "resident":
        return None
    sizes = sizes_of(row, parts or stored(row), dtype, device)
    side = 64 * family_of(sizes.transformer).pixels_per_token(sizes.autoencoder)
    height, width = row.size or (side, side)
    work = Workload(1, height, width, row.max_sequence_length or TEXT_LENGTH, row.steps or 28)
    float8 = memory.mode == "auto" and sizes.stored in FLOAT8.values()
    return sizes if float8 or make_plan(sizes, work, memory, room).streams else None


def text_limit(sizes: ModelSizes, memory: Memory, room: Room, texts: Texts | None) -> int | None:
    """Return the bytes that text encoders may take, before the transformer is on the device; None for no limit."""
    free = room.free if memory.limit_bytes is None else memory.limit_bytes
    length = (texts and texts.max_sequence_length) or TEXT_LENGTH
    needed = text_activation_bytes(sizes.transformer, length, sizes.dtype.itemsize)
    return None if free is None else max(0, free - room.used - needed)


def assemble(
    row: ModelRow,
    decision: schedules.Decision,
    transformer: Transformer,
    autoencoder: AutoEncoder,
    text: Text,
) -> Pipeline:
    """Return the pipeline of these parts, with the settings that the row and the files leave open.

    Raises UserError if the networks do not fit together.
    """
    distilled, family = transformer.params.guidance_embed, family_of(transformer.params)
    if architecture_of(autoencoder.params) is not family.autoencoder:
        raise CheckpointError(
            f"{row.autoencoder or row.path}: {family_of(autoencoder.params).title}'s autoencoder, but the transformer "
            f"is {family.title}'s; pass the autoencoder of {family.title}"
        )
    family.conditioning().check_widths(row, transformer.params, text)
    side = 64 * family.pixels_per_token(autoencoder.params)
    return Pipeline(
        transformer,
        autoencoder,
        text,
        decision.schedule,
        steps=row.steps or decision.steps,
        guidance=(family.guidance if row.guidance is None else row.guidance) if distilled else None,
        max_sequence_length=row.max_sequence_length or TEXT_LENGTH,
        size=row.size or (side, side),
        name=row.name,
        distilled=decision.distilled,
        true_cfg=row.true_cfg,
    )


def pipeline_without_weights(
    row: ModelRow, parts: dict[str, Stored], dtype: torch.dtype | None, device: torch.device
) -> Pipeline:
    """Return the pipeline that `load_row` makes, without weights: enough to settle sizes, and to check prompts and
    programs.

    parts: of `checkpoints.stored`. Only the transformer's first layer is on `device`: a pipeline takes its device and
    dtype from it. The tokenizers are None for a model that is still to be fetched.
    """
    transformer, autoencoder = (
        on_meta(parts[name].params).to(dtype or parts[name].dtype) for name in ("transformer", "autoencoder")
    )
    if all(local(lora.path, "lora", None) for lora in row.lora or ()):
        checkpoints.check_loras(transformer, row.lora)
    transformer.img_in.to_empty(device=device)
    p, like = transformer.params, transformer.img_in.weight
    text = family_of(p).conditioning().silent_text(row, parts, p, dtype, like)
    return assemble(row, schedule_of(row, parts), transformer, autoencoder, text)


def schedule_of(row: ModelRow, parts: dict[str, Stored]) -> schedules.Decision:
    """Return the schedule that `load_row` chooses, and why. parts: of `checkpoints.stored`."""
    fetched = bool(parts["transformer"].files)
    found = checkpoints.find(local(row.path, "transformer", row.variant)) if fetched else None
    return schedules.decide(row, found, parts["transformer"].params)
