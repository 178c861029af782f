"""What a path or hub id holds: a Diffusers pipeline folder, one network's folder, or a file of the original release."""

from collections.abc import Iterable
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
_PREFIXES = {"transformer": ("", "model.diffusion_model."), "autoencoder": ("", "vae.", "first_stage_model.")}
"""Before a tensor's name: nothing in the original files, a prefix in all-in-one files that other tools write."""
_SIGNS = {
    "transformer": ("double_blocks.", "single_blocks.", "img_in."),
    "autoencoder": ("encoder.down.", "decoder.up."),
}


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
        names = open_tensors([root])[0]
        held = networks(names)
        if not held:
            raise no_network(root, "transformer", names)
        return Found(next(iter(held)), root)
    if (root / "config.json").is_file() and not (root / "model_index.json").is_file():
        name = read_json(root / "config.json").get("_class_name")
        for part, class_name in CLASSES.items():
            if name == class_name:
                return Found(part, root)
        check_class({"_class_name": name}, TRANSFORMER_CLASS, root / "config.json")
    if (root / "transformer" / "config.json").is_file():
        return Found("pipeline", root)
    if not (root / "model_index.json").is_file() and any(_originals(root).values()):
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
    fitting = (
        []
        if (root / "model_index.json").is_file()
        else [file for file, held in _originals(root).items() if part in held]
    )
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


def networks(names: Iterable[str]) -> dict[str, str]:
    """Which networks a file in the original layout holds, and the prefix of each one's names."""
    found: dict[str, str] = {}
    for name in names:
        for part, signs in _SIGNS.items():
            for prefix in _PREFIXES[part]:
                if name.startswith(prefix) and name.removeprefix(prefix).startswith(signs):
                    found[part] = prefix
    return found


def no_network(file: Path, part: str, names: Iterable[str]) -> CheckpointError:
    """What to say of a file in the original layout that does not hold the network asked for."""
    others = networks(names)
    if others:
        other = next(iter(others))
        return CheckpointError(f"{file}: holds FLUX.1's {other}, not its {part}\nload_{other} reads this one.")
    if (file.parent / "config.json").is_file():
        return CheckpointError(f"{file}: one file of a Diffusers folder\nPass the folder: {file.parent}")
    return CheckpointError(
        f"{file}: holds neither FLUX.1's transformer nor its autoencoder; looked for tensors named double_blocks.…, "
        "single_blocks.…, encoder.down.…, decoder.up.…\n"
        "Pass flux1-….safetensors or ae.safetensors of the original release, or a Diffusers folder."
    )


def _originals(root: Path) -> dict[Path, dict[str, str]]:
    """The safetensors files of a folder and what each holds. A damaged one counts only where there is no other."""
    found, errors = {}, []
    for file in sorted(file for file in root.glob("*.safetensors") if file.is_file()):
        try:
            found[file] = networks(open_tensors([file])[0])
        except CheckpointError as error:
            errors.append(error)
    if errors and not any(found.values()):
        raise errors[0]
    return found


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
