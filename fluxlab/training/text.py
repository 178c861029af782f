"""Text encoders of the embedded model: word-level tokenizers over the vocabulary of the scenes, a small CLIP and T5."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from fluxlab.model.text import TextEncoders
from fluxlab.scenes import VOCABULARY

if TYPE_CHECKING:
    from transformers import CLIPTextModel

KIND = TextEncoders
PAD, UNK, BOS, EOS = range(4)
PUNCTUATION = r"""[\"'.,!?:;()“”‘’]"""


def _tokenizer(length: int, template: str):
    """Return a tokenizer of lower-cased words without punctuation. Other words become the unknown token."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<bos>", "<eos>", *VOCABULARY]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(PUNCTUATION), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"} | (
        {"bos_token": "<bos>"} if "<bos>" in template else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, **marks)


def text_encoders(*, length: int, t5_width: int, clip_width: int, layers: int) -> TextEncoders:
    """Return untrained encoders for prompts of `length` tokens, initialised from the global generator of PyTorch.

    T5 returns `(B, length, t5_width)`, the pooled output of CLIP is `(B, clip_width)`. Both have `layers` layers with
    heads 32 wide.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    size = len(VOCABULARY) + 4
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=clip_width,
            intermediate_size=4 * clip_width,
            num_hidden_layers=layers,
            num_attention_heads=clip_width // 32,
            max_position_embeddings=length,
            projection_dim=clip_width,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    _bag_of_words(clip)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=size,
            d_model=t5_width,
            d_kv=32,
            d_ff=4 * t5_width,
            num_layers=layers,
            num_heads=t5_width // 32,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            eos_token_id=EOS,
            decoder_start_token_id=PAD,
        )
    )
    return TextEncoders(_tokenizer(length, "<bos> $A <eos>"), clip, _tokenizer(length, "$A <eos>"), t5)


@torch.no_grad()
def _bag_of_words(clip: "CLIPTextModel") -> None:
    """Initialise CLIP so that its pooled vector is close to the sum of the word vectors.

    With the usual small initial weights, "red" and "blue" differ by only one hundredth in the pooled vector.
    """
    width = clip.config.hidden_size
    scales = {"token_embedding": 1.0, "position_embedding": 0.1, "v_proj": width**-0.5, "out_proj": 4 * width**-0.5}
    for name, parameter in clip.named_parameters():
        kind = name.split(".")[-2]
        if kind in scales and parameter.ndim == 2:
            parameter.normal_(0, scales[kind])


def networks(text: TextEncoders) -> dict[str, nn.Module]:
    """Return what is trained."""
    return {"clip": text.clip, "t5": text.t5}


def with_networks(text: TextEncoders, networks: Mapping[str, nn.Module]) -> TextEncoders:
    """Return text encoders with the tokenizers of `text` and these networks, None for those that are left out."""
    return TextEncoders(text.clip_tokenizer, networks.get("clip"), text.t5_tokenizer, networks.get("t5"))


def tokens(text: TextEncoders, prompts: list[str], length: int) -> dict[str, torch.Tensor]:
    """Return what the encoders read of some prompts, each tensor with one row per prompt."""
    return {
        "t5_ids": token_ids(text.t5_tokenizer, prompts, length),
        "clip_ids": token_ids(text.clip_tokenizer, prompts, text.clip_tokenizer.model_max_length),
    }


def reader(text: TextEncoders) -> Callable[[nn.Module, Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]:
    """Return a function of (networks, tokens) that returns text tokens and pooled text, as `TextEncoders.encode`."""
    return _read


def _read(nets: nn.Module, tokens: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return nets.t5(tokens["t5_ids"])[0], nets.clip(tokens["clip_ids"]).pooler_output


def token_ids(tokenizer, prompts: list[str], length: int) -> torch.Tensor:
    """Return token ids `(B, length)`, padded and truncated as in sampling."""
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
