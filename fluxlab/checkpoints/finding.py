"""What a path or hub id holds: a Diffusers pipeline folder, the folder of one network, or single files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError, few
from fluxlab.checkpoints.files import (
    PICKLES,
    SUFFIXES,
    open_tensors,
    read_json,
    refuse_gguf,
    refuse_pickle,
    weight_files,
)
from fluxlab.checkpoints.hub import fetch, is_hub_id
from fluxlab.checkpoints.params import check_class, class_of
from fluxlab.checkpoints.recognise import NETWORKS, recognise

STEM = "diffusion_pytorch_model"
FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
"""Of the networks in a Diffusers pipeline folder."""
TITLES = {"transformer": "transformer", "autoencoder": "autoencoder", "clip": "CLIP text encoder", "t5": "T5 encoder"}
_LOADERS = {"clip": "load_text_encoders", "t5": "load_text_encoders"}
_SIZES_FROM_SHAPES = "flux1-….safetensors, ae.safetensors, clip_l.safetensors, t5xxl_….safetensors"


@dataclass(frozen=True)
class Found:
    """What is at a path.

    kind: "pipeline" (a Diffusers folder with everything), "transformer", "autoencoder" or "text" (a folder or file of
    one of them; an all-in-one file counts as its transformer) or "originals" (a folder of single files).
    path: on this machine; a hub id has been fetched. parts: the networks in it, of `NETWORKS`.
    """

    kind: str
    path: Path
    parts: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class NetworkFiles:
    """The files of one network. path: for messages. config: the config.json with its sizes, None for a single file."""

    path: Path
    files: list[Path]
    config: Path | None = None


def find(path: "str | PathLike[str]", variant: str | None = None) -> Found:
    """Return what `path` holds: a folder, a file, or a hub id, of which everything that a pipeline needs is fetched.

    Raises `CheckpointError` if it does not exist, holds no FLUX.1 checkpoint, or cannot be fetched.
    """
    root = resolve(path, ("transformer", "autoencoder", "text", "settings"), variant)
    if root.is_file():
        parts = networks(root)
        _refuse_shard(root)
        if not parts:
            raise no_network(root, "transformer", parts)
        return Found(next((p for p in ("transformer", "autoencoder") if p in parts), "text"), root, parts)
    if (root / "config.json").is_file() and not (root / "model_index.json").is_file():
        config = {"_class_name": read_json(root / "config.json").get("_class_name")}
        if found := class_of(config):
            return Found(found[1], root, frozenset([found[1]]))
        check_class(config, "transformer", root / "config.json")
    if (root / "transformer" / "config.json").is_file():
        return Found("pipeline", root, frozenset(NETWORKS))
    if not (root / "model_index.json").is_file() and (files := originals(root)):
        return Found("originals", root, frozenset().union(*files.values()))
    raise _no_checkpoint(root, "transformer")


def find_network(path: "str | PathLike[str]", part: str, variant: str | None = None) -> NetworkFiles:
    """Return the files of the "transformer" or the "autoencoder" at `path`. Raises `CheckpointError` as `find` does."""
    root = resolve(path, (part,), variant)
    if root.is_file():
        return _single_file(root, part)
    for folder in (root / FOLDERS[part], root):
        if (folder / "config.json").is_file():
            config = folder / "config.json"
            check_class(read_json(config), part, config)
            return NetworkFiles(folder, weight_files(folder, STEM, variant), config)
    if (root / FOLDERS[part]).is_dir():
        raise CheckpointError(f"{root / FOLDERS[part]}: no config.json next to its weights; download or copy it again")
    holding = {} if (root / "model_index.json").is_file() else originals(root)
    return NetworkFiles(*_the_one(root, part, holding))


def find_encoder(root: Path, part: str, variant: str | None = None) -> NetworkFiles | None:
    """Return the files of "clip" or "t5" at a folder or file; None if there are none.

    A Diffusers folder has a folder for each; elsewhere single files are recognised by their contents. Of a file, the
    encoder that it lacks is looked for next to it.
    """
    if root.is_file():
        if part in networks(root):
            return NetworkFiles(root, [root])
        root = root.parent
    folder = root / FOLDERS[part]
    if folder.is_dir():
        read_json(folder / "config.json")  # a missing one is reported before missing weights
        return NetworkFiles(folder, weight_files(folder, "model", variant), folder / "config.json")
    if (root / "model_index.json").is_file():
        return None
    holding = originals(root)
    return NetworkFiles(*_the_one(root, part, holding)) if any(part in held for held in holding.values()) else None


def resolve(path: "str | PathLike[str]", parts: tuple[str, ...], variant: str | None) -> Path:
    """Return `path` on this machine; for a hub id, what `parts` of it need is fetched first."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        refuse_pickle(local)
        refuse_gguf(local, b"")
        if local.suffix.lower() not in SUFFIXES:
            hint = "pass the folder it lies in" if local.suffix == ".json" else "expected a .safetensors file"
            raise CheckpointError(f"{local}: not a checkpoint file; {hint}")
        return local
    if isinstance(path, str) and is_hub_id(path):
        return fetch(path, parts, variant)
    parent = next((p for p in local.parents if p.exists()), Path())
    raise CheckpointError(
        f"{path}: no such path ({parent} exists)\nPass a folder, a .safetensors file, or a hub id such as owner/name."
    )


def networks(file: Path) -> frozenset[str]:
    """Return which networks a file holds. Raises `CheckpointError` if it is damaged or of another model."""
    return frozenset(recognise(open_tensors([file])[0], file).networks)


def originals(root: Path) -> dict[Path, frozenset[str]]:
    """Return the single files of a folder that hold networks, and which. Other files matter only if there are none."""
    holding, errors = {}, []
    for file in sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()):
        try:
            holding[file] = networks(file)
        except CheckpointError as error:
            errors.append(error)
    holding = {file: parts for file, parts in holding.items() if parts}
    if errors and not holding:
        raise errors[0]
    return holding


def no_network(file: Path, part: str, held: frozenset[str]) -> CheckpointError:
    """Return the error for a file that does not hold the network asked for."""
    if held:
        other = next(name for name in NETWORKS if name in held)
        reader = _LOADERS.get(other, f"load_{other}")
        return CheckpointError(
            f"{file}: holds FLUX.1's {TITLES[other]}, not its {TITLES[part]}\n{reader} reads this one."
        )
    if (file.parent / "config.json").is_file():
        return CheckpointError(f"{file}: one file of a Diffusers folder\nPass the folder: {file.parent}")
    return CheckpointError(
        f"{file}: no part of FLUX.1 is recognised by its tensor names; expected {_SIZES_FROM_SHAPES} "
        "or a Diffusers folder"
    )


def _single_file(file: Path, part: str) -> NetworkFiles:
    """A file, with the config.json next to it if it is the only weight file of a Diffusers folder."""
    held, config = networks(file), file.parent / "config.json"
    _refuse_shard(file)
    if part in held and file.name.startswith(STEM) and config.is_file():
        check_class(read_json(config), part, config)
        return NetworkFiles(file, [file], config)
    if part not in held:
        raise no_network(file, part, held)
    return NetworkFiles(file, [file])


def _refuse_shard(file: Path) -> None:
    if "-of-" in file.name and (file.parent / "config.json").is_file():
        raise CheckpointError(f"{file}: one file of a Diffusers folder\nPass the folder: {file.parent}")


def _the_one(root: Path, part: str, holding: Mapping[Path, frozenset[str]]) -> tuple[Path, list[Path]]:
    fitting = [file for file, parts in holding.items() if part in parts]
    if len(fitting) > 1:
        names = few([file.name for file in fitting])
        raise CheckpointError(f"{root}: {len(fitting)} {TITLES[part]} files: {names}\nPass one of them.")
    if not fitting:
        raise _no_checkpoint(root, part)
    return fitting[0], fitting


def _no_checkpoint(root: Path, part: str) -> CheckpointError:
    if (root / "model_index.json").is_file():
        name = read_json(root / "model_index.json").get("_class_name")
        return CheckpointError(
            f"{root}: a {name} folder without {FOLDERS[part]}/config.json\nExpected a complete FLUX.1 pipeline folder."
        )
    names = [p.name for p in sorted(root.iterdir())]
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        return CheckpointError(
            f"{root}: holds pickles only ({few(pickles)}), which can run any code when loaded, so they are refused\n"
            "Get the model's .safetensors files."
        )
    holds = f"it holds {few(names)}" if names else "it is empty"
    return CheckpointError(
        f"{root}: no {TITLES[part]} checkpoint in this folder ({holds})\n"
        f"Looked for model_index.json, {FOLDERS[part]}/config.json, config.json and original .safetensors files."
    )
