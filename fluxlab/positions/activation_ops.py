"""Ops on activations: their values at the sites of a block (`fluxlab.model.sites`). `interventions` applies them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fluxlab.errors import join, unknown_key, wrong
from fluxlab.model.sites import SITES
from fluxlab.positions.places import Places
from fluxlab.positions.registry import op
from fluxlab.select.arguments import above_one, choice, integer, is_list, number, seed
from fluxlab.select.picked import is_picked
from fluxlab.select.tokens import parse_tokens

VELOCITY = "velocity"
"""Not a site of a block: what the model returns for the image tokens."""

SOURCE_KEYS = ("variant", "prompt", "seed")


def sites_of(*allowed: str) -> Any:
    """Return the type of an argument that names one or several of `allowed` sites, or all of them."""

    def parse(value: Any, path: str) -> list[str]:
        value = list(allowed) if value == "all" else value
        names = value if is_list(value) else [value]
        for i, name in enumerate(names):
            if not isinstance(name, str) or name not in allowed:
                at = f"{path}[{i}]" if is_list(value) else path
                raise wrong(at, name, f"a site: {', '.join(allowed)}, or all", (*allowed, "all"))
        if not names:
            raise wrong(path, [], f"at least one of {', '.join(allowed)}")
        return [name for name in allowed if name in names]

    parse.__doc__ = f"one or several of {', '.join(allowed)}; or all"
    return parse


def parse_source(value: Any, path: str) -> dict[str, Any]:
    """a variant, `{variant, prompt, seed}`, or from Python the number of a sample of the batch

    A mapping without a prompt or seed means the cell's own, without a variant the baseline. `{next: 1}` as prompt or
    seed means the next one of the experiment, and after the last the first.
    """
    accepted = "a variant such as baseline, or {variant: …, prompt: …, seed: …}"
    if isinstance(value, str):
        return {"variant": value}
    if not isinstance(value, Mapping):
        if integer(value, path, f"{accepted}, or from Python the number of a sample of the batch") < 0:
            raise wrong(path, value, "the number of a sample of the batch, from 0")
        return {"sample": int(value)}
    keys = ("sample",) if "sample" in value else SOURCE_KEYS
    for key in value:
        if key not in keys:
            raise unknown_key(path, key, value[key], SOURCE_KEYS, "key of a source")
    if not value:
        raise wrong(path, {}, accepted)
    parsed = {key: value[key] for key in keys if key in value}
    for key in parsed:
        at = join(path, key)
        if key in ("prompt", "seed") and isinstance(parsed[key], Mapping):
            parsed[key] = _next(parsed[key], at)
        elif key in ("seed", "sample"):
            parsed[key] = seed(parsed[key], at)
        elif not isinstance(parsed[key], str):
            raise wrong(at, parsed[key], "the name of a variant" if key == "variant" else "a prompt, or {next: 1}")
    return parsed


def _next(value: Mapping, path: str) -> dict[str, int]:
    """Return `{next: n}`: the n-th after the cell's own, in the experiment's order."""
    if set(value) != {"next"}:
        raise wrong(path, dict(value), "{next: 1}, the next one of the experiment")
    return {"next": integer(value["next"], join(path, "next"), "a whole number such as 1")}


def source_tokens(value: Any, path: str) -> Any:
    """a token selection in the source"""
    selection = parse_tokens(value, path)
    for i, part in enumerate(selection if is_list(selection) else [selection]):
        if is_picked(part):
            at = f"{path}[{i}]" if is_list(selection) else path
            raise wrong(at, part, "tokens of the source: a probe picks those of the image itself")
    return selection


def parse_map(value: Any, path: str) -> str | list[int]:
    """same, stretch, match, or for each token the number of one of `from`"""
    words = ("same", "stretch", "match")
    if is_list(value) and value:
        return [integer(n, f"{path}[{i}]", "the number of a token of `from`, from 0") for i, n in enumerate(value)]
    if not isinstance(value, str) or value not in words:
        raise wrong(path, value, f"{', '.join(words)} or a list of numbers", words)
    return value


def finite(value: Any, path: str) -> float:
    """a number"""
    return number(value, path)


@op(
    "ablate",
    {"what": sites_of("attention", "mlp"), "to": choice("zero", "mean"), "over": parse_tokens},
    acts_on="activations",
    tokens="all",
)
def ablate(own: Tensor, whole: Tensor, what: Any, to: str = "zero", over: Tensor | None = None) -> Tensor:
    """Replace the output of attention heads or of the MLP by zero, or by its mean over tokens `over`.

    own: `(…, n, C)`, the selected tokens. whole: `(…, N, C)`, the sample's sequence. over: the indices of tokens,
    by default the selected ones.
    """
    if to == "zero":
        return torch.zeros_like(own)
    mean = (own if over is None else whole[..., over, :]).mean(-2, keepdim=True)
    return mean.expand_as(own)


@op(
    "sine_cosine",
    {"what": sites_of("input", "residual"), "base": above_one, "factor": finite},
    acts_on="activations",
    tokens="image",
)
def sine_cosine(
    own: Tensor, whole: Tensor, places: Places, what: Any = "input", base: float = 10000.0, factor: float = 1.0
) -> Tensor:
    """Add a sine-cosine table of rows and columns to the hidden states, as SD3 does before its first block.

    Half of the channels encode the column and half the row, each as sines and then cosines of `base`^(-4i/D) radians
    per token (Vaswani et al., arXiv 1706.03762, section 3.5). `factor` multiplies what is added.

    own: `(n, D)`, the selected tokens. places: where the edits before this one leave them.
    """
    return own + factor * places.table(own.shape[-1], base, own)


@op(
    "inject",
    {
        "source": parse_source,
        "what": sites_of(*SITES, VELOCITY),
        "from": source_tokens,
        "map": parse_map,
        "mode": choice("replace", "append"),
        "rotation": choice("after", "before"),
        "factor": finite,
    },
    acts_on="activations",
    tokens="all",
)
def inject(
    theirs: Tensor,
    source: Any,
    what: Any,
    from_: Any = None,
    map: Any = "same",
    mode: str = "replace",
    rotation: str = "after",
    factor: float = 1.0,
) -> Tensor:
    """Replace activations by those of another cell, computed in the same batch, or append its keys and values.

    `factor` multiplies what is injected; of keys and values that are appended, the keys.

    theirs: `(…, n, C)`, the source's activations for each of the selected tokens, with queries and keys rotated as the
    edit says.
    """
    return theirs if factor == 1 else theirs * factor
