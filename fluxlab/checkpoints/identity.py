"""What distinguishes one model from another, without reading 24 GB."""

import hashlib
import json
from pathlib import Path

from fluxlab.checkpoints.files import SUFFIXES
from fluxlab.checkpoints.finding import resolve
from fluxlab.checkpoints.lora import lora_file, settings_file
from fluxlab.checkpoints.text import open_encoders
from fluxlab.checkpoints.tokenizer_files import find_tokenizers
from fluxlab.config import Lora, ModelRow
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


def fingerprint(row: ModelRow) -> str:
    """Return 64 hex digits that change with whatever a row of `configs/model` loads: weights, LoRAs, tokenizers,
    schedule.

    The manifest of a folder stands for its files. Elsewhere small files count whole, large ones by their size, header
    and 64 samples of 16 KiB spread over them: another training run or dtype is seen, a single flipped bit may not be.
    A hub id is fetched first. Raises `CheckpointError` for what does not exist.
    """
    parts = ("transformer", "autoencoder", "text", "settings")
    paths = {"path": row.path, "autoencoder": row.autoencoder, "text": row.text}
    roots = {key: resolve(path, parts, row.variant) for key, path in paths.items() if path}
    files = {key: _digests(root) for key, root in roots.items()}
    text = roots.get("text", roots["path"])
    if text.is_file():  # the other encoder lies next to it
        for encoder in open_encoders(text, row.variant, row.tokenizers):
            files.setdefault("text", {}).update({file.name: _sampled(file) for file in encoder.files if file != text})
    if row.tokenizers:
        files["tokenizers"] = _digests(find_tokenizers(text, row.tokenizers))
    identity = {"files": files, "variant": row.variant}
    if row.lora:
        identity["lora"] = [[_lora_digests(lora), lora.scale] for lora in row.lora]
    described = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def _lora_digests(lora: Lora) -> list[str]:
    """Return the hash of a LoRA's file, and that of the settings next to it if it has some."""
    file = lora_file(lora)
    return [sha256_of(part) for part in (file, settings_file(file)) if part]


def _digests(path: Path) -> dict[str, str]:
    if path.is_file():
        return {"": _sampled(path)}
    if (path / "manifest.json").is_file():
        return {"manifest.json": sha256_of(path / "manifest.json")}
    folders = [path / part for part in _PARTS if (path / part).is_dir()] or [path]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    kept = [file for file in files if file.suffix in (*SUFFIXES, ".json", ".txt", ".model")]
    return {file.relative_to(path).as_posix(): _sampled(file) for file in kept}


def _sampled(path: Path) -> str:
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
