"""Pipelines of real sizes without weights, for the pretended device."""

from functools import cache

import torch
from torch import nn

from fluxlab.checkpoints.random import tokenizers
from fluxlab.families.flux2 import SCHEDULE as FLUX2_SCHEDULE
from fluxlab.model import AUTOENCODERS, TRANSFORMERS, TRANSFORMERS2, AutoEncoder, AutoEncoder2, Flux, Flux2
from fluxlab.model.text import TextEncoders
from fluxlab.model.text2 import LanguageModelText
from fluxlab.pipeline import Pipeline
from fluxlab.sampling import Schedule
from tests import tiny2
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


def language_model(kind: str, width: int) -> nn.Module:
    """Return the language model of FLUX.2 [klein] ("qwen3", 4B or 8B by its width) or [dev] ("mistral3"), on the meta
    device. The image tower of Mistral, which is never called, is small."""
    import transformers as t

    sizes = {"hidden_size": width, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    if kind == "qwen3":
        inner = {2560: 9728, 4096: 12288}[width]
        config = t.Qwen3Config(
            vocab_size=151936, intermediate_size=inner, num_hidden_layers=36, tie_word_embeddings=True, **sizes
        )
        return t.Qwen3ForCausalLM(config)
    text = t.MistralConfig(vocab_size=131072, intermediate_size=32768, num_hidden_layers=40, **sizes)
    vision = t.PixtralVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return t.Mistral3ForConditionalGeneration(t.Mistral3Config(text_config=text, vision_config=vision))


def pipeline2(name: str, device: str) -> Pipeline:
    """Return FLUX.2 `name`, with shapes only, on a pretended device."""
    params, dev = TRANSFORMERS2[name], name == "flux2dev"
    kind = "mistral3" if dev else "qwen3"
    with torch.device("meta"):
        made = Flux2(params), AutoEncoder2(AUTOENCODERS["flux2"]), language_model(kind, params.context_in_dim // 3)
    transformer, autoencoder, encoder = (
        part.to(torch.bfloat16).eval().requires_grad_(False).to_empty(device=device) for part in made
    )
    return Pipeline(
        transformer,
        autoencoder,
        LanguageModelText(tiny2.tokenizer(mistral=dev), encoder, kind),
        FLUX2_SCHEDULE,
        steps=50 if dev else 4,
        guidance=4.0 if dev else None,
        max_sequence_length=512,
        size=(1024, 1024),
        name=name,
        distilled=not dev,
    )
