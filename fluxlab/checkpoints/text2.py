"""FLUX.2's language model and tokenizer in a Diffusers folder: `text_encoder/` and `tokenizer/`."""

from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fluxlab.cache import Cache
from fluxlab.checkpoints.casting import check_finite, dtype_for
from fluxlab.checkpoints.errors import CheckpointError, first_line, quantised
from fluxlab.checkpoints.files import Entry, open_tensors, read_json, weight_files
from fluxlab.checkpoints.headers import Stored, described
from fluxlab.checkpoints.memory import check_fits
from fluxlab.config import ModelRow
from fluxlab.model.text2 import CLASSES, KINDS, STATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fluxlab.model.text2 import LanguageModelText

TITLE, PLACES = "language model", "a Diffusers folder or a hub id"
ENCODER, TOKENIZER = "text_encoder", "tokenizer"


@dataclass(frozen=True)
class OpenLanguageModel:
    """A language model as its files describe it. kind: `model_type`, one of `KINDS`. width: of one state."""

    folder: Path
    files: list[Path]
    entries: dict[str, Entry]
    kind: str
    width: int
    layers: int


def open_language_model(root: Path, variant: str | None = None) -> OpenLanguageModel:
    """Open the language model of a Diffusers folder. Raises `CheckpointError` if it is missing or of another model."""
    folder = root / ENCODER
    if root.is_file() or not folder.is_dir():
        raise CheckpointError(
            f"{root}: holds no language model; looked for the folders {ENCODER} and {TOKENIZER}\n"
            "Pass text= (model.text=), a Diffusers folder or a hub id of FLUX.2."
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {kind!r}, expected {' or '.join(map(repr, KINDS))}\n"
            "Pass text= (model.text=), a Diffusers folder or a hub id of FLUX.2."
        )
    if config.get("quantization_config"):
        raise quantised(folder / "config.json", "quantization_config")
    sizes = config.get("text_config") or config
    width, layers = sizes.get("hidden_size"), sizes.get("num_hidden_layers")
    taken = config.get(STATES, KINDS[kind].layers)
    if not isinstance(taken, (list, tuple)) or [type(n) for n in taken] != [int] * 3 or min(taken) < 0:
        raise CheckpointError(f"{folder / 'config.json'}: {STATES} is {taken!r}; expected the numbers of three layers")
    if not isinstance(width, int) or not isinstance(layers, int) or layers < max(taken):
        raise CheckpointError(
            f"{folder / 'config.json'}: hidden_size {width!r} and num_hidden_layers {layers!r}; expected numbers, and "
            f"at least {max(taken)} layers, whose states FLUX.2 reads"
        )
    files = weight_files(folder, "model", variant)
    return OpenLanguageModel(folder, files, open_tensors(files)[0], kind, width, layers)


def stored(root: Path, row: ModelRow, cache: Cache | None) -> dict[str, Stored]:
    """Return the language model of a Diffusers folder from its headers, by its kind."""
    model = open_language_model(root, row.variant)
    return {model.kind: described(model.files, model.entries.values())}


def save(folder: Path, text: "LanguageModelText", distilled: bool) -> dict[str, Any]:
    """Write model and tokenizer into a Diffusers folder. Return what model_index.json says of its pipeline.

    distilled: of FLUX.2 [klein]; Diffusers then ignores guidance.
    """
    text.encoder.save_pretrained(folder / ENCODER)
    text.tokenizer.save_pretrained(folder / TOKENIZER)
    klein = text.kind == "qwen3"
    return {
        "_class_name": "Flux2KleinPipeline" if klein else "Flux2Pipeline",
        "text_encoder": ["transformers", type(text.encoder).__name__],
        "tokenizer": ["transformers", type(text.tokenizer).__name__],
        **({"is_distilled": distilled} if klein else {}),
    }


def load_language_model(
    opened: OpenLanguageModel,
    dtype: torch.dtype | None,
    device: torch.device,
    variant: str | None = None,
    check: bool = True,
) -> "PreTrainedModel":
    """Load an open language model. Raises `CheckpointError` if it does not fit, or for weights that are missing,
    unknown or, with `check`, not finite."""
    import transformers
    from transformers.utils import logging

    chosen = dtype_for(opened.entries.values(), dtype, device, opened.folder)
    size = sum(torch.Size(entry.shape).numel() for entry in opened.entries.values()) * chosen.itemsize
    mapped = size if device.type == "cpu" and all(e.dtype == chosen for e in opened.entries.values()) else 0
    check_fits(Counter({chosen: size}), device, str(opened.folder), mapped)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    cls = getattr(transformers, CLASSES[opened.kind])
    options = {"dtype": chosen, "variant": variant, "local_files_only": True, "use_safetensors": True}
    try:
        model, info = cls.from_pretrained(opened.folder, output_loading_info=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{opened.folder}: no {cls.__name__} that can be loaded ({first_line(error)})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in wrong.items() if names)
        raise CheckpointError(f"{opened.folder}: {listed}\nThe files are incomplete, or of another model.")
    for name, weight in model.named_parameters() if check else ():
        check_finite(weight, [(name, weight)], opened.folder)
    return model.to(device).eval().requires_grad_(False)


def reads(root: Path) -> bool:
    """Return whether the text of a model at `root` is read by a language model, as FLUX.2's."""
    file = root / ENCODER / "config.json"
    return file.is_file() and read_json(file).get("model_type") in KINDS


def tokenizer_folder(root: Path, given: "str | PathLike[str] | None" = None) -> Path:
    """Return the tokenizer's folder, at `root` or in the folder `given`. Raises `CheckpointError` without one."""
    folder = Path(given or root).expanduser() / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; pass tokenizers= (model.tokenizers=), a folder that has it")
    return folder


def load_language_tokenizer(root: Path, given: "str | PathLike[str] | None" = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer at `root`, or of the folder `given`. Raises `CheckpointError` without one or its template."""
    from transformers import AutoTokenizer

    folder = tokenizer_folder(root, given)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{folder}: no tokenizer that can be loaded ({first_line(error)})") from error
    if not tokenizer.is_fast or not tokenizer.chat_template:
        lacks = "no chat template" if tokenizer.is_fast else "no tokenizer.json, which maps tokens to words"
        raise CheckpointError(f"{folder}: {lacks}\nDownload or copy the folder again.")
    return tokenizer
