"""Several prompts in one sample: further texts in the sequence, each for a region of the image."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, wrong
from fluxlab.positions.registry import find_op, op
from fluxlab.select.arguments import choice, is_list
from fluxlab.select.layout import IMAGE, Context, Layout
from fluxlab.select.tokens import parse_tokens, resolve_tokens

if TYPE_CHECKING:
    from fluxlab.positions.program import Program

MOST_REGIONS = 16
"""Every region has as many text tokens as the prompt."""


def parse_prompts(value: Any, path: str) -> list[str]:
    """a list of prompts"""
    prompts = value if is_list(value) else [value]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise wrong(f"{path}[{i}]" if is_list(value) else path, prompt, "a prompt as text")
    if not 0 < len(prompts) <= MOST_REGIONS:
        raise UserError(f"{path}: {len(prompts)} prompts, expected 1 to {MOST_REGIONS}")
    return list(prompts)


def parse_regions(value: Any, path: str) -> list:
    """a list of boxes, masks or lists of image tokens, one for each prompt"""
    if not is_list(value) or not value:
        raise wrong(path, value, "a list of boxes, masks or lists of image tokens, one for each prompt")
    return [parse_tokens(part, f"{path}[{i}]") for i, part in enumerate(value)]


@op(
    "regions",
    {"prompts": parse_prompts, "where": parse_regions, "image": choice("apart", "together")},
    acts_on="text",
)
def regions(chosen: Tensor, layout: Layout, prompts: list[str], where: list, image: str = "apart") -> Tensor:
    """Give regions of the image prompts of their own: their texts join the sequence, each seen by its region only.

    Image tokens of a region see its text in place of the sample's prompt, and (image: apart) only tokens that share a
    region with them. Tokens in no region see the sample's prompt. Regional prompting (arXiv 2411.02395).

    chosen: boolean `(regions, N)`, the image tokens of each region. Returns the keys each query sees, boolean `(N, N)`.
    """
    token = torch.arange(layout.tokens, device=chosen.device)
    (start, stop), inside = layout.range(IMAGE), chosen.any(0)
    text, of_image = token < layout.text, (token >= start) & (token < stop)
    sees = hidden(chosen, layout)
    sees &= ~(inside[:, None] & text) & ~(text[:, None] & inside)
    if image == "apart":
        outside = of_image & ~inside
        share = (chosen.float().T @ chosen.float() > 0) | (outside[:, None] & outside)
        sees &= share | ~(of_image[:, None] & of_image)
    for k, region in enumerate(chosen):
        sees |= region[:, None] & text_of(k, layout, chosen.device)
    return sees


def hidden(chosen: Tensor, layout: Layout) -> Tensor:
    """Return the keys that each query sees, `(N, N)`, while the edit does not act: all but the texts of regions.

    These texts see themselves and their region, so that their own attention is defined.
    """
    n, device = layout.tokens, chosen.device
    token = torch.arange(n, device=device)
    further = (token >= layout.text) & (token < layout.range(IMAGE)[0])
    sees = (~further)[None].expand(n, n).clone()
    for k, region in enumerate(chosen):
        own = text_of(k, layout, device)
        sees[own] = own | region
    return sees


def text_of(k: int, layout: Layout, device: torch.device) -> Tensor:
    """Return which tokens are the text of region k, boolean `(N,)`."""
    token = torch.arange(layout.tokens, device=device)
    return (token >= layout.text * (k + 1)) & (token < layout.text * (k + 2))


def region_masks(where: Sequence[Any], context: Context, sample: int, path: str) -> Tensor:
    """Return the image tokens of each region, boolean `(regions, N)`. Raises UserError for other tokens."""
    start, stop = context.layout.range(IMAGE)
    masks = torch.zeros(len(where), context.layout.tokens, dtype=torch.bool, device=context.ids.device)
    for k, part in enumerate(where):
        tokens = resolve_tokens(part, context, sample, f"{path}[{k}]")
        if ((tokens < start) | (tokens >= stop)).any():
            raise UserError(f"{path}[{k}]: selects tokens that are not of the image; give a box, a mask or indices")
        masks[k, tokens] = True
    return masks


def region_prompts(program: "Program") -> tuple[str, ...]:
    """Return the further prompts of a program. Raises UserError for two edits with some, and for a wrong number."""
    found = [edit for edit in program.edits if find_op(edit.op, edit.path).acts_on == "text"]
    if len(found) > 1:
        raise UserError(f"{found[1].path}: a second edit of regions; give {found[0].path} all prompts")
    if not found:
        return ()
    prompts, where = found[0].arguments["prompts"], found[0].arguments["where"]
    if len(prompts) != len(where):
        path = join(found[0].path, "where")
        raise UserError(f"{path}: {len(where)} regions, expected one for each of the {len(prompts)} prompts")
    return tuple(prompts)


def without_regions(program: "Program") -> "Program":
    """Return the program as a negative prompt has it, without texts for regions."""
    edits = tuple(edit for edit in program.edits if find_op(edit.op, edit.path).acts_on != "text")
    return replace(program, edits=edits)
