"""The kind of request that compares words which need not be in the prompt, by attention outputs (ConceptAttention).

`fluxlab.concepts` computes the maps in the model. Here are their words, axes and memory.
"""

from typing import Any

from torch import Tensor

from fluxlab.errors import UserError, join, wrong
from fluxlab.probes.outputs import Add, Measure, ProbeContext, named_axis, token_axes, token_range
from fluxlab.probes.registry import probe
from fluxlab.select.arguments import is_list
from fluxlab.select.layout import IMAGE

EXPECTED = "two or more different words to compare, such as [cat, sign, background]"


def parse_concepts(value: Any, path: str) -> list[str]:
    """Parse a list of two or more different words or phrases. They need not be in the prompt."""
    if not is_list(value):
        raise wrong(path, value, EXPECTED)
    words = [word.strip() if isinstance(word, str) else word for word in value]
    if len(words) < 2 or len(set(map(str, words))) < len(words) or not all(isinstance(w, str) and w for w in words):
        raise wrong(path, list(value), EXPECTED)
    return words


@probe("concepts", {"words": parse_concepts}, averages=("steps", "blocks"))
def concepts(context: ProbeContext, words: list[str]) -> Measure:
    """Maps of words that need not be in the prompt: at each image token the shares of the words, which sum to 1.

    The softmax over the words of o·c, for the attention outputs o of an image token and c of a word, all heads together
    (ConceptAttention, arXiv 2502.04320). Words are text tokens with a stream of their own through the double blocks.
    """
    if any(block >= context.run.double for block in context.blocks):
        raise UserError(
            f"{join(context.path, 'blocks')}: concepts have a stream in the double blocks only "
            f"(0 … {context.run.double - 1}); write blocks: double or some of them"
        )
    image = token_range(context, IMAGE)

    def observe(shares: Tensor, b: int, heads: Tensor | None, add: Add) -> None:
        add("", (), shares)

    axes = named_axis("word", words) + token_axes([image], context, "")
    width = sum(context.run.axes_dim) * context.run.heads
    tokens = context.layout.tokens + len(words)
    # keys and values of a sample with those of the words, its outputs in fp32; the maps of the batch
    scratch = 4 * (3 * tokens * width + context.samples * len(words) * len(image))
    return Measure({"": axes}, observe, "share", scratch=scratch, site=site_of(words), concepts=tuple(words))


def site_of(words: list[str] | tuple[str, ...]) -> str:
    """Return the name under which the maps of these words are observed."""
    return f"concepts {', '.join(words)}"
