"""Text encoders of FLUX.1 as `fluxlab.model` has them, which are loaded without the import of transformers."""

from collections.abc import Mapping
from typing import Any

import torch

from fluxlab.checkpoints.casting import check_finite
from fluxlab.checkpoints.encoders import OpenEncoder
from fluxlab.checkpoints.read import check_tensors
from fluxlab.model.clip import ACTIVATIONS, ClipText
from fluxlab.model.t5 import FEED_FORWARD, FP32_IN_FP16, T5Encoder

_CLIP = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
_T5 = "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets relative_attention_max_distance"
_SIZES = {"clip": [*_CLIP.split(), "eos_token_id"], "t5": _T5.split()}
_EPS = {"clip": "layer_norm_eps", "t5": "layer_norm_epsilon"}


def load_network(encoder: OpenEncoder, dtype: torch.dtype, check: bool) -> ClipText | T5Encoder | None:
    """Return an encoder on the CPU, its weights mapped if they have the dtype. None for a config that only transformers
    knows, such as one with another activation.

    check: that weights are finite. Otherwise only those that are cast. Raises `CheckpointError` for other tensors than
    those of the config.
    """
    if not _known(encoder.part, encoder.config):
        return None
    with torch.device("meta"):
        network = (ClipText if encoder.part == "clip" else T5Encoder)(encoder.config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    check_tensors(encoder.entries, expected, encoder.unknown, encoder.path)
    weights = {}
    for name, entry in encoder.entries.items():
        keeps = dtype == torch.float16 and encoder.part == "t5" and name.endswith(FP32_IN_FP16)
        stored = entry.read()
        weights[name] = stored.reshape(expected[name]).to(torch.float32 if keeps else dtype)
        if check or weights[name].dtype != entry.dtype:
            check_finite(weights[name], [(entry.name, stored)], encoder.path)
    network.load_state_dict(weights, assign=True)
    return network


def _known(part: str, config: Mapping[str, Any]) -> bool:
    """Return whether a network of this config is in `fluxlab.model`, and has sizes that fit together."""
    sizes = [config.get(name) for name in _SIZES[part]]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or not isinstance(config.get(_EPS[part]), float):
        return False
    if part == "clip":
        return config.get("hidden_act") in ACTIVATIONS and config["hidden_size"] % config["num_attention_heads"] == 0
    return (
        config.get("feed_forward_proj") in FEED_FORWARD
        and not config.get("is_decoder")
        and config["relative_attention_num_buckets"] >= 4
        and config["relative_attention_max_distance"] > config["relative_attention_num_buckets"] // 4
    )
