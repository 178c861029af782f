"""Load the text encoders and their tokenizers: of a Diffusers folder, of single files, or of an all-in-one file."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fluxlab.cache import Cache, remembered
from fluxlab.checkpoints.casting import check_finite, dtype_for, majority
from fluxlab.checkpoints.encoders import CLASSES, ENCODERS, OpenEncoder, config_of, incomplete, open_encoder
from fluxlab.checkpoints.errors import CheckpointError, first_line
from fluxlab.checkpoints.fast_tokenizer import class_name
from fluxlab.checkpoints.files import FLOAT8, SUFFIXES
from fluxlab.checkpoints.finding import FOLDERS, TITLES, resolve
from fluxlab.checkpoints.headers import Stored, described
from fluxlab.checkpoints.memory import check_device, check_fits
from fluxlab.checkpoints.read import check_tensors
from fluxlab.checkpoints.recognise import text_encoder_names
from fluxlab.checkpoints.text_networks import load_network
from fluxlab.checkpoints.tokenizer_files import FOLDERS as TOKENIZERS
from fluxlab.checkpoints.tokenizer_files import MissingTokenizer, find_tokenizers, load_tokenizer
from fluxlab.config import ModelRow

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

    from fluxlab.model.clip import ClipText
    from fluxlab.model.t5 import T5Encoder
    from fluxlab.model.text import TextEncoders

TITLE = "text encoders"
PLACES = "a folder with clip_l.safetensors and t5xxl_fp16.safetensors, a Diffusers folder or a hub id"

_EMBEDDINGS = {"clip": "text_model.embeddings.token_embedding.weight", "t5": "shared.weight"}


def load_text_encoders(
    path: "str | PathLike[str]",
    *,
    dtype: torch.dtype | None = None,
    device: "str | torch.device" = "cpu",
    variant: str | None = None,
    check_memory: bool = True,
    tokenizers: "str | PathLike[str] | None" = None,
) -> "tuple[PreTrainedTokenizerBase, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel]":
    """Return (CLIP's tokenizer, CLIP, T5's tokenizer, T5), as transformers' classes.

    path: a Diffusers folder, a hub id, a folder with `clip_l.safetensors` and `t5xxl_….safetensors`, one of these
    files (the other is found next to it), or an all-in-one file. tokenizers: a folder or hub id with `tokenizer` and
    `tokenizer_2`, if they are not at the path; FLUX.1's are fetched otherwise, and without a connection the first use
    of a tokenizer raises `CheckpointError`. dtype, device, variant, check_memory: as for `load_transformer`. In
    float16, transformers keeps one T5 layer per block (`wo`) in float32, which would overflow.

    Raises `CheckpointError` naming the file and what to do.
    """
    device = check_device(device)
    root = resolve(path, ("text", "settings"), variant)
    encoders = open_encoders(root, variant, tokenizers)
    facts = {encoder.part: facts_of(encoder) for encoder in encoders}
    clip, t5 = load_encoders(encoders, dtype, device, f"{root}: text encoders", check_memory)
    clip_tokenizer, t5_tokenizer = load_tokenizers(root, tokenizers, facts)
    return clip_tokenizer, clip, t5_tokenizer, t5


@dataclass(frozen=True)
class EncoderFacts:
    """What is known of a text encoder from the header of its file. dtype: of most parameters. vocabulary: rows of its
    embedding. size: bytes once it is loaded in `dtype`."""

    dtype: str
    width: int
    vocabulary: int
    size: int

    def loaded_as(self, dtype: torch.dtype | None, device: torch.device, where: Path | str) -> torch.dtype:
        """Return the dtype in which it is loaded if `dtype` is asked for, see `load_text_encoders`."""
        return dtype_for((), dtype or getattr(torch, self.dtype), device, where)


def facts_of(encoder: OpenEncoder) -> EncoderFacts:
    """Return the facts of an open encoder. Raises `CheckpointError` if it has no embedding."""
    dtype = majority(encoder.entries.values())
    try:
        vocabulary, width = encoder.entries[_EMBEDDINGS[encoder.part]].shape
    except (KeyError, ValueError):
        raise incomplete(encoder.path, encoder.part) from None
    parameters = sum(torch.Size(entry.shape).numel() for entry in encoder.entries.values())
    return EncoderFacts(str(dtype).removeprefix("torch."), width, vocabulary, parameters * dtype.itemsize)


def text_encoder_facts(
    root: Path, variant: str | None, tokenizers: "str | PathLike[str] | None", cache: Cache | None
) -> dict[str, EncoderFacts]:
    """Return the facts of "clip" and "t5" at a folder or file, from the cache if their files have not changed."""

    def read() -> dict[str, dict]:
        return {encoder.part: asdict(facts_of(encoder)) for encoder in open_encoders(root, variant, tokenizers)}

    known = remembered(cache, "encoders", text_files(root), read, str(root), variant, tokenizers is None)
    return {part: EncoderFacts(**facts) for part, facts in known.items()}


def text_files(root: Path) -> list[Path]:
    """Return the files that text encoders at a folder or file can consist of. None is opened."""
    folder = root if root.is_dir() else root.parent
    folders = [folder / FOLDERS[part] for part in ENCODERS if root.is_dir() and (folder / FOLDERS[part]).is_dir()]
    files = [file for place in folders or [folder] for file in sorted(place.iterdir()) if file.is_file()]
    return [file for file in files if file.suffix.lower() in SUFFIXES or (folders and file.suffix == ".json")]


def stored(root: Path, row: ModelRow, cache: Cache | None) -> dict[str, Stored]:
    """Return "clip" and "t5" at a folder or file, from headers; from the cache if their files have not changed."""

    def read() -> dict[str, dict[str, Any]]:
        found = {}
        for encoder in open_encoders(root, row.variant, row.tokenizers):
            part = described(encoder.files, encoder.entries.values())
            found[encoder.part] = {
                "files": list(map(str, part.files)),
                "tensors": part.tensors,
                "parameters": {str(dtype).removeprefix("torch."): n for dtype, n in part.parameters.items()},
                "dtype": str(part.dtype).removeprefix("torch."),
                "layer": part.layer,
            }
        return found

    known = remembered(cache, "sizes", text_files(root), read, str(root), row.variant, row.tokenizers is None)
    return {
        part: Stored(
            tuple(map(Path, facts["files"])),
            facts["tensors"],
            Counter({getattr(torch, dtype): n for dtype, n in facts["parameters"].items()}),
            getattr(torch, facts["dtype"]),
            layer=facts["layer"],
        )
        for part, facts in known.items()
    }


def save(folder: Path, text: "TextEncoders", distilled: bool) -> dict[str, Any]:
    """Write encoders and tokenizers into a Diffusers folder. Return what model_index.json says of its pipeline."""
    text.clip.save_pretrained(folder / "text_encoder")
    text.t5.save_pretrained(folder / "text_encoder_2")
    text.clip_tokenizer.save_pretrained(folder / "tokenizer")
    text.t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    return {
        "_class_name": "FluxPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        # Diffusers looks up the class in transformers, where a fast tokenizer has one of several names
        "tokenizer": ["transformers", class_name(text.clip_tokenizer)],
        "tokenizer_2": ["transformers", class_name(text.t5_tokenizer)],
    }


def load_encoders(
    encoders: Sequence[OpenEncoder],
    dtype: torch.dtype | None,
    device: torch.device,
    where: str,
    check: bool = True,
    own: bool = False,
) -> "list[CLIPTextModel | T5EncoderModel | ClipText | T5Encoder]":
    """Load open encoders. check: that they fit, and that all weights are finite. Raises `CheckpointError`.

    own: as classes of `fluxlab.model` where these know the config, which saves the import of transformers.
    """
    sizes: Counter[torch.dtype] = Counter()
    mapped = 0
    dtypes = {}
    for encoder in encoders:
        target = dtypes[encoder.part] = dtype_for(encoder.entries.values(), dtype, device, encoder.path)
        for entry in encoder.entries.values():
            size = torch.Size(entry.shape).numel() * target.itemsize
            sizes[target] += size
            mapped += size if device.type == "cpu" and entry.dtype == target else 0
    if check:
        check_fits(dict(sizes), device, where, mapped)
    loaded = []
    for encoder in encoders:
        network = load_network(encoder, dtypes[encoder.part], check) if own else None
        if network is None:
            with _transformers:
                network = _load(encoder, dtypes[encoder.part], check)
        loaded.append(network.to(device))
    return loaded


_transformers = threading.Lock()
"""transformers loads with global switches: two threads at a time leave weights out."""


def reads(root: Path) -> bool:
    """Return whether text at a Diffusers folder is read by CLIP and T5."""
    return (root / FOLDERS["t5"]).is_dir()


def tokenizer_folder(root: Path, given: "str | PathLike[str] | None") -> Path:
    """Return the folder that holds `tokenizer` and `tokenizer_2`. Errors are those of `load_text_encoders`."""
    return find_tokenizers(root, given)


def load_tokenizers(
    root: Path, tokenizers: "str | PathLike[str] | None", facts: Mapping[str, EncoderFacts]
) -> "list[PreTrainedTokenizerBase | MissingTokenizer]":
    """Load the tokenizers of CLIP and T5. facts: of the encoders. Errors are those of `load_text_encoders`."""
    try:
        folder = find_tokenizers(root, tokenizers)
    except CheckpointError as error:
        if tokenizers is not None or (root / "model_index.json").is_file():
            raise
        return [MissingTokenizer(error), MissingTokenizer(error)]
    return [_tokenizer(folder, part, facts[part].vocabulary) for part in ENCODERS]


def open_encoders(
    root: Path, variant: str | None = None, tokenizers: "str | PathLike[str] | None" = None
) -> list[OpenEncoder]:
    """Open CLIP and T5 at a folder or file. Raises `CheckpointError` if one of them is missing."""
    diffusers = root.is_dir() and ((root / "model_index.json").is_file() or (root / FOLDERS["t5"]).is_dir())
    if diffusers:
        needed = [FOLDERS[part] for part in ENCODERS] + ([] if tokenizers else list(TOKENIZERS.values()))
        absent = [name for name in needed if not (root / name).is_dir()]
        if absent:
            raise CheckpointError(
                f"{root}: holds no text encoders; looked for the folders {', '.join(needed)}, "
                f"of which {', '.join(absent)} are missing\n"
                "Pass a Diffusers folder of FLUX.1 that has them, a hub id, or a folder with clip_l.safetensors and "
                "t5xxl_….safetensors."
            )
    encoders = [open_encoder(root, part, variant) for part in ENCODERS]
    missing = [TITLES[part] for part, encoder in zip(ENCODERS, encoders, strict=True) if encoder is None]
    if missing:
        one = "holds no text encoders" if len(missing) == 2 else f"the {missing[0]} is missing"
        raise CheckpointError(
            f"{root}: {one}\nPass a Diffusers folder of FLUX.1, a hub id, or a folder with clip_l.safetensors and "
            "t5xxl_….safetensors."
        )
    return encoders


def _load(encoder: OpenEncoder, dtype: torch.dtype, check: bool) -> nn.Module:
    """Return a transformers model. Their loader maps files and assigns, as ours does."""
    import transformers
    from transformers.utils import logging

    cls, config = getattr(transformers, CLASSES[encoder.part]), config_of(encoder)
    where = encoder.path
    try:
        with torch.device("meta"):
            empty = cls(config)
        names = {text_encoder_names(encoder.part, name): name for name in empty.state_dict()}
        expected = {name: tuple(empty.state_dict()[theirs].shape) for name, theirs in names.items() if name}
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        raise CheckpointError(f"{where}: no {cls.__name__} can have these sizes ({first_line(error)})") from error
    check_tensors(encoder.entries, expected, encoder.unknown, where)
    tensors = {
        # `to` keeps a tensor that has the dtype already; only float8 is cast here, the rest by transformers
        name: entry.read().to(dtype) if entry.dtype in FLOAT8.values() else entry.read()
        for name, entry in encoder.entries.items()
    }
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # weights are mapped: there is nothing to wait for
    try:
        model, info = cls.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: no {cls.__name__} that can be loaded ({first_line(error)})") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
    for theirs, weight in model.state_dict().items():
        name = text_encoder_names(encoder.part, theirs)
        if name and (check or weight.dtype != encoder.entries[name].dtype):
            check_finite(weight, [(encoder.entries[name].name, encoder.entries[name].read())], where)
    return model


def _tokenizer(folder: Path, part: str, rows: int) -> "PreTrainedTokenizerBase":
    tokenizer = load_tokenizer(folder, part)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"{folder / TOKENIZERS[part]}: its tokens go up to {largest}, but the {TITLES[part]} knows {rows:,} only\n"
            "Pass tokenizers= (model.tokenizers=), the folder of those that it was trained with."
        )
    return tokenizer
