"""The tokenizers that belong to the text encoders: where they are, and how they are loaded."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.checkpoints.errors import CheckpointError, first_line
from fluxlab.checkpoints.fast_tokenizer import FastTokenizer, read_fast_tokenizer
from fluxlab.checkpoints.files import read_json
from fluxlab.checkpoints.hub import fetch, is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
PUBLISHED = "black-forest-labs/FLUX.1-schnell"
"""Its tokenizers (a few MB) are fetched for text encoders that come without any."""
_CLASSES = {"clip": "CLIPTokenizer", "t5": "T5TokenizerFast"}


class MissingTokenizer:
    """Stands for a tokenizer that is not on this machine. Raises `CheckpointError` where it is used."""

    def __init__(self, error: CheckpointError):
        self._error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and printing ask for these
            raise AttributeError(name)
        raise self._error


def find_tokenizers(root: Path, given: "str | PathLike[str] | None") -> Path:
    """Return the folder that holds `tokenizer` and `tokenizer_2`.

    `given` is a folder or hub id; without it they are looked for at `root` (for a file, next to it), and then fetched
    from `PUBLISHED`. Raises `CheckpointError` if there are none.
    """
    if given is not None:
        folder = _given(given)
        if not has_tokenizers(folder):
            raise CheckpointError(
                f"tokenizers {given}: expected a folder that holds {' and '.join(FOLDERS.values())}, or a hub id"
            )
        return folder
    folder = root if root.is_dir() else root.parent
    if has_tokenizers(folder):
        return folder
    try:
        return fetch(PUBLISHED, ("tokenizers",))
    except CheckpointError as error:
        raise CheckpointError(
            f"{root}: text encoders without tokenizers, and FLUX.1's could not be fetched\n"
            f"Pass tokenizers= (model.tokenizers=), a folder that holds {' and '.join(FOLDERS.values())}.\n"
            f"({first_line(error)})"
        ) from error


def has_tokenizers(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in FOLDERS.values())


def load_tokenizer(folder: Path, part: str) -> "PreTrainedTokenizerBase | FastTokenizer":
    """Load the tokenizer of "clip" or "t5", in the class that model_index.json or tokenizer_config.json names, or as a
    `FastTokenizer` if that class needs nothing more."""
    name, source, kind = FOLDERS[part], folder / "model_index.json", _CLASSES[part]
    named = read_json(source).get(name) if source.is_file() else None
    if named is None and (folder / name / "tokenizer_config.json").is_file():
        source = folder / name / "tokenizer_config.json"
        named = [None, read_json(source).get("tokenizer_class")]
    if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
        kind = named[1]
    if fast := read_fast_tokenizer(folder / name, kind):
        return fast
    import transformers

    cls = getattr(transformers, kind, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase)):
        raise CheckpointError(f"{source}: {name} is {kind!r}, which is not a tokenizer of transformers")
    try:
        return cls.from_pretrained(folder / name, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(
            f"{folder / name}: no {kind} that can be loaded ({first_line(error)})\nDownload or copy the folder again."
        ) from error


def _given(given: "str | PathLike[str]") -> Path:
    path = Path(given).expanduser()
    if path.is_dir() or not (isinstance(given, str) and is_hub_id(given)):
        return path
    return fetch(given, ("tokenizers",))
