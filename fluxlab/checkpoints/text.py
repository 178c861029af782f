"""The text encoders and tokenizers of a Diffusers folder."""

from collections import Counter
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fluxlab.checkpoints.errors import CheckpointError, few, first_line
from fluxlab.checkpoints.files import open_tensors, quantised, read_json, weight_files
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.memory import check_device, check_fits

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel


def load_text_encoders(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    check_memory: bool = True,
) -> "tuple[PreTrainedTokenizerBase, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel]":
    """(CLIP's tokenizer, CLIP, T5's tokenizer, T5) of a Diffusers pipeline folder or hub id, as transformers' classes.

    dtype, device, variant, check_memory: as for `load_transformer`. In float16, transformers keeps one T5 layer a block
    (`wo`) in float32, which overflows otherwise. Raises `CheckpointError` naming the file and what to do.
    """
    device = check_device(device)
    root = resolve(path, ("text", "settings"), variant)
    kinds = {
        "text_encoder": ("CLIPTextModel", ("clip_text_model", "clip")),
        "text_encoder_2": ("T5EncoderModel", ("t5",)),
    }
    needed = [*kinds, "tokenizer", "tokenizer_2"]
    absent = [name for name in needed if not (root / name).is_dir()]
    if absent:
        raise CheckpointError(
            f"{root}: no text encoders here; looked for the folders {', '.join(needed)}, of which {', '.join(absent)} "
            "are missing\nPass a Diffusers folder of FLUX.1, or a hub id, that has them."
        )
    sizes: Counter[torch.dtype] = Counter()
    mapped = 0
    for name, (_, types) in kinds.items():
        read, stays = _check_encoder(root / name, types, dtype, variant)
        sizes += read
        mapped += stays if device.type == "cpu" else 0
    if check_memory:
        check_fits(dict(sizes), device, f"{root}: text encoders", mapped)
    clip, t5 = (_encoder(root / name, kind, dtype, variant).to(device) for name, (kind, _) in kinds.items())
    return _tokenizer(root, "tokenizer", "CLIPTokenizer"), clip, _tokenizer(root, "tokenizer_2", "T5TokenizerFast"), t5


def _check_encoder(
    folder: Path, types: tuple[str, ...], dtype: torch.dtype | None, variant: str | None
) -> tuple["Counter[torch.dtype]", int]:
    """Bytes by dtype once loaded, and how many of them stay mapped. Raises for damaged, quantised or other models."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in types:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, where {types[0]!r} is needed\n"
            "Pass a FLUX.1 checkpoint."
        )
    if config.get("quantization_config"):
        raise quantised(folder / "config.json", "quantization_config")
    entries, _ = open_tensors(weight_files(folder, "model", variant))
    sizes: Counter[torch.dtype] = Counter()
    mapped = 0
    for entry in entries.values():
        size = torch.Size(entry.shape).numel() * (dtype or entry.dtype).itemsize
        sizes[dtype or entry.dtype] += size
        mapped += size if dtype in (None, entry.dtype) else 0
    return sizes, mapped


def _encoder(folder: Path, kind: str, dtype: torch.dtype | None, variant: str | None) -> nn.Module:
    """A transformers model. Their loader maps files and assigns, as ours does, but only warns of what is missing."""
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # weights are mapped: there is nothing to wait for
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=dtype or "auto",
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: no {kind} that can be loaded ({first_line(error)})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        told = "; ".join(f"{len(names)} {kind} ({few(names, 3)})" for kind, names in wrong.items() if names)
        raise CheckpointError(
            f"{folder}: tensors {told}\nThe file is incomplete, or of another model; download it again."
        )
    return model


def _tokenizer(root: Path, folder: str, kind: str) -> "PreTrainedTokenizerBase":
    """The tokenizer in the class that model_index.json names: Diffusers goes by it too."""
    import transformers

    if (root / "model_index.json").is_file():
        named = read_json(root / "model_index.json").get(folder)
        kind = named[1] if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str) else kind
    cls = getattr(transformers, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase)):
        raise CheckpointError(
            f"{root / 'model_index.json'}: {folder} is {kind!r}, which is no tokenizer of transformers"
        )
    try:
        return cls.from_pretrained(root / folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"{root / folder}: no {kind} that can be loaded ({first_line(error)})\nDownload or copy the folder again."
        ) from error
