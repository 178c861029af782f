"""FLUX.1's text encoders, CLIP and T5, opened only for prompts that are not known."""

import gc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fluxlab.cache import Cache, read_tensors, write_tensors
from fluxlab.checkpoints.casting import check_finite
from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.identity import text_fingerprint
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.checkpoints.stored import Stored, local
from fluxlab.checkpoints.text import load_encoders, load_tokenizers, open_encoders, text_encoder_facts
from fluxlab.checkpoints.tokenizer_files import find_tokenizers, load_tokenizer
from fluxlab.conditioning.silent import SilentEncoder
from fluxlab.conditioning.texts import Texts, computed_by, fits
from fluxlab.config import ModelRow
from fluxlab.model import FluxParams
from fluxlab.model.t5_blocks import Use, blockwise_states
from fluxlab.model.text import TextEncoders, last_layer, pooled
from fluxlab.progress import Progress

if TYPE_CHECKING:
    from os import PathLike

    from transformers import CLIPTextModel, T5EncoderModel

    from fluxlab.model.clip import ClipText
    from fluxlab.model.t5 import T5Encoder

ENCODING = 2
"""Part of the cache's keys: raise it with any change of how prompts become `(txt, y)`."""

GROUP = 32
"""Prompts that go through T5's blocks together: their states stay on the device, 4 MB each for FLUX.1."""

Encoded = tuple[Tensor, Tensor]


class StoredEncoders(TextEncoders):
    """The text encoders at a folder or file. Their weights are read when a prompt is neither in memory nor in `cache`.

    Tokenizers and sizes are always there, so that prompts can be checked. Prompts are encoded by networks of
    `fluxlab.model`, to the bits of transformers'. `clip` and `t5` load the encoders as classes of transformers. From
    then on all prompts are encoded by them, because their weights may have been changed.
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
        self.room: int | None = None
        """Bytes of the device that the encoders may take. None: what is free on a GPU, no limit on the CPU."""
        self.before_block: Use | None = None
        self.after_block: Use | None = None
        """Called with every part of T5 before and after it is used, if T5 runs one block at a time."""
        self._given = variant, tokenizers
        self._dtype = dtype
        self.facts = text_encoder_facts(root, variant, tokenizers, cache)
        self._dtypes = {part: facts.loaded_as(dtype, device, root) for part, facts in self.facts.items()}
        self.clip_tokenizer, self.t5_tokenizer = load_tokenizers(root, tokenizers, self.facts)
        self._modules: tuple[ClipText | CLIPTextModel, T5Encoder | T5EncoderModel] | None = None
        self._blockwise = False  # T5 stays in main memory, one block at a time is on the device
        self._unread = False  # T5's weights are checked block by block, so that they need not be in memory together
        self._handed_out = False
        self._kept: dict[tuple[str, int], Encoded] = {}

    def __repr__(self) -> str:
        return f"StoredEncoders({str(self.root)!r})"

    @property
    def clip(self) -> "CLIPTextModel":
        return self._hand_out()[0]

    @property
    def t5(self) -> "T5EncoderModel":
        return self._hand_out()[1]

    @property
    def widths(self) -> dict[str, int]:
        return {part: facts.width for part, facts in self.facts.items()}

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self._dtypes["t5"], self._dtypes["clip"]

    def size(self) -> dict[str, int]:
        """Return the bytes of "clip" and "t5" once they are loaded."""
        sizes = {part: facts.size // getattr(torch, facts.dtype).itemsize for part, facts in self.facts.items()}
        return {part: count * self._dtypes[part].itemsize for part, count in sizes.items()}

    def to(self, device: torch.device) -> None:
        self.device = device
        if self._handed_out:
            super().to(device)
        else:
            self.release()

    def release(self) -> None:
        """Give the memory of the encoders back, unless their weights may have been changed. They are read again for a
        prompt that is not known."""
        if self._handed_out or self._modules is None:
            return
        self._modules = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prepare(self, texts: Texts, default_length: int) -> None:
        """Encode all texts and release the encoders. Known ones are not encoded again, and if all are known, nothing
        is opened.

        Raises `UserError` as `check` does, before anything is encoded.
        """
        length = texts.max_sequence_length or default_length
        self.check(texts.prompts, length, texts.truncate, texts.unknown_words)
        if not self._handed_out:
            self._keep((*texts.prompts, *texts.words), length)
            self.release()

    def states(self, prompt: str, max_sequence_length: int) -> Encoded:
        if self._handed_out:
            return super().states(prompt, max_sequence_length)
        (found,) = self._find([prompt], max_sequence_length)
        txt, y = found or self._encode([prompt], max_sequence_length)[0]
        # copies: the bits of a matrix product may depend on how its operands are aligned, in a file they are not
        return txt.clone().to(self.device), y.clone().to(self.device)

    def _keep(self, prompts: Iterable[str], length: int) -> None:
        distinct = [prompt for prompt in dict.fromkeys(prompts) if (prompt, length) not in self._kept]
        found = dict(zip(distinct, self._find(distinct, length), strict=True))
        self._kept |= {(prompt, length): encoded for prompt, encoded in found.items() if encoded}
        missing = [prompt for prompt, encoded in found.items() if not encoded]
        progress = Progress("prompts", len(missing), unit="prompt") if len(missing) > GROUP else None
        for start in range(0, len(missing), GROUP):
            group = missing[start : start + GROUP]
            encoded = self._encode(group, length)
            stored = self._find(group, length)  # mapped from the cache, which takes no memory of the process
            pairs = zip(stored, encoded, strict=True)
            self._kept |= {(prompt, length): a or b for prompt, (a, b) in zip(group, pairs, strict=True)}
            if progress:
                progress(start + len(group))
        if progress:
            progress.close()

    def _find(self, prompts: Sequence[str], length: int) -> list[Encoded | None]:
        """Return the prompts' states on the CPU, from memory or from the cache. None for those that are unknown."""
        found: list[Encoded | None] = []
        for prompt in prompts:
            tensors = None
            if (prompt, length) not in self._kept and self.cache:
                tensors = read_tensors(self.cache, self._key(prompt, length))
            found.append((tensors["txt"], tensors["y"]) if tensors else self._kept.get((prompt, length)))
        return found

    @torch.inference_mode()
    def _encode(self, prompts: Sequence[str], length: int) -> list[Encoded]:
        """Encode prompts and write them into the cache. The results are on the CPU."""
        clip, t5 = self._load()
        ids = [self.t5_ids(prompt, length) for prompt in prompts]
        if self._blockwise:
            txts = blockwise_states(t5, ids, self.device, self._before_block, self.after_block)
        else:
            txts = (last_layer(t5, tokens.to(self.device)) for tokens in ids)
        encoded = []
        for prompt, txt in zip(prompts, txts, strict=True):
            y = pooled(clip, self.clip_ids(prompt).to(self.device))
            encoded.append((txt.cpu(), y.cpu()))
            if self.cache:
                write_tensors(self.cache, self._key(prompt, length), {"txt": txt, "y": y})
        return encoded

    def _before_block(self, module: nn.Module) -> None:
        if self._unread:
            for name, weight in module.named_parameters():
                check_finite(weight, [(name, weight)], self.root)
        if self.before_block:
            self.before_block(module)

    def _hand_out(self) -> "tuple[CLIPTextModel, T5EncoderModel]":
        if not self._handed_out:
            self._modules = None  # a caller that asks for a network gets transformers' class, all of it on the device
            modules = self._load(whole=True)
            self._handed_out = True
            self._kept.clear()
            return modules
        return self._modules

    def _load(self, whole: bool = False) -> "tuple[ClipText | CLIPTextModel, T5Encoder | T5EncoderModel]":
        """Return CLIP and T5. whole: as classes of transformers, all of them on the device."""
        if self._modules is None:
            variant, tokenizers = self._given
            if self.root.is_dir():
                verify_manifest(self.root, of_text=True)
            clip, t5 = open_encoders(self.root, variant, tokenizers)
            self._blockwise = not whole and not fits(sum(self.size().values()), self.room, self.device)
            t5_device = torch.device("cpu") if self._blockwise else self.device
            self._unread = self._blockwise and self.device.type == "cpu"
            where = f"{self.root}: text encoders"
            modules = load_encoders([clip], self._dtype, self.device, where, own=not whole)
            modules += load_encoders([t5], self._dtype, t5_device, where, check=not self._unread, own=not whole)
            for module in modules:
                module.eval().requires_grad_(False)
            self._modules = tuple(modules)
        return self._modules

    def _key(self, prompt: str, length: int) -> str:
        parts = {
            "encoding": ENCODING,
            "files": self._fingerprint,
            "prompt": prompt,
            "length": length,
            "dtypes": [str(dtype) for dtype in self.dtypes],
            "computed": computed_by(self.device),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _fingerprint(self) -> str:
        return text_fingerprint(self.root, *self._given, self.cache)


def open_text(
    path: "str | PathLike[str]",
    dtype: torch.dtype | None,
    device: torch.device,
    variant: str | None,
    tokenizers: "str | PathLike[str] | None",
    cache: Cache | None,
) -> StoredEncoders:
    """Return the text encoders at a folder, file or hub id. Arguments and errors as for `load_text_encoders`."""
    root = resolve(path, ("text", "settings"), variant)
    return StoredEncoders(root, dtype, device, variant=variant, tokenizers=tokenizers, cache=cache)


def check_widths(row: ModelRow, p: FluxParams, text: TextEncoders) -> None:
    """Raise `CheckpointError` for text encoders that do not give what the transformer takes."""
    widths = text.widths
    for name, states, width in (("CLIP", widths["clip"], p.vec_in_dim), ("T5", widths["t5"], p.context_in_dim)):
        if states != width:
            raise CheckpointError(
                f"{row.text or row.path}: this {name} gives {states} channels, the transformer takes {width}\n"
                "Pass the text encoders of FLUX.1: CLIP-L (768) and T5 v1.1 XXL (4096)."
            )


def silent_text(
    row: ModelRow, parts: Mapping[str, Stored], p: FluxParams, dtype: torch.dtype | None, like: Tensor
) -> TextEncoders:
    """Return text encoders without weights. parts: of `checkpoints.stored`. like: a tensor on the model's device.

    Tokenizers are None for a model that is still to be fetched.
    """
    clip = SilentEncoder(p.vec_in_dim, dtype or parts["clip"].dtype, like)
    t5 = SilentEncoder(p.context_in_dim, dtype or parts["t5"].dtype, like)
    tokenizers = {"clip": None, "t5": None}
    if parts["t5"].files:
        folder = find_tokenizers(local(row.text or row.path, "text", row.variant), row.tokenizers)
        tokenizers = {part: load_tokenizer(folder, part) for part in tokenizers}
    return TextEncoders(tokenizers["clip"], clip, tokenizers["t5"], t5)
