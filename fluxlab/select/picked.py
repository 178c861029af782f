"""Tokens that a probe picks while an image is computed: those with the most attention, the least, or random ones."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import UserError, join, show, unknown_key, wrong
from fluxlab.select.arguments import choice, integer, seed
from fluxlab.select.layout import Layout
from fluxlab.select.where import parse_blocks

PROBES = ("incoming",)
"""incoming: the attention that a token receives, the mean over queries, heads and blocks."""
PICKS = ("top", "bottom", "random")
KEYS = (*PICKS, "of", "from", "blocks", "seed")
GROUPS = ("image", "text", "all", "reference")


def parse_picked(value: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return `{probe: incoming, top: 8, of: image, from: all, blocks: all}` in canonical form.

    `random` in place of `top` or `bottom` has a `seed`, and neither `from` nor `blocks`.
    """
    probe = choice(*PROBES)(value["probe"], join(path, "probe"))
    picks = [key for key in PICKS if value.get(key) is not None]
    if len(picks) != 1:
        raise wrong(path, dict(value), f"exactly one of {', '.join(PICKS)}, such as {{probe: {probe}, top: 8}}")
    (pick,) = picks
    known = ("probe", pick, "of", *(("seed",) if pick == "random" else ("from", "blocks")))
    for key in value:
        if key not in known and value[key] is not None:
            raise unknown_key(path, key, value[key], known, f"key of {{probe: {probe}, {pick}: …}}")
    count = integer(value[pick], join(path, pick), "a number of tokens, from 1")
    if count < 1:
        raise wrong(join(path, pick), count, "a number of tokens, from 1")
    parsed = {"probe": probe, pick: count, "of": choice(*GROUPS)(value.get("of") or "image", join(path, "of"))}
    if pick == "random":
        return {**parsed, "seed": seed(value.get("seed") or 0, join(path, "seed"))}
    asked = choice(*GROUPS)(value.get("from") or "all", join(path, "from"))
    blocks = value.get("blocks")
    return {**parsed, "from": asked, "blocks": parse_blocks("all" if blocks is None else blocks, join(path, "blocks"))}


def is_picked(value: Any) -> bool:
    """Return whether a part of a canonical selection is picked by a probe."""
    return isinstance(value, Mapping) and "probe" in value


def pick_of(selection: Mapping[str, Any]) -> tuple[str, int]:
    """Return which tokens are picked, and how many: ("top", 8)."""
    (pick,) = (key for key in PICKS if key in selection)
    return pick, selection[pick]


def key_of(selection: Mapping[str, Any]) -> str:
    """Return a key by which equal selections are equal."""
    return json.dumps(selection, sort_keys=True)


def unresolved(selection: Mapping[str, Any], path: str) -> UserError:
    """Return the error for a selection that has no tokens without a model, or that no model is asked for."""
    return UserError(
        f"{path}: {show(selection)} is found while an image is computed, and is possible in programs of generate() "
        "and of runs only"
    )


def check_count(selection: Mapping[str, Any], layout: Layout, path: str) -> None:
    """Raise `UserError` for more tokens than there are."""
    pick, count = pick_of(selection)
    start, stop = layout.span(selection["of"])
    if selection["of"] == "reference" and start == stop:
        raise UserError(f"{path}: {show(selection)}, but there are no reference images; give some with references=")
    if selection.get("from") == "reference" and not layout.references:
        raise UserError(f"{join(path, 'from')}: 'reference', but there are no reference images")
    if count > stop - start:
        raise wrong(join(path, pick), count, f"at most {stop - start}, the number of {selection['of']} tokens")


def picked(selection: Mapping[str, Any], layout: Layout, step: int, attention: Tensor | None) -> list[int]:
    """Return the picked tokens as ascending indices into the sequence.

    attention: fp64 `(n,)`, that of each token of the group `of`; None for `random`, which draws anew at each step.
    Of equal values the first token counts.
    """
    pick, count = pick_of(selection)
    start, stop = layout.span(selection["of"])
    if pick == "random":
        order = torch.randperm(stop - start, generator=_generator(selection["seed"], step))
    else:
        order = attention.argsort(descending=pick == "top", stable=True)
    return sorted((order[:count] + start).tolist())


def _generator(number: int, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{number}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
