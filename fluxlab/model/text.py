"""The two text encoders of FLUX.1: CLIP for one pooled vector per prompt, T5 for a sequence of tokens."""

import difflib
import unicodedata
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxlab.errors import UserError, show

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

    from fluxlab.model.clip import ClipText
    from fluxlab.model.t5 import T5Encoder


class UnknownWordsWarning(UserWarning):
    """A prompt has words that a text encoder does not know."""


def words_cut(tokenizer: "PreTrainedTokenizerBase", prompt: str, length: int) -> str:
    """Return the end of `prompt` that does not fit into `length` tokens, from the start of a word. "" if all fits."""
    spans = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True).offset_mapping
    if len(spans) <= length:
        return ""
    kept = prompt[: spans[length - 1][0]]  # the end-of-sequence token takes the last place
    return prompt[len(kept) if prompt[len(kept)].isspace() else kept.rfind(" ") + 1 :].strip()


def unknown_parts(tokenizer: "PreTrainedTokenizerBase", prompt: str, marks: Collection[int] = ()) -> list[str]:
    """Return the parts of `prompt` that do not reach the encoder, in order and without repetition.

    These are the parts that become the unknown token or another special token, and those that become no token at all.
    Punctuation, white space and control characters alone do not count. marks: further special tokens.
    """
    encoded = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)
    special = {*tokenizer.all_special_ids, *marks}
    covered, spans = set(), []
    for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        covered |= set(range(start, end))
        if token in special and end > start:  # the tokens that the tokenizer adds itself have empty spans
            spans.append((start, prompt[start:end].strip()))
    spans += [(i, c) for i, c in enumerate(prompt) if i not in covered]
    return list(
        dict.fromkeys(part for _, part in sorted(spans) if any(unicodedata.category(c)[0] in "LNS" for c in part))
    )


def word_list(tokenizer: "PreTrainedTokenizerBase", *others: "PreTrainedTokenizerBase") -> tuple[str, ...] | None:
    """Return the words of a tokenizer with one token per word, sorted, without marks of it or of the others. None for
    a tokenizer whose tokens are parts of words.
    """
    if type(tokenizer.backend_tokenizer.model).__name__ != "WordLevel":
        return None
    marks = {mark for each in (tokenizer, *others) for mark in each.all_special_tokens}
    return tuple(sorted(set(tokenizer.get_vocab()) - marks))


@dataclass(eq=False)
class TextEncoders:
    """Both encoders and their tokenizers, as transformers classes. In `fluxlab.conditioning` is a kind that loads the
    encoders when they are needed."""

    clip_tokenizer: "PreTrainedTokenizerBase"
    clip: "CLIPTextModel"
    t5_tokenizer: "PreTrainedTokenizerBase"
    t5: "T5EncoderModel"

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The words that T5 knows, sorted, if its tokenizer has one token per word. None for FLUX.1's own T5, whose
        tokens are parts of words.
        """
        return word_list(self.t5_tokenizer, self.clip_tokenizer)

    def check(
        self, prompts: Sequence[str], max_sequence_length: int, truncate: bool = False, unknown_words: str = "error"
    ) -> None:
        """Raise `UserError` if a part of a prompt would not reach the model.

        Prompts of more than `max_sequence_length` T5 tokens are rejected unless `truncate`. Words that a tokenizer
        does not know are rejected if `unknown_words` is "error", and reported as `UnknownWordsWarning` if it is "warn".
        CLIP reads the first 77 tokens only, as in both reference implementations. That is not an error: CLIP's vector
        is a summary, and T5 reads all words.
        """
        unknown = {prompt: self._unknown(prompt) for prompt in (prompts if unknown_words != "allow" else ())}
        unknown = {prompt: parts for prompt, parts in unknown.items() if parts}
        for prompt in prompts if not truncate else ():
            cut = words_cut(self.t5_tokenizer, prompt, max_sequence_length)
            if cut and prompt in unknown:  # truncate=True alone would not help
                message, *more = unknown_message({prompt: unknown[prompt]}, self.vocabulary).splitlines()[:-1]
                too_long = f"prompt of more than {max_sequence_length} tokens: {_ends(cut)!r} would be cut"
                raise UserError("\n".join([too_long, message, *more]))
            if cut:
                raise UserError(
                    f"prompt of more than max_sequence_length={max_sequence_length} tokens: {_ends(cut)!r} would be "
                    "cut\nShorten it, raise max_sequence_length, or set truncate=True."
                )
        if unknown and unknown_words == "error":
            raise UserError(unknown_message(unknown, self.vocabulary))
        if unknown:
            message = unknown_message(unknown, self.vocabulary, refused=False)
            warnings.warn(message, UnknownWordsWarning, stacklevel=2)

    def _unknown(self, prompt: str) -> list[str]:
        tokenizers = (self.t5_tokenizer, self.clip_tokenizer)
        return list(dict.fromkeys(part for tokenizer in tokenizers for part in unknown_parts(tokenizer, prompt)))

    titles = ("T5", "CLIP")
    """Of the encoders, in the order of what `encode` returns."""

    def spans(self, prompt: str, max_sequence_length: int) -> tuple[tuple[int, int], ...]:
        """Return the characters [start, end) of the prompt that each text token covers; start = end: none."""
        encoded = self.t5_tokenizer(
            prompt, truncation=True, max_length=max_sequence_length, return_offsets_mapping=True
        )
        return tuple(map(tuple, encoded.offset_mapping))

    def token_of(self, word: str, max_sequence_length: int) -> int:
        """Return the token that stands for a word that is encoded by itself: the first one, as in ConceptAttention."""
        return 0

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """T5's: its tokens are what the transformer reads. None in a plan of a model that is still to be fetched."""
        return self.t5_tokenizer

    def load(self) -> tuple["CLIPTextModel", "T5EncoderModel"]:
        """Return both encoders, which some kinds load when they are needed."""
        return self.clip, self.t5

    @property
    def widths(self) -> dict[str, int]:
        """The channels that each encoder returns, by "clip" and "t5"."""
        return {"clip": self.clip.config.hidden_size, "t5": self.t5.config.hidden_size}

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of (T5, CLIP)."""
        return next(self.t5.parameters()).dtype, next(self.clip.parameters()).dtype

    def to(self, device: torch.device) -> None:
        """Move both encoders to `device`."""
        self.clip.to(device)
        self.t5.to(device)

    @torch.inference_mode()
    def encode(
        self, prompt: str, max_sequence_length: int, truncate: bool = False, unknown_words: str = "error"
    ) -> tuple[Float[Tensor, "1 l t"], Float[Tensor, "1 v"]]:
        """Return `(txt, y)` of a prompt: T5's last layer `(1, max_sequence_length, d_model)` and CLIP's pooled vector.

        The padding is attended to, as in both reference implementations. Raises `UserError` as `check` does.
        """
        self.check([prompt], max_sequence_length, truncate, unknown_words)
        return self.states(prompt, max_sequence_length)

    def states(self, prompt: str, max_sequence_length: int) -> tuple[Float[Tensor, "1 l t"], Float[Tensor, "1 v"]]:
        """Return what `encode` returns for a prompt that was checked."""
        txt = last_layer(self.t5, self.t5_ids(prompt, max_sequence_length).to(self.t5.device))
        return txt, pooled(self.clip, self.clip_ids(prompt).to(self.clip.device))

    def t5_ids(self, prompt: str, max_sequence_length: int) -> Int[Tensor, "1 l"]:
        """Return the T5 tokens of a prompt, padded or cut to `max_sequence_length`."""
        return _ids(self.t5_tokenizer, prompt, max_sequence_length)

    def clip_ids(self, prompt: str) -> Int[Tensor, "1 c"]:
        """Return the CLIP tokens of a prompt, padded or cut to the length that CLIP reads."""
        return _ids(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)


def last_layer(t5: "T5Encoder | T5EncoderModel", ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l t"]:
    """Return T5's last layer."""
    output = t5(ids)
    return output if isinstance(output, Tensor) else output[0]


def pooled(clip: "ClipText | CLIPTextModel", ids: Int[Tensor, "b c"]) -> Float[Tensor, "b v"]:
    """Return CLIP's vector: its last layer at the largest id, or at the first end mark (eos_token_id != 2)."""
    output = clip(ids)
    return output if isinstance(output, Tensor) else output.pooler_output


def _ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, length: int) -> Int[Tensor, "1 l"]:
    return tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def unknown_message(unknown: dict[str, list[str]], vocabulary: tuple[str, ...] | None, refused: bool = True) -> str:
    """Return the message of an error, or of a warning, for prompts and their unknown parts."""
    prompt, parts = next(iter(unknown.items()))
    others = list(dict.fromkeys(part for more in unknown.values() for part in more if part not in parts))
    also = f"; other prompts have {_listed(others)}" if others else ""
    go_on = "Set unknown_words='allow' to go on: the text encoders then read a placeholder for each of them."
    if not refused:
        go_on = (
            "The text encoders read a placeholder for each of them. Set unknown_words='error' to refuse such prompts."
        )
    if vocabulary is None:
        return f"prompt {show(prompt)}: the text encoders have no token for {_listed(parts)}{also}\n{go_on}"
    close = {part: difflib.get_close_matches(part.lower(), vocabulary, 1, 0.5) for part in [*parts, *others][:5]}
    hints = ", ".join(f"{matches[0]} for {part}" for part, matches in close.items() if matches)
    hint = f"; did you mean {hints}?" if hints else ""
    return (
        f"prompt {show(prompt)}: the model does not know {_listed(parts)}{also}{hint}\n"
        f"It knows {', '.join(vocabulary)}.\n{go_on}"
    )


def _listed(parts: list[str], most: int = 5) -> str:
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return ", ".join(map(repr, parts[:most])) + more


def _ends(words: str, most: int = 200) -> str:
    return words if len(words) <= most else f"{words[: most // 2]} … {words[-most // 2 :]}"
