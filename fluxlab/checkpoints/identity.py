"""What distinguishes one model from another, without reading 24 GB."""

import hashlib
import json
from os import PathLike
from pathlib import Path

from fluxlab.cache import Cache, remembered
from fluxlab.checkpoints.files import SUFFIXES, read_json
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.lora import lora_file, settings_file
from fluxlab.checkpoints.manifest import manifest_hashes
from fluxlab.checkpoints.text import open_encoders, text_files
from fluxlab.checkpoints.tokenizer_files import FOLDERS as TOKENIZERS
from fluxlab.checkpoints.tokenizer_files import find_tokenizers
from fluxlab.config import Lora, ModelRow
from fluxlab.families import claimed
from fluxlab.files import sha256_of

_WHOLE = 1 << 20
_SAMPLES, _SAMPLE = 64, 1 << 14
_PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)


def fingerprint(row: ModelRow, cache: Cache | None = None) -> str:
    """Return 64 hex digits that change with whatever a row of `configs/model` loads: weights, LoRAs, tokenizers,
    schedule.

    The manifest of a folder stands for its files. Elsewhere small files count whole, large ones by their size, header
    and 64 samples of 16 KiB spread over them: another training run or dtype is seen, a single flipped bit may not be.
    A hub id is fetched first. With a cache, a weight file is not opened again until its size or times change. Raises
    `CheckpointError` for what does not exist.
    """
    parts = ("transformer", "autoencoder", "text", "settings")
    paths = {"path": row.path, "autoencoder": row.autoencoder, "text": row.text}
    roots = {key: resolve(path, parts, row.variant) for key, path in paths.items() if path}
    files = {key: _digests(root, cache) for key, root in roots.items()}
    text = roots.get("text", roots["path"])
    if text.is_file():  # the other encoder lies next to it
        for file in _encoder_files(text, row, cache):
            if file != text:
                files.setdefault("text", {})[file.name] = _sampled(file, cache)
    if row.tokenizers:
        text_files = claimed(lambda family: family.text_files().reads(text)).text_files()
        files["tokenizers"] = _digests(text_files.tokenizer_folder(text, row.tokenizers), cache)
    identity = {"files": files, "variant": row.variant}
    if row.lora:
        identity["lora"] = [[_lora_digests(lora), lora.scale] for lora in row.lora]
    described = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _lora_digests(lora: Lora) -> list[str]:
    """Return the hash of a LoRA's file, and that of the settings next to it if it has some."""
    file = lora_file(lora)
    return [sha256_of(part) for part in (file, settings_file(file)) if part]


def text_fingerprint(
    root: Path, variant: str | None, tokenizers: "str | PathLike[str] | None", cache: Cache | None
) -> str:
    """Return 64 hex digits that change with the text encoders or the tokenizers at a folder or file.

    Folders of several models that hold the same files of text have the same fingerprint. In a folder of single files
    all count, because which of them is CLIP and which is T5 is known only once they are opened.
    """
    hashes = manifest_hashes(root) if root.is_dir() else {}
    files = {file: file.name if file.parent == root else f"{file.parent.name}/{file.name}" for file in text_files(root)}
    digests = {name: hashes.get(name) or _sampled(file, cache) for file, name in files.items()}
    folder = find_tokenizers(root, tokenizers)
    classes = folder / "model_index.json"
    named = read_json(classes) if classes.is_file() else {}
    for name in TOKENIZERS.values():
        digests |= {f"{name}/{key}": sha for key, sha in _digests(folder / name, cache).items()}
    parts = {
        "files": digests,
        "classes": [named.get(name) for name in TOKENIZERS.values()],
        "asked": None if root.is_dir() else root.name,
        "variant": variant,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def language_model_fingerprint(
    root: Path, variant: str | None, tokenizers: "str | PathLike[str] | None", cache: Cache | None
) -> str:
    """Return 64 hex digits that change with a language model or its tokenizer at a folder."""
    folders = {"text_encoder": root / "text_encoder", "tokenizer": Path(tokenizers or root).expanduser() / "tokenizer"}
    parts = {"files": {name: _digests(folder, cache) for name, folder in folders.items()}, "variant": variant}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _encoder_files(text: Path, row: ModelRow, cache: Cache | None) -> list[Path]:
    def read() -> list[str]:
        encoders = open_encoders(text, row.variant, row.tokenizers)
        return [str(file) for encoder in encoders for file in encoder.files]

    found = remembered(cache, "text", text_files(text), read, str(text), row.variant, row.tokenizers is None)
    return [Path(file) for file in found]


def _digests(path: Path, cache: Cache | None) -> dict[str, str]:
    if path.is_file():
        return {"": _sampled(path, cache)}
    if (path / "manifest.json").is_file():
        return {"manifest.json": sha256_of(path / "manifest.json")}
    folders = [path / part for part in _PARTS if (path / part).is_dir()] or [path]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    kept = [file for file in files if file.suffix in (*SUFFIXES, ".json", ".txt", ".model", ".jinja")]
    return {file.relative_to(path).as_posix(): _sampled(file, cache) for file in kept}


def _sampled(path: Path, cache: Cache | None) -> str:
    if path.suffix in SUFFIXES:
        return remembered(cache, "sampled", [path], lambda: _read_samples(path))
    return _read_samples(path)


def _read_samples(path: Path) -> str:
    size = path.stat().st_size
    if size <= _WHOLE:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        digest.update(handle.read(_WHOLE))
        for i in range(_SAMPLES):
            handle.seek((size - _SAMPLE) * (i + 1) // _SAMPLES)
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()
