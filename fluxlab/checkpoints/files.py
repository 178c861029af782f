"""The weight files of one network in a folder, and safetensors files opened without reading their tensors."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxlab.checkpoints.errors import CheckpointError, few, first_line, quantised

SUFFIXES = (".safetensors", ".sft")
"""Of safetensors files; FLUX.1 was first published under the second one."""

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
COMPUTE_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that networks are computed in, by their names in safetensors files."""
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Dtypes that weights are stored in, but that nothing is computed in: their values are all exact in bfloat16."""


@dataclass(frozen=True)
class Entry:
    """One tensor of an open file. stored: its dtype as the file names it. dtype: None if it is not a supported float.

    `read` maps the tensor: its pages are read when touched and are not counted as memory of the process.
    """

    file: Any
    name: str
    stored: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def refuse_pickle(path: Path) -> None:
    """Raise `CheckpointError` for a pickle: loading one can run any code."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: a pickle, which can run any code when it is loaded, so it is refused\n"
            "Get the model's .safetensors file, or convert this one to safetensors where you trust it."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `CheckpointError` if it is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; it belongs to every Diffusers checkpoint folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({first_line(error)}); copy or download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def index_names(stem: str, variant: str | None) -> list[str]:
    """The names that Diffusers and transformers have given to the index of a sharded checkpoint, newest first."""
    if not variant:
        return [f"{stem}.safetensors.index.json"]
    return [
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.safetensors.{variant}.index.json",
        f"{stem}.{variant}.safetensors.index.json",
    ]


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Return the files of one network: `stem[.variant].safetensors`, or the shards that its index lists.

    As in Diffusers, a network without files of the variant uses its plain files if another network of the same
    pipeline has the variant. Raises `CheckpointError` if there are no files (pickles do not count), or if a shard is
    missing or lies elsewhere.
    """
    files = _files_of(folder, stem, variant)
    if files is None and variant and _elsewhere(folder, variant):
        files = _files_of(folder, stem, None)
    if files is not None:
        return files
    dot = f".{variant}" if variant else ""
    looked_for = f"{stem}{dot}.safetensors and {index_names(stem, variant)[0]}"
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith(stem))
    variants = sorted(set(filter(None, (_variant(name, stem) for name in names))))
    if variants or (variant and any(name.endswith(SUFFIXES) for name in names)):
        have = ", ".join(f"variant={v!r}" for v in variants) or "no variant"
        remedy = f"Pass variant={variants[0]!r}." if variants else "Leave variant out."
        raise CheckpointError(f"{folder}: weights for {have} only; looked for {looked_for}\n{remedy}")
    for name in names:
        refuse_pickle(folder / name)
    raise CheckpointError(f"{folder}: no weights; looked for {looked_for}")


def _files_of(folder: Path, stem: str, variant: str | None) -> list[Path] | None:
    """The files of exactly this variant; None if there are none."""
    for name in index_names(stem, variant):
        if (folder / name).is_file():
            return _shards(folder / name)
    dot = f".{variant}" if variant else ""
    single = folder / f"{stem}{dot}.safetensors"
    return [single] if single.is_file() else None


def _elsewhere(folder: Path, variant: str) -> bool:
    """Whether another network of the pipeline that `folder` belongs to has files of the variant."""
    names = (p.name for p in folder.parent.glob("*/*") if p.parent != folder)
    return any(_variant(name, stem) == variant for name in names for stem in ("diffusion_pytorch_model", "model"))


def _variant(name: str, stem: str) -> str | None:
    found = re.fullmatch(
        rf"{re.escape(stem)}(?:"
        r"\.safetensors\.index\.(?P<a>[^.]+)\.json|\.safetensors\.(?!index\.)(?P<b>[^.]+)\.index\.json"
        r"|\.(?!safetensors\b)(?P<c>[^.]+?)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?)",
        name,
    )
    return found and (found["a"] or found["b"] or found["c"])


def _shards(index: Path) -> list[Path]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(f"{index}: no weight_map from tensors to shard files; copy or download it again")
    names = sorted(set(weights.values()))
    outside = [name for name in names if Path(name).name != name or "\\" in name or name in ("..", ".", "")]
    if outside:  # a name, not the resolved file: the hub's cache keeps shards as links to its blobs
        raise CheckpointError(
            f"{index}: points outside its folder: {few(outside)}\n"
            "Shards lie next to their index. Do not use this checkpoint unless you know who wrote it."
        )
    for name in names:
        refuse_pickle(index.parent / name)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} shards missing: {few(missing)}\nDownload or copy them again."
        )
    return [index.parent / name for name in names]


def open_tensors(files: Sequence[Path]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return every tensor of some safetensors files, by name, and the files' metadata. Only headers are read.

    Raises `CheckpointError` for a file that is damaged or not a safetensors file.
    """
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        file = _open(path)
        metadata |= file.metadata() or {}
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name in entries:
                raise CheckpointError(f"{path}: tensor {name} is in another shard too; download the folder again")
            part = file.get_slice(name)
            stored = part.get_dtype()
            dtype = COMPUTE_DTYPES.get(stored) or FLOAT8.get(stored)
            entries[name] = Entry(file, name, stored, dtype, tuple(part.get_shape()))
    return entries, metadata


def _open(path: Path) -> Any:
    refuse_pickle(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    refuse_gguf(path, start)
    again = "Download or copy it again."
    if not start:
        raise CheckpointError(f"{path}: empty (0 bytes)\n{again}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights\nRun `git lfs pull` in its folder.")
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # PyTorch maps the file; Linux refuses a map that is larger than memory and swap
        raise CheckpointError(
            f"{path}: {path.stat().st_size / 1e9:.1f} GB cannot be mapped into memory ({first_line(error)})\n"
            "Use the model's Diffusers folder, whose files are smaller, add swap, or set vm.overcommit_memory=1."
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: truncated or corrupt: {path.stat().st_size:,} bytes that are not a complete safetensors file "
            f"({first_line(error)})\n{again}"
        ) from None


def refuse_gguf(path: Path, start: bytes) -> None:
    """Raise `CheckpointError` for a GGUF file, known by its suffix or its first bytes."""
    if start.startswith(b"GGUF") or path.suffix.lower() == ".gguf":
        raise quantised(path, "a GGUF file")
