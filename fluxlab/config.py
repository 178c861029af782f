"""Where the configs lie, and the schema of what they hold."""

import re
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path

from fluxlab.errors import UserError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class ModelRow:
    """One file of `configs/model`: where a model is, and the settings it was made for (None: told by its files).

    path: a Diffusers folder, a BFL single file or a hub id; `fluxlab/…` lies inside the package. autoencoder, text: for
    a single file, what it lacks. size: (height, width) in pixels. scenes: trained on `fluxlab.scenes`, so that the
    scene oracle can judge its pictures.
    """

    name: str
    path: str
    variant: str | None = None
    autoencoder: str | None = None
    text: str | None = None
    steps: int | None = None
    guidance: float | None = None
    max_sequence_length: int | None = None
    size: tuple[int, int] | None = None
    scenes: bool = False


def config_folder() -> Path:
    """The folder of `config.yaml`: inside the package in a wheel, beside it in a checkout."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs/config.yaml in {PACKAGE} or {PACKAGE.parent}: the installation is incomplete")


def model_names() -> list[str]:
    return sorted(file.stem for file in (config_folder() / "model").glob("*.yaml"))


def find_row(name: str | PathLike[str]) -> ModelRow:
    """The row called `name`, or for a path or hub id a row that holds just that. `UserError` for an unknown word."""
    if str(name) not in model_names():
        if re.fullmatch(r"[\w-]+", str(name)) and not Path(name).exists():
            raise UserError(
                f"model {name!r}: there is none; known: {', '.join(model_names())}.\n"
                "Or pass a folder, a .safetensors file, or a hub id such as owner/name."
            )
        return ModelRow(name=str(name), path=str(name))
    from omegaconf import OmegaConf

    file = config_folder() / "model" / f"{name}.yaml"
    return model_row(OmegaConf.to_container(OmegaConf.load(file)), str(file))


def model_row(values: dict, where: str) -> ModelRow:
    """A row from its YAML keys. Raises `UserError` naming `where`, the key and its value."""
    known = [f.name for f in fields(ModelRow)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}, expected some of {', '.join(known)}")
    if not values.get("path"):
        raise UserError(f"{where}: path is missing (a folder, a file or a hub id)")
    size = values.get("size")
    if size is not None and not (
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise UserError(f"{where}: size {size!r}, expected [height, width] in pixels")
    path = values["path"]
    if path.startswith("fluxlab/"):
        path = str(PACKAGE.parent / path)
    return ModelRow(**{**values, "path": path, "size": tuple(size) if size else None})
