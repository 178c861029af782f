"""Checkpoints on the Hugging Face hub: fetch what is needed of one into the hub's cache, or find it there."""

import re
from collections.abc import Sequence
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError
from fluxlab.checkpoints.files import index_names
from fluxlab.families import FAMILIES

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[\w./-]+?))?(?:/(?P<file>[\w./-]+\.(?:safetensors|sft)))?"
)
_WEIGHTS = {"transformer": "transformer", "autoencoder": "vae"}
_STEMS = {
    "transformer": [("transformer", "diffusion_pytorch_model")],
    "autoencoder": [("vae", "diffusion_pytorch_model")],
    "text": [("text_encoder", "model"), ("text_encoder_2", "model")],
}
_TOKENIZERS = [
    f"{folder}/*.{kind}" for folder in ("tokenizer", "tokenizer_2") for kind in ("json", "txt", "model", "jinja")
]


def is_hub_id(text: str) -> bool:
    """Return whether `text` has the form owner/name, owner/name@revision or owner/name/file.safetensors."""
    match = _HUB_ID.fullmatch(text)
    return bool(match) and not text.endswith((".", "/")) and not match["repo"].endswith((".safetensors", ".sft"))


def fetch(hub_id: str, parts: tuple[str, ...], variant: str | None = None) -> Path:
    """Return the folder (or the file) of a hub id in the local cache, holding at least `parts`.

    parts: of "transformer", "autoencoder", "text", "settings", "tokenizers". Of a repository that has both Diffusers
    folders and original files, only the folders are fetched. A part without files of the variant is fetched plain. The
    library shows progress, resumes, and works offline from its cache. Raises `CheckpointError` with what to do where
    that fails.
    """
    match = _HUB_ID.fullmatch(hub_id)
    if match["file"]:
        return snapshot(hub_id, [match["file"]]) / match["file"]
    root = snapshot(hub_id, [p for part in parts for p in _patterns(part, variant)])
    if variant:
        plain = [p for part in parts for p in _plain_patterns(root, part)]
        root = snapshot(hub_id, plain) if plain else root
    nets = [part for part in parts if part in _WEIGHTS]
    if any((root / _WEIGHTS[part] / "config.json").is_file() for part in nets):
        return root
    patterns = [
        "config.json",
        *_weights("", "diffusion_pytorch_model", variant),
        *dict.fromkeys(p for part in nets for family in FAMILIES.values() for p in family.networks[part].originals),
    ]
    return snapshot(hub_id, patterns) if nets else root


def _patterns(part: str, variant: str | None) -> list[str]:
    if part in _STEMS:
        folders = _STEMS[part]
        weights = [name for folder, stem in folders for name in _weights(f"{folder}/", stem, variant)]
        tokenizers = _TOKENIZERS if part == "text" else []
        return [*(f"{folder}/config.json" for folder, _ in folders), *weights, *tokenizers]
    return _TOKENIZERS if part == "tokenizers" else ["model_index.json", "scheduler/*.json"]


def _plain_patterns(root: Path, part: str) -> list[str]:
    """Patterns of the plain weights of networks that have come without any."""
    empty = [
        (folder, stem)
        for folder, stem in _STEMS.get(part, ())
        if (root / folder / "config.json").is_file() and not any((root / folder).glob("*.safetensors"))
    ]
    return [name for folder, stem in empty for name in _weights(f"{folder}/", stem, None)]


def _weights(folder: str, stem: str, variant: str | None) -> list[str]:
    dot = f".{variant}" if variant else ""
    return [
        f"{folder}{stem}{dot}.safetensors",
        f"{folder}{stem}{dot}-[0-9]*-of-[0-9]*.safetensors",
        *(f"{folder}{name}" for name in index_names(stem, variant)),
    ]


def snapshot(hub_id: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a hub id in the local cache, with the files that match the patterns. Errors as `fetch`."""
    import huggingface_hub
    from huggingface_hub import errors

    match = _HUB_ID.fullmatch(hub_id)
    repo, revision = match["repo"], match["revision"]
    local = "or download it elsewhere and pass the local folder."
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo}: a gated repository: its owner asks you to accept the licence first\n"
            f"Accept it on the page of {repo} on the Hugging Face hub, then run `hf auth login`, {local}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo}: no such folder here, and no such repository on the Hugging Face hub (or it is private)\n"
            f"Check the spelling; for a private one run `hf auth login` with an account that has access, {local}"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo}: the hub has no revision {revision!r} of it; see its list of branches") from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo}: no such folder here, and not a hub id ({str(error).splitlines()[0]})") from None
    except Exception as error:  # the library's connection errors come from whichever http client it uses
        from huggingface_hub import constants

        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _reason(error)
        raise CheckpointError(
            f"{repo}: no such folder here, and it could not be fetched from the Hugging Face hub ({why})\n"
            "Connect and run again (downloaded files are kept; a gated model needs `hf auth login` first), "
            "or pass a local folder."
        ) from error


def _reason(error: Exception) -> str:
    """Describe a connection failure in a few words: by its cause, if the library wraps it."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}".rstrip(": ")
