"""The files of one network inside a folder, and safetensors files opened without reading them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxlab.checkpoints.errors import CheckpointError, few, first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of an open file. `read` maps it: its pages are read when touched, and never counted as our own."""

    file: Any
    name: str
    dtype: torch.dtype
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; it belongs to every Diffusers checkpoint folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not readable as JSON ({first_line(error)}); copy or download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of one network: `stem[.variant].safetensors`, or the shards that its index lists.

    Raises `CheckpointError` if there are none (pickles do not count), or if a shard is missing or lies elsewhere.
    """
    dot = f".{variant}" if variant else ""
    index, single = folder / f"{stem}.safetensors.index{dot}.json", folder / f"{stem}{dot}.safetensors"
    if index.is_file():
        return _shards(index)
    if single.is_file():
        return [single]
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith(stem))
    there = sorted(set(filter(None, (_variant(name, stem) for name in names))))
    if there or (variant and any(name.endswith(".safetensors") for name in names)):
        have = ", ".join(f"variant={v!r}" for v in there) or "no variant"
        raise CheckpointError(
            f"{folder}: weights for {have} only; looked for {single.name} and {index.name}\n"
            "Pass the variant that is there."
        )
    for name in names:
        refuse_pickle(folder / name)
    raise CheckpointError(f"{folder}: no weights; looked for {single.name} and {index.name}")


def _variant(name: str, stem: str) -> str | None:
    found = re.fullmatch(
        rf"{re.escape(stem)}(?:\.safetensors\.index\.(?P<a>[^.]+)\.json|\.(?P<b>[^.]+?)(?:-\d+-of-\d+)?\.safetensors)",
        name,
    )
    return found and (found["a"] or found["b"])


def _shards(index: Path) -> list[Path]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError(f"{index}: no weight_map from tensors to shard files; copy or download it again")
    names = sorted(set(weights.values()))
    outside = [name for name in names if Path(name).name != name or "\\" in name or name in ("..", ".", "")]
    if outside:  # a name, not the resolved file: the hub's cache keeps shards as links to its blobs
        raise CheckpointError(
            f"{index}: points outside its folder: {few(outside)}\n"
            "Shards lie beside their index. Do not use this checkpoint unless you know who wrote it."
        )
    for name in names:
        refuse_pickle(index.parent / name)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} shards missing: {few(missing)}\nDownload or copy them again."
        )
    return [index.parent / name for name in names]


def open_tensors(files: list[Path]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every tensor of some safetensors files, by name, and the files' metadata. Nothing but headers is read.

    Raises `CheckpointError` for a file that is damaged, no safetensors file, or holds quantised weights.
    """
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        file = _open(path)
        metadata |= file.metadata() or {}
        odd: dict[str, str] = {}
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            part = file.get_slice(name)
            if name in entries:
                raise CheckpointError(f"{path}: tensor {name} is in another shard too; download the folder again")
            if part.get_dtype() in DTYPES:
                entries[name] = Entry(file, name, DTYPES[part.get_dtype()], tuple(part.get_shape()))
            else:
                odd[name] = part.get_dtype()
        if odd:
            raise quantised(path, f"{len(odd)} tensors of {'/'.join(sorted(set(odd.values())))}: {few(odd)}")
    return entries, metadata


def quantised(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantised weights, which are not supported ({what})\n"
        "Get the model's bfloat16, float16 or float32 safetensors."
    )


def _open(path: Path) -> Any:
    refuse_pickle(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    if start.startswith(b"GGUF"):
        raise quantised(path, "a GGUF file")
    again = "Download or copy it again."
    if not start:
        raise CheckpointError(f"{path}: empty (0 bytes)\n{again}")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights\nRun `git lfs pull` in its folder.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: truncated or corrupt: {path.stat().st_size:,} bytes that are no complete safetensors file "
            f"({first_line(error)})\n{again}"
        ) from None
