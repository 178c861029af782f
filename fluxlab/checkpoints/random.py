"""Write a tiny FLUX with random weights: everything runs, but images show nothing.

python -m fluxlab.checkpoints.random <folder>
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fluxlab.checkpoints.folder import save_pipeline
from fluxlab.model import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from fluxlab.model.text import TextEncoders
from fluxlab.sampling import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = [chr(i) for i in range(ord("a"), ord("z") + 1)]


def tokenizers(words: tuple[str, ...] = ()) -> "tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]":
    """Return (CLIP's, T5's) tokenizers of the kinds that FLUX.1 uses, over single letters; T5's also knows `words`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    vocab = LETTERS + [f"{letter}</w>" for letter in LETTERS] + ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -6.0) for letter in LETTERS]
    t5 = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    t5.normalizer = normalizers.Lowercase()
    t5.pre_tokenizer = pre_tokenizers.Metaspace()
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return clip, PreTrainedTokenizerFast(tokenizer_object=t5, model_max_length=512, **marks)


def random_text_encoders(width: int, pooled: int) -> TextEncoders:
    """Return T5 with states of `width` channels and CLIP with `pooled`, with two layers each."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = tokenizers()
    end = clip_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    clip_config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=pooled,
        intermediate_size=2 * pooled,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    t5_config = T5Config(
        vocab_size=len(t5_tokenizer), d_model=width, d_ff=2 * width, d_kv=width // 2, num_layers=2, num_heads=2
    )
    return TextEncoders(clip_tokenizer, CLIPTextModel(clip_config), t5_tokenizer, T5EncoderModel(t5_config))


def write_random(folder: str | Path, seed: int = 0) -> Path:
    """Write a Diffusers folder of 5 MB in fp32, which fluxlab and Diffusers both load. Returns it."""
    torch.manual_seed(seed)
    transformer = Flux(FluxParams(16, 16, 24, 32, 64, 4.0, 2, 2, 2, (4, 14, 14), 10000, True, False))
    autoencoder = AutoEncoder(AutoEncoderParams(64, 3, 32, 3, (1, 2), 1, 4, 0.3611, 0.1159))
    save_pipeline(folder, transformer, autoencoder, random_text_encoders(32, 24), Schedule())
    return Path(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fluxlab.checkpoints.random <folder>")
    print(f"{write_random(sys.argv[1])}: a tiny FLUX with random weights")
