"""FLUX.1's two text encoders: CLIP for one pooled vector a prompt, T5 for a sequence of tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fluxlab.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel


def words_cut(tokenizer: "PreTrainedTokenizerBase", prompt: str, length: int) -> str:
    """The end of `prompt` that does not fit into `length` tokens, from the start of a word; "" if all of it fits."""
    spans = tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True).offset_mapping
    if len(spans) <= length:
        return ""
    kept = prompt[: spans[length - 1][0]]  # the end mark takes the last place
    return prompt[len(kept) if prompt[len(kept)].isspace() else kept.rfind(" ") + 1 :].strip()


@dataclass(frozen=True)
class TextEncoders:
    """Both encoders and their tokenizers, as transformers classes."""

    clip_tokenizer: "PreTrainedTokenizerBase"
    clip: "CLIPTextModel"
    t5_tokenizer: "PreTrainedTokenizerBase"
    t5: "T5EncoderModel"

    @torch.inference_mode()
    def encode(
        self, prompt: str, max_sequence_length: int, truncate: bool = False
    ) -> tuple[Float[Tensor, "1 l t"], Float[Tensor, "1 v"]]:
        """`(txt, y)` of one prompt: T5's last layer `(1, max_sequence_length, d_model)` and CLIP's pooled output.

        As in both public implementations the padding is attended to, and CLIP reads the first 77 tokens only: it
        summarises, T5 carries the words. A prompt of more T5 tokens than `max_sequence_length` raises `UserError`
        with the words that would be lost, unless `truncate`.
        """
        if not truncate and (cut := words_cut(self.t5_tokenizer, prompt, max_sequence_length)):
            raise UserError(
                f"prompt is longer than max_sequence_length={max_sequence_length} tokens: {_ends(cut)!r} would be cut. "
                "Shorten it, raise max_sequence_length, or pass truncate=True"
            )
        txt = self.t5(self._ids(self.t5_tokenizer, prompt, max_sequence_length).to(self.t5.device))[0]
        clip_ids = self._ids(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)
        # which token is pooled is CLIPTextModel's business: the largest id, or the first end mark (eos_token_id != 2)
        return txt, self.clip(clip_ids.to(self.clip.device)).pooler_output

    @staticmethod
    def _ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, length: int) -> Tensor:
        return tokenizer(
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids


def _ends(words: str, most: int = 200) -> str:
    return words if len(words) <= most else f"{words[: most // 2]} … {words[-most // 2 :]}"
