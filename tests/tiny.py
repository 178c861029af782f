"""Small random FLUX folders written by Diffusers and transformers: the oracle's side of every parity test."""

from pathlib import Path

import torch

from fluxlab.checkpoints.random import tokenizers

# fmt: off
WORDS = (
    "a", "an", "the", "red", "green", "blue", "cat", "fox", "dog", "sign", "that", "says", "hello", "world",
    "holding", "on", "left", "right", "of", "and",
)
# fmt: on


def diffusers_pipeline(
    *, guidance: bool = True, seed: int = 0, pool_by_argmax: bool = False, dynamic_shift: bool = True
):
    """A random `FluxPipeline` of a few 100k parameters; every weight, norms and biases too, is random."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = tokenizers(WORDS)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip_vocab = clip_tokenizer.get_vocab()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=24,
            bos_token_id=clip_vocab["<|startoftext|>"],
            eos_token_id=2 if pool_by_argmax else clip_vocab["<|endoftext|>"],
            pad_token_id=clip_vocab["<|endoftext|>"],
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=32,
            d_ff=64,
            d_kv=16,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        )
        if dynamic_shift
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    for module in (transformer, vae):
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros: a swapped pair would go unseen
                torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
    for module in (transformer, vae, clip, t5):
        module.eval().requires_grad_(False)
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def save(folder: Path, **options) -> Path:
    diffusers_pipeline(**options).save_pretrained(folder)
    return folder


def run_of(model) -> list[str]:
    """Return the arguments of a small run of a saved model: 2 prompts × 2 seeds at 16 × 24 pixels."""
    prompts = ["a cat", "a red dog"]
    local = ["model=local", f"model.path={model}", "model.max_sequence_length=16"]
    return ["+exp=hello", *local, "tracking=none", "height=16", "width=24", "seeds=2", f"prompts={prompts}"]
