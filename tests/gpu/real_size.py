"""Pipelines of FLUX.1's real sizes without weights, for the pretended device."""

from functools import cache

import torch
from torch import nn

from fluxlab.checkpoints.random import tokenizers
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, AutoEncoder, Flux
from fluxlab.model.text import TextEncoders
from fluxlab.pipeline import Pipeline
from fluxlab.sampling import Schedule
from tests.tiny import WORDS


@cache
def on_meta() -> dict[str, nn.Module]:
    """Return the networks of dev and schnell with the text encoders, on the meta device, in bf16."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )
    t5 = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        made = {
            "dev": Flux(TRANSFORMERS["dev"]),
            "schnell": Flux(TRANSFORMERS["schnell"]),
            "autoencoder": AutoEncoder(AUTOENCODERS["flux1"]),
            "clip": CLIPTextModel(clip),
            "t5": T5EncoderModel(t5),
        }
    return {name: module.to(torch.bfloat16).eval().requires_grad_(False) for name, module in made.items()}


def pipeline(name: str, device: str) -> Pipeline:
    """Return FLUX.1 `name`, with shapes only, on a pretended device."""
    import copy

    def placed(part: str) -> nn.Module:
        return copy.deepcopy(on_meta()[part]).to_empty(device=device)

    clip_tokenizer, t5_tokenizer = tokenizers(WORDS)
    text = TextEncoders(clip_tokenizer, placed("clip"), t5_tokenizer, placed("t5"))
    schnell = name == "schnell"
    return Pipeline(
        placed(name),
        placed("autoencoder"),
        text,
        Schedule(use_dynamic_shifting=not schnell),
        steps=4 if schnell else 28,
        guidance=None if schnell else 3.5,
        max_sequence_length=256 if schnell else 512,
        size=(1024, 1024),
        name=name,
    )
