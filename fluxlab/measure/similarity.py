"""Similarity of images by CLIP or DINO, with a checkpoint that the user names. Nothing is downloaded without one.

Images are prepared here with PIL, as the checkpoint's preprocessor_config.json says, because the image processors that
transformers chooses by default need torchvision.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxlab.checkpoints.errors import CheckpointError, few, first_line
from fluxlab.checkpoints.files import read_json, weight_files
from fluxlab.checkpoints.hub import is_hub_id, snapshot
from fluxlab.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer, PreTrainedModel

TYPES = {"clip": ("clip",), "dino": ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")}
"""model_type of the checkpoints of each kind. The first DINO is a plain ViT."""
_EXAMPLES = {"clip": "openai/clip-vit-large-patch14", "dino": "facebook/dinov2-base"}
_MEAN_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors")
_FILES += (
    "model-[0-9]*-of-[0-9]*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
)
_UNUSED = re.compile(r"(classifier|pooler)\..*|.*\.position_ids")  # heads above the embedding, and position indices


class Preparation(NamedTuple):
    """How images are prepared for a model.

    resize: (height, width) in px, or the shorter side. crop: (height, width) of the middle, or None. resample: PIL's
    number of the filter. scale: factor for values in 0 ... 255. mean, std: of the scaled values, per channel.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Similarity:
    """A CLIP or DINO model from a folder or a hub id (owner/name, owner/name@revision).

    kind: "clip" or "dino" (also DINOv2 and DINOv3). batch: images per forward. Raises UserError for another kind, a
    checkpoint of another model, missing, damaged or incomplete files, and if the hub cannot be reached.
    """

    def __init__(
        self, checkpoint: str | Path, kind: str, device: "str | torch.device" = "cpu", batch: int = 16
    ) -> None:
        if kind not in TYPES:
            raise UserError(f"kind={kind!r}: expected one of {', '.join(TYPES)}")
        if batch < 1:
            raise UserError(f"batch={batch!r}: expected at least 1")
        folder = _folder(checkpoint, kind)
        config = _config(folder, kind)
        self.kind, self.batch = kind, batch
        self.preparation = read_preparation(folder, kind, config)
        self.model = _model(folder, config["model_type"]).to(device)
        self.tokenizer = _tokenizer(folder) if kind == "clip" else None

    def image(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return the unit vectors of uint8 (H, W, 3) images, float32 (n, d). Sizes may differ."""
        import torch

        batches = []
        for start in range(0, len(images), self.batch):
            pixels = torch.from_numpy(prepare(images[start : start + self.batch], self.preparation))
            with torch.inference_mode():
                if self.kind == "clip":
                    vectors = self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output
                else:
                    vectors = self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state[:, 0]
            batches.append(_unit(vectors))
        return np.concatenate(batches) if batches else np.empty((0, 0), np.float32)

    def text(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the unit vectors of prompts, float32 (n, d). CLIP reads 77 tokens. Raises UserError for DINO."""
        import torch

        if self.tokenizer is None:
            raise UserError(f"kind={self.kind!r}: has no text encoder; prompts need kind='clip'")
        batches = []
        for start in range(0, len(prompts), self.batch):
            tokens = self.tokenizer(
                list(prompts[start : start + self.batch]),
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                vectors = self.model.get_text_features(**tokens).pooler_output
            batches.append(_unit(vectors))
        return np.concatenate(batches) if batches else np.empty((0, 0), np.float32)


def prepare(images: Sequence[np.ndarray], preparation: Preparation) -> np.ndarray:
    """Return uint8 (H, W, 3) images of any sizes, prepared for a model: float32 (n, 3, h, w)."""
    from PIL import Image

    made = []
    for pixels in images:
        image, resize = Image.fromarray(pixels), preparation.resize
        if isinstance(resize, int):  # the longer side is cut to whole pixels, not rounded, as transformers does
            short = min(image.size)
            width, height = (resize if side == short else int(resize * side / short) for side in image.size)
        else:
            height, width = resize
        values = np.asarray(image.resize((width, height), resample=preparation.resample), np.float32)
        if preparation.crop:
            top, left = ((side - kept) // 2 for side, kept in zip((height, width), preparation.crop, strict=True))
            values = values[top : top + preparation.crop[0], left : left + preparation.crop[1]]
        made.append(
            (values * np.float32(preparation.scale) - np.float32(preparation.mean)) / np.float32(preparation.std)
        )
    return np.stack(made).transpose(0, 3, 1, 2)


def read_preparation(folder: Path, kind: str, config: dict[str, Any]) -> Preparation:
    """Return how images are prepared for the checkpoint in a folder.

    As its preprocessor_config.json or processor_config.json says. Without one: the image size in its config.json,
    bicubic, with the kind's usual mean and deviation. Raises UserError for settings that are not supported, or that do
    not give the image size of the model.
    """
    trained = config.get("vision_config", config).get("image_size", 224)
    file, settings = _settings(folder)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.get(step, True):
            raise UserError(f"{file}: {step} is false; expected true: images are resized, scaled and normalised")
    cropped = settings.get("do_center_crop", kind == "clip")
    resize = _side(settings.get("size", trained), square=not cropped)
    crop = _side(settings.get("crop_size", trained), square=True) if cropped else None
    resized = (resize, resize) if isinstance(resize, int) else resize
    size = crop if cropped else resize
    if not (isinstance(size, tuple) and resized and size[0] <= resized[0] and size[1] <= resized[1]):
        raise UserError(
            f"{file}: size {settings.get('size')}, crop_size {settings.get('crop_size')}: expected a shorter side and "
            "a crop within it, or a height and a width"
        )
    if config["model_type"] in ("clip", "vit") and size != (trained, trained):
        raise UserError(
            f"{file}: gives images of {size[0]} x {size[1]} px, but the model expects {trained} x {trained}"
        )
    mean, std = _MEAN_STD[kind]
    return Preparation(
        resize,
        crop,
        int(settings.get("resample", 3)),
        float(settings.get("rescale_factor", 1 / 255)),
        tuple(settings.get("image_mean", mean)),
        tuple(settings.get("image_std", std)),
    )


def _side(value: Any, square: bool) -> int | tuple[int, int] | None:
    """Return a size as processors write it: a number (square, or the shorter side) or a mapping. None for others."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return value["height"], value["width"]
    return value["shortest_edge"] if isinstance(value, dict) and set(value) == {"shortest_edge"} else None


def _settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the settings of the image processor, and the settings; they may be empty."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            return folder / name, settings.get("image_processor", settings)
    return folder / "config.json", {}


def _folder(checkpoint: str | Path, kind: str) -> Path:
    """Return the folder of a checkpoint. The files of a hub id are downloaded unless they are in the hub's cache."""
    local = Path(checkpoint).expanduser()
    if local.is_dir():
        return local
    example = f"Pass the folder of a {kind.upper()} checkpoint or a hub id such as {_EXAMPLES[kind]}"
    if local.exists() or not is_hub_id(str(checkpoint)) or str(checkpoint).endswith(".safetensors"):
        raise UserError(f"{checkpoint}: no such folder\n{example}.")
    return snapshot(str(checkpoint), _FILES)


def _config(folder: Path, kind: str) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; pass the folder of a {kind.upper()} checkpoint as transformers saves it"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") not in TYPES[kind]:
        other = next((k for k, types in TYPES.items() if config.get("model_type") in types), None)
        raise UserError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, expected for {kind!r}: "
            f"{', '.join(TYPES[kind])}\n"
            + (
                f"This checkpoint is of the kind {other!r}."
                if other
                else f"Use a checkpoint such as {_EXAMPLES[kind]}."
            )
        )
    return config


def _model(folder: Path, model_type: str) -> "PreTrainedModel":
    import transformers
    from transformers.utils import logging

    weight_files(folder, "model")  # raises for missing files and for pickles
    cls = {"clip": transformers.CLIPModel, "vit": transformers.ViTModel}.get(model_type, transformers.AutoModel)
    options = {"add_pooling_layer": False} if model_type == "vit" else {}
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no table of unused keys; they are checked below
    try:
        model, info = cls.from_pretrained(
            folder, dtype="float32", use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # safetensors and transformers raise many types
        raise CheckpointError(
            f"{folder}: the {model_type} model cannot be loaded ({first_line(error)})\nDownload or copy it again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    wrong["unexpected"] = [name for name in wrong["unexpected"] if not _UNUSED.fullmatch(name)]
    if any(wrong.values()):
        problems = "; ".join(f"{len(names)} {kind} ({few(names, 3)})" for kind, names in wrong.items() if names)
        raise CheckpointError(
            f"{folder}: tensors {problems}\nThe file is incomplete, or of another model; download it again."
        )
    return model.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> "CLIPTokenizer":
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder}: no tokenizer (tokenizer.json, or vocab.json and merges.txt); download it again")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)}); download it again") from error


def _unit(vectors: "torch.Tensor") -> np.ndarray:
    import torch

    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()
