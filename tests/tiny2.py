"""Small random FLUX.2 networks and folders written by Diffusers and transformers: the oracle of every parity test."""

from pathlib import Path

import torch

QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{{- '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
SHORT_TEMPLATE = "{%- for message in messages %}{{- '<|im_start|>' + message.content + '<|im_end|>' }}{%- endfor %}"
MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + message.content[0].text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + message.content[0].text + '[/INST]' }}{%- endif %}{%- endfor %}"
)


def tokenizer(mistral: bool = False, words: tuple[str, ...] = ()):
    """A byte-level tokenizer like Qwen's and Mistral's, of single bytes and a few words, with a chat template.

    words: one token each, also after a space. The template then has one token before the prompt and one after it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [] if words else [("c", "a"), ("ca", "t"), ("r", "e"), ("re", "d"), ("Ġ", "s"), ("h", "e"), ("l", "o")]
    for word in words:  # letter by letter
        merges += [(word[:i], word[i]) for i in range(1, len(word))] + [("Ġ", word)]
    merges = list(dict.fromkeys(merges))
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*letters, *("".join(merge) for merge in merges)]))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
    marks = ["<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"] if mistral else marks
    core.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} if mistral else {}
    named = named or {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    template = MISTRAL_TEMPLATE if mistral else SHORT_TEMPLATE if words else QWEN_TEMPLATE
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, padding_side="right", model_max_length=4096, **named
    )


def diffusers_pipeline(*, dev: bool = False, distilled: bool = True, seed: int = 0, words: tuple[str, ...] = ()):
    """A random `Flux2KleinPipeline`, or with `dev` a `Flux2Pipeline`, of a few 100k parameters.

    words: as in `tokenizer`.
    """
    import diffusers
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(seed)
    own_tokenizer = tokenizer(mistral=dev, words=words)
    sizes = {
        "vocab_size": len(own_tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 31 if dev else 28,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    if dev:
        vision = PixtralVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        config = Mistral3Config(text_config=MistralConfig(**sizes), vision_config=vision, image_token_index=1)
        encoder = Mistral3ForConditionalGeneration(config)
    else:
        encoder = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    for name, parameter in encoder.named_parameters():  # states that depend on the words, and not on the position only
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter.data, 0, 1)
    encoder.eval().requires_grad_(False)
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": diffusers_autoencoder(seed),
        "text_encoder": encoder,
        "tokenizer": own_tokenizer,
        "transformer": diffusers_transformer(guidance=dev, seed=seed, gates=8),  # so that images depend on the text
    }
    if dev:
        return diffusers.Flux2Pipeline(**parts)
    return diffusers.Flux2KleinPipeline(**parts, is_distilled=distilled)


def save(folder: Path, **options) -> Path:
    diffusers_pipeline(**options).save_pretrained(folder)
    return folder


def randomise(*modules) -> None:
    """Give norms and biases, which start as ones and zeros, random values: a swapped pair would go unseen."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
        module.eval().requires_grad_(False)


def diffusers_transformer(*, guidance: bool = True, seed: int = 0, text_width: int = 48, gates: float = 1):
    """A random `Flux2Transformer2DModel` with two heads of four axes. gates: how much of each block is added."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(seed)
    model = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance,
    )
    randomise(model)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            parameter.data *= gates
    return model


def diffusers_autoencoder(seed: int = 0):
    """A random `AutoencoderKLFlux2` of 4 latent channels and 2 pixels per latent pixel."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(seed)
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
    )
    randomise(model)
    model.bn.running_mean.normal_(0, 0.5)
    model.bn.running_var.uniform_(0.2, 3)
    return model
