"""Text encoders that are opened only for prompts that the cache does not have, and that can leave the device again."""

import gc
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache as once
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fluxlab.cache import Cache, read_tensors, write_tensors
from fluxlab.checkpoints.casting import check_finite
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.identity import text_fingerprint
from fluxlab.checkpoints.manifest import verify_manifest
from fluxlab.checkpoints.memory import free_memory
from fluxlab.checkpoints.text import load_encoders, load_tokenizers, open_encoders, text_encoder_facts
from fluxlab.model.t5_blocks import Use, blockwise_states
from fluxlab.model.text import TextEncoders
from fluxlab.progress import Progress

if TYPE_CHECKING:
    from os import PathLike

    from transformers import CLIPTextModel, T5EncoderModel

ENCODING = 1
"""Part of the cache's keys: raise it with any change of how prompts become `(txt, y)`."""

GROUP = 32
"""Prompts that go through T5's blocks together: their states stay on the device, 4 MB each for FLUX.1."""

ROOM = 0.9
"""Share of the device's free memory that T5 may take. The rest is for states, 0.2 GB for FLUX.1."""

Encoded = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Texts:
    """The prompts of a run, negative ones too, and how they are read. They are encoded before the transformer is
    loaded. max_sequence_length: None means the model's own. words: that a capture compares, encoded too but not checked
    as prompts are."""

    prompts: tuple[str, ...]
    max_sequence_length: int | None = None
    truncate: bool = False
    unknown_words: str = "error"
    words: tuple[str, ...] = ()


class StoredEncoders(TextEncoders):
    """The text encoders at a folder or file. Their weights are read when a prompt is neither in memory nor in `cache`.

    Tokenizers and sizes are always there, so that prompts can be checked. `clip` and `t5` load the encoders. From then
    on all prompts are encoded by them, because their weights may have been changed.
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
        self._modules: tuple[CLIPTextModel, T5EncoderModel] | None = None
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
            txts = (t5(tokens.to(self.device))[0] for tokens in ids)
        encoded = []
        for prompt, txt in zip(prompts, txts, strict=True):
            y = clip(self.clip_ids(prompt).to(self.device)).pooler_output
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
            if self._blockwise:
                self._modules = None  # a caller that asks for a network gets all of it, on the device
            modules = self._load(whole=True)
            self._handed_out = True
            self._kept.clear()
            return modules
        return self._modules

    def _load(self, whole: bool = False) -> "tuple[CLIPTextModel, T5EncoderModel]":
        if self._modules is None:
            variant, tokenizers = self._given
            if self.root.is_dir():
                verify_manifest(self.root, of_text=True)
            clip, t5 = open_encoders(self.root, variant, tokenizers)
            self._blockwise = not whole and not self._t5_fits()
            t5_device = torch.device("cpu") if self._blockwise else self.device
            self._unread = self._blockwise and self.device.type == "cpu"
            where = f"{self.root}: text encoders"
            modules = load_encoders([clip], self._dtype, self.device, where)
            modules += load_encoders([t5], self._dtype, t5_device, where, check=not self._unread)
            for module in modules:
                module.eval().requires_grad_(False)
            self._modules = tuple(modules)
        return self._modules

    def _t5_fits(self) -> bool:
        free = self.room
        if free is None and self.device.type != "cpu":
            free = free_memory(self.device)
            free = None if free is None else int(ROOM * free)
        return free is None or sum(self.size().values()) <= free

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


def computed_by(device: torch.device) -> list[str]:
    """Return what the last bits of a text encoder's output depend on, apart from its files and its input."""
    precision = torch.get_float32_matmul_precision()
    libraries = [f"{package} {version(package)}" for package in ("torch", "transformers")]
    if device.type == "cpu":
        return [*libraries, precision, f"{torch.get_num_threads()} threads", *_processor()]
    if device.type == "cuda":
        return [*libraries, precision, torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"]
    return [*libraries, precision, device.type, platform.platform()]


@once
def _processor() -> list[str]:
    """The processor and the instructions that PyTorch, oneDNN and MKL may use of it."""
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    described = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
        described += [line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features")]
    except OSError:  # not Linux
        pass
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    return [digest, torch.backends.cpu.get_cpu_capability(), *(f"{key}={os.environ.get(key)}" for key in limits)]


def encoders_of(
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
