"""The text of an embedded FLUX.2: a small Qwen3, and a word-level tokenizer with a chat template."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fluxlab.model.text2 import STATES, LanguageModelText, joined
from fluxlab.scenes import VOCABULARY
from fluxlab.training.text import PUNCTUATION

KIND = LanguageModelText
PAD, UNK, USER, END, ANSWER = range(5)
MARKS = ("<pad>", "<unk>", "<|user|>", "<|end|>", "<|assistant|>")
TEMPLATE = (
    "{%- for message in messages %}{{- '<|user|>' + message.content + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
"""The words of Qwen's template are marks here: the model knows no words but those of the scenes."""


def tokenizer(length: int):
    """Return a tokenizer of lower-cased words without punctuation. Other words become the unknown token."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKS, *VOCABULARY]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(PUNCTUATION), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=TEMPLATE,
        padding_side="right",
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )


def language_model(*, length: int, width: int, layers: int) -> LanguageModelText:
    """Return an untrained language model for prompts of `length` tokens with the template, initialised from the global
    generator of PyTorch.

    It has `layers` layers of `width` channels, with heads 32 wide. The states after a third, two thirds and all of them
    are the text tokens, `(B, length, 3 · width)`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY) + len(MARKS),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        **{STATES: [layers // 3, 2 * layers // 3, layers]},
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 1)  # so that words differ in all states
    return LanguageModelText(tokenizer(length), model, "qwen3")


def networks(text: LanguageModelText) -> dict[str, nn.Module]:
    """Return what is trained."""
    return {"lm": text.encoder}


def with_networks(text: LanguageModelText, networks: Mapping[str, nn.Module]) -> LanguageModelText:
    """Return a language model with the tokenizer of `text` and this network, None if it is left out."""
    return LanguageModelText(text.tokenizer, networks.get("lm"), text.kind)


def reader(text: LanguageModelText) -> Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, ...]]:
    """Return a function of (networks, tokens) that returns text tokens, as `LanguageModelText.encode`."""
    return partial(_read, layers=text.layers)


def _read(nets: nn.Module, tokens: Mapping[str, Tensor], layers: tuple[int, ...]) -> tuple[Tensor, ...]:
    read = {"input_ids": tokens["lm_ids"], "attention_mask": tokens["lm_mask"]}
    states = nets.lm.get_decoder()(**read, output_hidden_states=True, use_cache=False).hidden_states
    return (joined(states, layers),)


def tokens(text: LanguageModelText, prompts: list[str], length: int) -> dict[str, Tensor]:
    """Return token ids `(B, L)`, padded and truncated as in sampling, and what each token may attend to.

    That are earlier tokens which are not padding, as a mask `(B, 1, L, L)`.
    """
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    read = text.tokenizer([text.template(prompt) for prompt in prompts], **options)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {"lm_ids": read.input_ids, "lm_mask": causal & read.attention_mask.bool()[:, None, None]}
