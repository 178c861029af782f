"""Tokenizers that are read without transformers, whose import takes seconds."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fluxlab.checkpoints.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""The classes of transformers that hold nothing but a `tokenizer.json` and the names of its special tokens."""

_FILES = {"tokenizer.json", "tokenizer_config.json"}
_MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEYS = {*_MARKS, "backend", "tokenizer_class", "model_max_length", "clean_up_tokenization_spaces"}
"""Of `tokenizer_config.json`: the ones whose meaning is known. With others, transformers reads the folder."""


class FastTokenizer:
    """Does what fluxlab asks of a tokenizer of transformers, with equal results; the rest is done by that tokenizer.

    kind: its class in transformers.
    """

    def __init__(self, folder: Path, kind: str, core: "Tokenizer", config: dict[str, Any]):
        self.folder, self.kind = folder, kind
        self.backend_tokenizer = core
        self.model_max_length: int = config["model_max_length"]
        self.all_special_tokens = list(dict.fromkeys(config[mark] for mark in _MARKS if config.get(mark)))
        self.all_special_ids = [core.token_to_id(token) for token in self.all_special_tokens]
        self._pad = config["pad_token"]
        self._core = lru_cache(maxsize=8)(self._make_core)

    def __call__(
        self,
        text: str | Sequence[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> SimpleNamespace:
        """Return `input_ids`, and `offset_mapping` if it is asked for, as lists, or as a tensor with "pt".

        padding: False or "max_length". max_length: None means `model_max_length`. verbose: accepted and not used.
        """
        length = max_length or self.model_max_length
        core = self._core(length if truncation else None, length if padding == "max_length" else None)
        encoded = core.encode_batch([text] if isinstance(text, str) else list(text))
        ids, offsets = [one.ids for one in encoded], [one.offsets for one in encoded]
        if isinstance(text, str) and return_tensors is None:
            ids, offsets = ids[0], offsets[0]
        if return_tensors == "pt":
            import torch

            ids = torch.tensor(ids, dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, **({"offset_mapping": offsets} if return_offsets_mapping else {}))

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "folder" not in self.__dict__:  # copying asks for these before there is anything
            raise AttributeError(name)
        return getattr(self.of_transformers, name)

    @cached_property
    def of_transformers(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of transformers."""
        import transformers

        return getattr(transformers, self.kind).from_pretrained(self.folder, local_files_only=True)

    def __deepcopy__(self, memo: dict) -> "FastTokenizer":
        return self  # nothing in it changes

    def _make_core(self, truncated: int | None, padded: int | None) -> "Tokenizer":
        """Return a copy for a length: two threads may ask for different ones."""
        from tokenizers import Tokenizer

        core = Tokenizer.from_str(self.backend_tokenizer.to_str())
        core.no_padding()
        core.no_truncation()
        if truncated is not None:
            core.enable_truncation(truncated)
        if padded is not None:
            core.enable_padding(length=padded, pad_id=core.token_to_id(self._pad), pad_token=self._pad)
        return core


def read_fast_tokenizer(folder: Path, kind: str) -> FastTokenizer | None:
    """Return the tokenizer at a folder; None if only transformers can know what its files mean."""
    if kind not in CLASSES or not (folder / "tokenizer.json").is_file():
        return None
    names = {file.name for file in folder.iterdir()}
    config = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in names else {}
    marks = [config[mark] for mark in _MARKS if config.get(mark) is not None]
    length = config.get("model_max_length")
    if not names <= _FILES or not set(config) <= _KEYS or not all(isinstance(mark, str) for mark in marks):
        return None
    if (
        not isinstance(length, int)
        or not config.get("pad_token")
        or config.get("backend", "tokenizers") != "tokenizers"
    ):
        return None
    from tokenizers import Tokenizer

    try:
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the tokenizers library raises bare Exceptions; transformers' message is as good
        return None
    special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    # transformers adds a special token that the file does not list as one
    return FastTokenizer(folder, kind, core, config) if set(marks) <= special else None


def class_name(tokenizer: Any) -> str:
    """Return the name that a tokenizer's class has in transformers."""
    return tokenizer.kind if isinstance(tokenizer, FastTokenizer) else type(tokenizer).__name__
