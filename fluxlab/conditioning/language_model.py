"""FLUX.2's language model, opened only for prompts that are not known."""

import gc
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fluxlab.cache import Cache, read_tensors, write_tensors
from fluxlab.checkpoints.casting import check_finite, dtype_for
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.identity import language_model_fingerprint
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.checkpoints.stored import Stored, local
from fluxlab.checkpoints.text2 import load_language_model, load_language_tokenizer, open_language_model
from fluxlab.conditioning.silent import SilentEncoder
from fluxlab.conditioning.texts import Texts, computed_by, fits
from fluxlab.config import ModelRow
from fluxlab.model import Flux2Params
from fluxlab.model.layerwise import Use, layer_by_layer
from fluxlab.model.text2 import KINDS, LanguageModelText

if TYPE_CHECKING:
    from os import PathLike

    from transformers import PreTrainedModel

ENCODING = 1
"""Part of the cache's keys: raise it with any change of how prompts become `txt`."""


class StoredLanguageModel(LanguageModelText):
    """The language model at a folder. Its weights are read when a prompt is neither in memory nor in `cache`.

    `encoder` loads it. From then on it encodes all prompts, because its weights may have been changed.
    """

    def __init__(
        self,
        root: Path,
        dtype: torch.dtype | None,
        device: torch.device,
        *,
        variant: str | None = None,
        tokenizers: "str | PathLike[str] | None" = None,
        cache: Cache | None = None,
    ):
        self.root, self.device, self.cache = root, device, cache
        self.tokenizer = load_language_tokenizer(root, tokenizers)
        self.room: int | None = None
        """Bytes of the device that the language model may take. None: what is free on a GPU, no limit on the CPU."""
        self.after_block: Use | None = None
        """Called with every layer after it is used, if the language model runs one layer at a time."""
        self._given = variant, tokenizers
        self._opened = open_language_model(root, variant)
        self._dtype = dtype_for(self._opened.entries.values(), dtype, device, root)
        self.kind = self._opened.kind
        self._model: PreTrainedModel | None = None
        self._layerwise = False  # it stays in main memory, one layer at a time is on the device
        self._unread = False  # its weights are checked layer by layer, so that they need not be in memory together
        self._handed_out = False
        self._kept: dict[tuple[str, int], Tensor] = {}

    def __repr__(self) -> str:
        return f"StoredLanguageModel({str(self.root)!r})"

    @property
    def encoder(self) -> "PreTrainedModel":
        if self._layerwise:
            self._model = None  # a caller that asks for it gets all of it, on the device
        self._handed_out = True
        self._kept.clear()
        return self._load(whole=True)

    @property
    def width(self) -> int:
        return len(KINDS[self.kind].layers) * self._opened.width

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self._dtype,)

    def size(self) -> dict[str, int]:
        """Return the bytes of the language model once it is loaded."""
        count = sum(torch.Size(entry.shape).numel() for entry in self._opened.entries.values())
        return {self.kind: count * self._dtype.itemsize}

    def to(self, device: torch.device) -> None:
        self.device = device
        if self._handed_out:
            self.encoder.to(device)
        else:
            self.release()

    def release(self) -> None:
        """Give the memory of the language model back, unless its weights may have been changed."""
        if self._handed_out or self._model is None:
            return
        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, texts: Texts, default_length: int) -> None:
        """Encode all texts and release the language model. If all are known, it is not opened.

        Raises `UserError` as `check` does, before anything is encoded.
        """
        length = texts.max_sequence_length or default_length
        self.check(texts.prompts, length, texts.truncate, texts.unknown_words)
        if self._handed_out:
            return
        for prompt in dict.fromkeys((*texts.prompts, *texts.words)):
            self._kept[prompt, length] = self._known(prompt, length)
        self.release()

    def states(self, prompt: str, max_sequence_length: int) -> tuple[Tensor]:
        if self._handed_out:
            return super().states(prompt, max_sequence_length)
        # a copy: the bits of a matrix product may depend on how its operands are aligned, in a file they are not
        return (self._known(prompt, max_sequence_length).clone().to(self.device),)

    def _known(self, prompt: str, length: int) -> Tensor:
        """Return the states of a prompt on the CPU: from memory, from the cache, or encoded now."""
        if (prompt, length) in self._kept:
            return self._kept[prompt, length]
        key = self.cache and self._key(prompt, length)
        if self.cache and (tensors := read_tensors(self.cache, key)):
            return tensors["txt"]
        txt = self._encoded(prompt, length).cpu()
        if self.cache:
            write_tensors(self.cache, key, {"txt": txt})
        return txt

    def _encoded(self, prompt: str, length: int) -> Tensor:
        model = LanguageModelText(self.tokenizer, self._load(), self.kind)
        if not self._layerwise:
            return model.states(prompt, length)[0]
        with layer_by_layer(model.encoder.get_decoder(), self.device, self._before_layer, self._after_layer):
            return model.states(prompt, length, self.device)[0]

    def _before_layer(self, layer: nn.Module) -> None:
        for name, weight in layer.named_parameters() if self._unread else ():
            check_finite(weight, [(name, weight)], self.root)

    def _after_layer(self, layer: nn.Module) -> None:
        if self.after_block:
            self.after_block(layer)

    def _load(self, whole: bool = False) -> "PreTrainedModel":
        if self._model is None:
            verify_manifest(self.root, of_text=True)
            self._layerwise = not whole and not fits(sum(self.size().values()), self.room, self.device)
            self._unread = self._layerwise and self.device.type == "cpu"
            device = torch.device("cpu") if self._layerwise else self.device
            options = {"variant": self._given[0], "check": not self._unread}
            self._model = load_language_model(self._opened, self._dtype, device, **options)
        return self._model

    def _key(self, prompt: str, length: int) -> str:
        parts = {
            "encoding": ["flux2", ENCODING],
            "files": self._fingerprint,
            "text": self.template(prompt),
            "length": length,
            "dtypes": [str(dtype) for dtype in self.dtypes],
            "computed": computed_by(self.device),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _fingerprint(self) -> str:
        return language_model_fingerprint(self.root, *self._given, self.cache)


def open_text(
    path: "str | PathLike[str]",
    dtype: torch.dtype | None,
    device: torch.device,
    variant: str | None,
    tokenizers: "str | PathLike[str] | None",
    cache: Cache | None,
) -> StoredLanguageModel:
    """Return the language model at a folder or hub id. Raises `CheckpointError` if it is missing."""
    root = resolve(path, ("text", "settings"), variant)
    return StoredLanguageModel(root, dtype, device, variant=variant, tokenizers=tokenizers, cache=cache)


def check_widths(row: ModelRow, p: Flux2Params, text: LanguageModelText) -> None:
    """Raise `CheckpointError` for a language model that does not give what the transformer takes."""
    if text.width != p.context_in_dim:
        raise CheckpointError(
            f"{row.text or row.path}: this language model gives {text.width} channels (three states), the "
            f"transformer takes {p.context_in_dim}\nPass the one that it was trained with."
        )


def silent_text(
    row: ModelRow, parts: Mapping[str, Stored], p: Flux2Params, dtype: torch.dtype | None, like: Tensor
) -> LanguageModelText:
    """Return a language model without weights. parts: of `checkpoints.stored`. like: a tensor on the model's device.

    The tokenizer is None for a model that is still to be fetched.
    """
    (kind,) = parts.keys() & KINDS.keys()
    tokenizer = None
    if parts[kind].files:
        tokenizer = load_language_tokenizer(local(row.text or row.path, "text", row.variant), row.tokenizers)
    width = p.context_in_dim // len(KINDS[kind].layers)
    return LanguageModelText(tokenizer, SilentEncoder(width, dtype or parts[kind].dtype, like), kind)
