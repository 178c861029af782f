"""What a path or hub id holds: a Diffusers pipeline folder, one network's folder, or a file of the original release."""

from collections.abc import Collection
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fluxlab.checkpoints.errors import CheckpointError, few
from fluxlab.checkpoints.files import PICKLES, open_tensors, quantised, read_json, refuse_pickle, weight_files
from fluxlab.checkpoints.hub import fetch, is_hub_id
from fluxlab.checkpoints.params import AUTOENCODER_CLASS, TRANSFORMER_CLASS, check_class

STEM = "diffusion_pytorch_model"
FOLDERS = {"transformer": "transformer", "autoencoder": "vae"}
CLASSES = {"transformer": TRANSFORMER_CLASS, "autoencoder": AUTOENCODER_CLASS}
PREFIXES = {"transformer": ("", "model.diffusion_model."), "autoencoder": ("", "vae.", "first_stage_model.")}
"""Before a tensor's name: nothing in the original files, a prefix in all-in-one files that other tools write."""
_SIGNS = {"transformer": "img_in.weight", "autoencoder": "encoder.conv_in.weight"}


@dataclass(frozen=True)
class Found:
    """kind: "pipeline" (a Diffusers folder with everything), "transformer", "autoencoder" (one network: a folder or a
    file) or "originals" (a folder of original files). path: on this machine, so a hub id has been fetched."""

    kind: str
    path: Path


@dataclass(frozen=True)
class Network:
    """The files of one network. layout: "diffusers" (`path` is the folder with config.json) or "bfl" (one file)."""

    layout: str
    path: Path
    files: list[Path]


def find(path: "str | PathLike[str]", variant: str | None = None) -> Found:
    """What `path` (a folder, a file or a hub id, of which everything that a pipeline needs is fetched) holds.

    Raises `CheckpointError` if it does not exist, holds no FLUX.1 checkpoint, or cannot be fetched.
    """
    root = resolve(path, ("transformer", "autoencoder", "text", "settings"), variant)
    if root.is_file():
        return Found(classify(root) or _no_network(root), root)
    if (root / "config.json").is_file() and not (root / "model_index.json").is_file():
        name = read_json(root / "config.json").get("_class_name")
        for part, class_name in CLASSES.items():
            if name == class_name:
                return Found(part, root)
        check_class({"_class_name": name}, TRANSFORMER_CLASS, root / "config.json")
    if (root / "transformer" / "config.json").is_file():
        return Found("pipeline", root)
    if not (root / "model_index.json").is_file() and any(kind for _, kind in _originals(root)):
        return Found("originals", root)
    raise _no_checkpoint(root, "transformer")


def find_network(path: "str | PathLike[str]", part: str, variant: str | None = None) -> Network:
    """The files of the "transformer" or the "autoencoder" at `path`. Raises `CheckpointError` as `find` does."""
    root = resolve(path, (part,), variant)
    if root.is_file():
        return Network("bfl", root, [root])
    for folder in (root / FOLDERS[part], root):
        if (folder / "config.json").is_file():
            check_class(read_json(folder / "config.json"), CLASSES[part], folder / "config.json")
            return Network("diffusers", folder, weight_files(folder, STEM, variant))
    if (root / FOLDERS[part]).is_dir():
        raise CheckpointError(f"{root / FOLDERS[part]}: no config.json beside its weights; download or copy it again")
    fitting = [] if (root / "model_index.json").is_file() else [f for f, kind in _originals(root) if kind == part]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{root}: {len(fitting)} {part} files: {few([f.name for f in fitting])}\nPass one of them."
        )
    if not fitting:
        raise _no_checkpoint(root, part)
    return Network("bfl", fitting[0], fitting)


def resolve(path: "str | PathLike[str]", parts: tuple[str, ...], variant: str | None) -> Path:
    """`path` on this machine; for a hub id, what `parts` of it need is fetched first."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        refuse_pickle(local)
        if local.suffix.lower() == ".gguf":
            raise quantised(local, "a GGUF file")
        if local.suffix != ".safetensors":
            hint = "pass the folder it lies in" if local.suffix == ".json" else "a .safetensors file is needed"
            raise CheckpointError(f"{local}: not a checkpoint file; {hint}")
        return local
    if isinstance(path, str) and is_hub_id(path):
        return fetch(path, parts, variant)
    parent = next((p for p in local.parents if p.exists()), Path())
    raise CheckpointError(
        f"{path}: no such path ({parent} exists)\nPass a folder, a .safetensors file, or a hub id such as owner/name."
    )


def classify(file: Path) -> str | None:
    """Which network a file of the original release holds, by its tensors' names; None for neither."""
    return classify_names(open_tensors([file])[0])


def classify_names(names: Collection[str]) -> str | None:
    return next((part for part, sign in _SIGNS.items() if any(p + sign in names for p in PREFIXES[part])), None)


def _originals(root: Path) -> list[tuple[Path, str | None]]:
    """The safetensors files of a folder and what each holds. A damaged one counts only where there is no other."""
    found, errors = [], []
    for file in sorted(file for file in root.glob("*.safetensors") if file.is_file()):
        try:
            found.append((file, classify(file)))
        except CheckpointError as error:
            errors.append(error)
    if errors and not any(kind for _, kind in found):
        raise errors[0]
    return found


def _no_network(file: Path) -> str:
    if (file.parent / "config.json").is_file():
        raise CheckpointError(f"{file}: one file of a Diffusers folder\nPass the folder: {file.parent}")
    raise CheckpointError(
        f"{file}: neither FLUX.1's transformer nor its autoencoder (looked for {' and '.join(_SIGNS.values())})\n"
        "Pass flux1-….safetensors or ae.safetensors of the original release, or a Diffusers folder."
    )


def _no_checkpoint(root: Path, part: str) -> CheckpointError:
    if (root / "model_index.json").is_file():
        name = read_json(root / "model_index.json").get("_class_name")
        return CheckpointError(
            f"{root}: a {name} folder without {FOLDERS[part]}/config.json\n"
            "A FLUX.1 pipeline folder is needed, complete."
        )
    names = [p.name for p in sorted(root.iterdir())]
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        return CheckpointError(
            f"{root}: holds pickles only ({few(pickles)}), which can run any code when loaded, so they are refused\n"
            "Get the model's .safetensors files."
        )
    return CheckpointError(
        f"{root}: no {part} checkpoint in this folder ({f'it holds {few(names)}' if names else 'it is empty'})\n"
        f"Looked for model_index.json, {FOLDERS[part]}/config.json, config.json and original .safetensors files."
    )
