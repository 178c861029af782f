"""A text encoder as its files describe it: tensors and sizes. No weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxlab.checkpoints.errors import CheckpointError, first_line, quantised
from fluxlab.checkpoints.files import Entry, open_tensors, read_json
from fluxlab.checkpoints.finding import TITLES, NetworkFiles, find_encoder, no_network
from fluxlab.checkpoints.recognise import recognise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ENCODERS = ("clip", "t5")
CLASSES = {"clip": "CLIPTextModel", "t5": "T5EncoderModel"}
_MODEL_TYPES = {"clip": ("clip_text_model", "clip"), "t5": ("t5",)}

CLIP_HEAD = 64
"""Channels of an attention head in every published CLIP; shapes do not give it."""
_T5_MAX_DISTANCE = 128  # of relative positions, in every published T5; shapes do not give it


@dataclass(frozen=True)
class OpenEncoder:
    """A text encoder in open files. entries: by the names that every release of transformers reads. config: the values
    of its config.json, or what the shapes of a single file give."""

    part: str
    path: Path
    files: list[Path]
    entries: dict[str, Entry]
    unknown: tuple[str, ...]
    config: dict[str, Any]


def open_encoder(root: Path, part: str, variant: str | None = None) -> OpenEncoder | None:
    """Open "clip" or "t5" at a folder or file; None if there is none.

    Raises `CheckpointError` for damaged or quantised files and for other models.
    """
    found = find_encoder(root, part, variant)
    if found is None:
        return None
    config = _config(found, part) if found.config else None
    entries, _ = open_tensors(found.files)
    contents = recognise(entries, found.path)
    if part not in contents.networks:
        raise no_network(found.files[0], part, frozenset(contents.networks))
    tensors = contents.networks[part].tensors
    if config is None:
        shapes = {name: entry.shape for name, entry in tensors.items()}
        config = (clip_config if part == "clip" else t5_config)(shapes, found.path)
    return OpenEncoder(part, found.path, found.files, tensors, contents.unknown, config)


def config_of(encoder: OpenEncoder) -> "PreTrainedConfig":
    """Return the transformers config of an encoder."""
    from transformers import CLIPTextConfig, T5Config

    cls = CLIPTextConfig if encoder.part == "clip" else T5Config
    try:
        return cls.from_dict(encoder.config)
    except Exception as error:  # transformers validates with errors of its own
        raise CheckpointError(f"{encoder.path}: not a {CLASSES[encoder.part]} config ({first_line(error)})") from error


def clip_config(shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, Any]:
    """Return the config of a CLIP text model with these shapes; what shapes do not give is as in OpenAI's CLIP-L."""
    try:
        vocab, width = shapes["text_model.embeddings.token_embedding.weight"]
        positions = shapes["text_model.embeddings.position_embedding.weight"][0]
        inner = shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError, ValueError):
        raise incomplete(where, "clip") from None
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers."),
        # narrower than any published CLIP: the toy models of `checkpoints.random` have two heads
        "num_attention_heads": 2 if width % CLIP_HEAD else width // CLIP_HEAD,
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "eos_token_id": 2,  # transformers then pools at the largest id, which is CLIP's end mark
    }


def t5_config(shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, Any]:
    """Return the config of a T5 encoder with these shapes; the feed-forward layer decides between T5 1.0 and 1.1."""
    block = "encoder.block.0.layer"
    try:
        vocab, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"]
        inner = shapes[f"{block}.0.SelfAttention.q.weight"][0]
        gated = f"{block}.1.DenseReluDense.wi_0.weight" in shapes
        ff = shapes[f"{block}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    except (KeyError, IndexError, ValueError):
        raise incomplete(where, "t5") from None
    return {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": inner // max(heads, 1),
        "d_ff": ff,
        "num_layers": _count(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": _T5_MAX_DISTANCE,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
    }


def _config(found: NetworkFiles, part: str) -> dict[str, Any]:
    config = read_json(found.config)
    expected = _MODEL_TYPES[part]
    if config.get("model_type") not in expected:
        raise CheckpointError(
            f"{found.config}: model_type is {config.get('model_type')!r}, expected {expected[0]!r}\n"
            "Pass a FLUX.1 checkpoint."
        )
    if config.get("quantization_config"):
        raise quantised(found.config, "quantization_config")
    text = config.get("text_config")  # a whole CLIP, with its image encoder
    return text if isinstance(text, dict) else config


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)]
    return max(numbers, default=-1) + 1


def incomplete(where: Path, part: str) -> CheckpointError:
    """Return the error for an encoder without embeddings or first layer."""
    return CheckpointError(
        f"{where}: the {TITLES[part]}'s embeddings or first layer are missing, so its sizes are unknown\n"
        "The file is incomplete; download it again."
    )
