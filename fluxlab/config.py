"""Where the configs are, and the schema of a model row."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from fluxlab.errors import UserError, nearest, show
from fluxlab.settings import DTYPES

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Lora:
    """A LoRA that is merged into the transformer when a model is loaded.

    path: a .safetensors file, a folder that holds one, or a hub id with its file (owner/name/file.safetensors).
    scale: factor of what it adds. It may be negative.
    text_encoders: "error", or "ignore" to leave out what the file has for the text encoders, which are not changed.
    """

    path: str
    scale: float = 1.0
    text_encoders: str = "error"


def read_loras(value: Any, where: str = "lora") -> tuple[Lora, ...]:
    """Return the LoRAs of a config: a list of {path, scale, text_encoders}, or of paths; one needs no list.

    Raises UserError naming the key, its value and what is expected.
    """
    if value is None:
        return ()
    if isinstance(value, str | PathLike | Mapping | Lora):
        return (_read_lora(value, where),)
    if not isinstance(value, Sequence):
        raise UserError(f"{where}={show(value)}: expected a list such as [{{path: style.safetensors, scale: 0.8}}]")
    return tuple(_read_lora(part, f"{where}[{i}]") for i, part in enumerate(value))


def _read_lora(value: Any, where: str) -> Lora:
    if isinstance(value, Lora):
        value = asdict(value)
    elif not isinstance(value, Mapping):
        value = {"path": value}
    known = [f.name for f in fields(Lora)]
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}, expected {', '.join(known)}{nearest(unknown[0], known)}")
    path, scale = value.get("path"), value.get("scale", 1.0)
    if not isinstance(path, str | PathLike) or not str(path):
        raise UserError(
            f"{where}.path={show(path)}: expected a .safetensors file, a folder that holds one, or a hub id"
        )
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise UserError(f"{where}.scale={show(scale)}: expected a finite number")
    encoders = value.get("text_encoders", "error")
    if encoders not in ("error", "ignore"):
        raise UserError(f"{where}.text_encoders={show(encoders)}: expected error or ignore")
    return Lora(str(path), float(scale), encoders)


@dataclass(frozen=True)
class ModelRow:
    """One file of `configs/model`: where a model is, and the settings it was made for. None means: as its files say.

    path: a Diffusers folder, a single file, a folder of single files, or a hub id; `fluxlab/…` is inside the package.
    variant: of weight files, such as fp16.
    autoencoder, text, tokenizers: paths of the parts that `path` does not hold.
    like: the published model that a single file samples like, if the file does not say: of FLUX.1 "dev" or "schnell".
    schedule: how times are spread, such as {shift: 3.0}, {mu: 1.15} or the keys of Diffusers' scheduler_config.json.
    size: (height, width) in pixels.
    scenes: trained on `fluxlab.scenes`, so that the scene oracle can read its images.
    lora: what is merged into the transformer, in order.
    references: trained with reference images.
    true_cfg: scale of classifier-free guidance, for a model that needs it.
    dtype: "float32", "bfloat16" or "float16", what it is computed in if a run does not say.
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
    tokenizers: str | None = None
    like: str | None = None
    schedule: Mapping[str, Any] | None = None
    lora: tuple[Lora, ...] | None = None
    references: bool = False
    true_cfg: float | None = None
    dtype: str | None = None

    def values(self) -> dict[str, Any]:
        """Return the row as plain values. Keys that older stores do not know are left out unless they are set."""
        loras = [asdict(lora) for lora in self.lora] if self.lora else None
        values = {**asdict(self), "size": list(self.size) if self.size else None, "lora": loras}
        return {key: value for key, value in values.items() if key not in _LATER or value}


_LATER = ("tokenizers", "like", "schedule", "lora", "references", "true_cfg", "dtype")


def with_loras(row: ModelRow, lora: Any) -> ModelRow:
    """Return the row with further LoRAs, given as in `read_loras`."""
    return replace(row, lora=(*(row.lora or ()), *read_loras(lora)) or None)


def config_folder() -> Path:
    """Return the folder of `config.yaml`: inside the package in a wheel, next to it in a checkout."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs/config.yaml in {PACKAGE} or {PACKAGE.parent}: the installation is incomplete")


def model_names() -> list[str]:
    """Return the names of the rows under `configs/model`."""
    return sorted(file.stem for file in (config_folder() / "model").glob("*.yaml"))


def find_row(name: str | PathLike[str]) -> ModelRow:
    """Return the row called `name`, or for a path or hub id a row that holds just that.

    Raises UserError for a word that is neither.
    """
    if str(name) not in model_names():
        if re.fullmatch(r"[\w-]+", str(name)) and not Path(name).exists():
            raise UserError(
                f"model {name!r}: not a model under configs/model, which are {', '.join(model_names())}"
                f"{nearest(name, model_names())}\n"
                "Or pass a folder, a .safetensors file, or a hub id such as owner/name."
            )
        return ModelRow(name=str(name), path=str(name))
    from omegaconf import OmegaConf

    file = config_folder() / "model" / f"{name}.yaml"
    return model_row(OmegaConf.to_container(OmegaConf.load(file)), str(file))


def model_row(values: Mapping[str, Any], where: str) -> ModelRow:
    """Return a row from its YAML keys. Raises UserError naming `where`, the key and its value."""
    known = [f.name for f in fields(ModelRow)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r}, expected some of {', '.join(known)}{nearest(unknown[0], known)}"
        )
    if not values.get("path"):
        raise UserError(f"{where}: path is missing (a folder, a file or a hub id)")
    for key in ("path", "variant", "autoencoder", "text", "tokenizers"):
        if not isinstance(values.get(key), str | None):
            raise UserError(f"{where}: {key} {values[key]!r}, expected text; quote it: {key}='\"{values[key]}\"'")
    size = values.get("size")
    if size is not None and not (
        isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise UserError(f"{where}: size {size!r}, expected [height, width] in pixels")
    true_cfg = values.get("true_cfg")
    if isinstance(true_cfg, bool) or not isinstance(true_cfg, Real | None):
        raise UserError(f"{where}: true_cfg {true_cfg!r}, expected a number, such as 4")
    if values.get("dtype") not in (None, *DTYPES):
        raise UserError(f"{where}: dtype {values['dtype']!r}, expected one of {', '.join(DTYPES)}")
    path = values["path"]
    if path.startswith("fluxlab/"):
        path = str(PACKAGE.parent / path)
    loras = read_loras(values.get("lora"), f"{where}: lora") or None
    return ModelRow(**{**values, "path": path, "size": tuple(size) if size else None, "lora": loras})
