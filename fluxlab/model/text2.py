"""The text encoder of FLUX.2: a language model that reads the prompt in a chat template, and three of its states."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError, show
from fluxlab.model.text import UnknownWordsWarning, unknown_message, unknown_parts, word_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The message that FLUX.2 [dev] was trained with; another one would be another conditioning.
_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


class Kind(NamedTuple):
    """How a language model is used. layers: whose states are taken, 0 being the embeddings. system: whether the
    template starts with the system message. answer: whether it ends where the answer would start, with thinking off.
    """

    layers: tuple[int, ...]
    system: bool
    answer: bool


KINDS = {"qwen3": Kind((9, 18, 27), False, True), "mistral3": Kind((10, 20, 30), True, False)}
"""By `model_type` of transformers: Qwen3 of FLUX.2 [klein], Mistral Small of FLUX.2 [dev]."""

STATES = "flux2_states"
"""In the settings of a language model with fewer layers than these: the three whose states are taken. Not a key of
transformers, which keeps it."""

CLASSES = {"qwen3": "Qwen3ForCausalLM", "mistral3": "Mistral3ForConditionalGeneration"}
"""The classes of transformers."""


@dataclass(eq=False)
class LanguageModelText:
    """The language model and its tokenizer, as transformers classes. `kind` is one of `KINDS`."""

    tokenizer: "PreTrainedTokenizerBase"
    encoder: "PreTrainedModel"
    kind: str

    titles = ("the language model",)
    """Of the encoders, in the order of what `encode` returns."""

    @property
    def vocabulary(self) -> tuple[str, ...] | None:
        """The words that it knows, sorted, if its tokenizer has one token per word; else None: it reads any word."""
        return word_list(self.tokenizer)

    def load(self) -> "PreTrainedModel":
        """Return the language model, which some kinds load when it is needed."""
        return self.encoder

    @property
    def width(self) -> int:
        """The channels of a text token: those of all states together."""
        return len(KINDS[self.kind].layers) * self.encoder.config.get_text_config().hidden_size

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (next(self.encoder.parameters()).dtype,)

    def to(self, device: torch.device) -> None:
        """Move the language model to `device`."""
        self.encoder.to(device)

    def check(
        self, prompts: Sequence[str], max_sequence_length: int, truncate: bool = False, unknown_words: str = "error"
    ) -> None:
        """Raise `UserError` if a part of a prompt would not reach the model.

        The tokens of the template count: prompts that need more than `max_sequence_length` with it are rejected unless
        `truncate`. So are special tokens of the language model, which would end the message, unless `unknown_words` is
        "warn" or "allow".
        """
        # all marks of the template, of which the tokenizer names some
        marks = [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        unknown = {
            prompt: unknown_parts(self.tokenizer, prompt, marks) for prompt in prompts if unknown_words != "allow"
        }
        unknown = {prompt: parts for prompt, parts in unknown.items() if parts}
        if unknown and unknown_words == "error":
            raise UserError(unknown_message(unknown, self.vocabulary))
        if unknown:
            message = unknown_message(unknown, self.vocabulary, refused=False)
            warnings.warn(message, UnknownWordsWarning, stacklevel=2)
        for prompt in prompts if not truncate else ():
            spans = self._all_spans(prompt)
            if len(spans) > max_sequence_length:
                cut = [span for span in spans[max_sequence_length:] if span[1] > span[0]]
                lost = show(prompt[cut[0][0] :]) if cut else "the end of the chat template"
                raise UserError(
                    f"prompt of {len(spans)} tokens with its chat template, more than "
                    f"max_sequence_length={max_sequence_length}: {lost} would be cut\n"
                    "Shorten it, raise max_sequence_length, or set truncate=True."
                )

    def spans(self, prompt: str, max_sequence_length: int) -> tuple[tuple[int, int], ...]:
        """Return the characters [start, end) of the prompt that each text token covers; start = end: none, as for the
        tokens of the template."""
        return self._all_spans(prompt)[:max_sequence_length]

    def token_of(self, word: str, max_sequence_length: int) -> int:
        """Return the token that stands for a word that is encoded by itself: its last one, which has read the others.

        Helbling et al. take it too (ConceptAttention for FLUX.2 [dev]).
        """
        spans = self.spans(word, max_sequence_length)
        return max((i for i, (start, end) in enumerate(spans) if end > start), default=0)

    @torch.inference_mode()
    def encode(
        self, prompt: str, max_sequence_length: int, truncate: bool = False, unknown_words: str = "error"
    ) -> tuple[Float[Tensor, "1 l t"]]:
        """Return `(txt,)` of a prompt, `(1, max_sequence_length, 3 · hidden size)`: three states, joined by channel.

        The transformer attends to the padding, the language model does not. Raises `UserError` as `check` does.
        """
        self.check([prompt], max_sequence_length, truncate, unknown_words)
        return self.states(prompt, max_sequence_length)

    def states(
        self, prompt: str, max_sequence_length: int, device: torch.device | None = None
    ) -> tuple[Float[Tensor, "1 l t"]]:
        """Return what `encode` returns for a prompt that was checked. device: where it is computed, if not where the
        weights are (`fluxlab.model.layerwise`)."""
        tokens = self._tokenize(
            prompt, padding="max_length", truncation=True, max_length=max_sequence_length, return_tensors="pt"
        )
        decoder = self.encoder.get_decoder()  # without the head that predicts words
        # the embedding is a table: its rows are picked where it is
        embedded = self.encoder.get_input_embeddings()(tokens["input_ids"].to(self.encoder.device))
        given = {"inputs_embeds": embedded, "attention_mask": tokens["attention_mask"]}
        given = {key: part.to(device or self.encoder.device) for key, part in given.items()}
        states = decoder(**given, output_hidden_states=True, use_cache=False).hidden_states
        return (joined(states, self.layers),)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states are taken."""
        return tuple(getattr(self.encoder.config, STATES, None) or KINDS[self.kind].layers)

    def template(self, prompt: str) -> str:
        """Return the text that the language model reads."""
        kind = KINDS[self.kind]
        if not kind.system:
            options = {"add_generation_prompt": kind.answer, "enable_thinking": False}
            return self.tokenizer.apply_chat_template([_message("user", prompt)], tokenize=False, **options)
        messages = [
            _message(role, [{"type": "text", "text": t}]) for role, t in (("system", _SYSTEM), ("user", prompt))
        ]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=kind.answer)

    def _tokenize(self, prompt: str, **options):
        """Return the tokens of the template. Mistral's contains the mark of the beginning already."""
        return self.tokenizer(self.template(prompt), add_special_tokens=not KINDS[self.kind].system, **options)

    def _all_spans(self, prompt: str) -> tuple[tuple[int, int], ...]:
        start = self._start(prompt)
        offsets = self._tokenize(prompt, truncation=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [(max(a - start, 0), min(b - start, len(prompt))) for a, b in offsets]
        return tuple((a, b) if a < b else (0, 0) for a, b in inside)

    def _start(self, prompt: str) -> int:
        """Return where the prompt starts in the template: where two templates with different prompts part."""
        text, marked = self.template(prompt), self.template(_MARK)
        start = marked.index(_MARK)
        kept = prompt.strip()  # some templates do
        at = text.find(kept, start) if kept else start
        if not text.startswith(marked[:start]) or at < 0:
            raise UserError(f"prompt {show(prompt)}: the chat template changes it, so that its words cannot be found")
        return at - prompt.find(kept)


def joined(states: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """Return the states `(B, L, C)` of these layers, joined by channel."""
    return torch.cat([states[layer] for layer in layers], dim=-1)


_MARK = "prompt\u2063goes\u2063here"


def _message(role: str, content: "str | list[dict[str, str]]") -> dict:
    return {"role": role, "content": content}
