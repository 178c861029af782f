"""Which tokens: from the words of a config to indices into the sequence."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError, join, unknown_key, wrong
from fluxlab.select.arguments import UNITS, bitmap, box, choice, integer, is_list
from fluxlab.select.layout import IMAGE, REFERENCE, TEXT, Context, Layout
from fluxlab.select.words import find_word

GROUPS = ("image", "text", "all", "reference")
FORMS = {"words": (), "box": ("unit",), "mask": ("unit",), "indices": ("of",), "reference": ()}
ACCEPTED = f"{', '.join(GROUPS)}, or one of {{words}}, {{box}}, {{mask}}, {{indices}}, {{reference}}"


def parse_tokens(value: Any, path: str) -> str | dict | list:
    """A token selection in canonical form; a list is the union of what it holds. `UserError` for anything else."""
    if is_list(value):
        if not value:
            raise wrong(path, list(value), ACCEPTED)
        parts = [parse_tokens(part, f"{path}[{i}]") for i, part in enumerate(value)]
        return parts[0] if len(parts) == 1 else parts
    if not isinstance(value, Mapping):
        if not isinstance(value, str) or value not in GROUPS:
            raise wrong(path, value, ACCEPTED, (*GROUPS, *FORMS))
        return value
    forms = [key for key in value if key in FORMS]
    for key in value:
        if key not in FORMS and key not in {extra for form in forms for extra in FORMS[form]}:
            options = [extra for form in forms for extra in (form, *FORMS[form])] or list(FORMS)
            raise unknown_key(path, key, value[key], options, "token selection" if not forms else "key")
    if len(forms) != 1:
        raise wrong(path, dict(value), f"exactly one of {', '.join(FORMS)} (a list of several is their union)")
    (form,) = forms
    return {form: _PARSE[form](value[form], join(path, form)), **_parse_extra(form, value, path)}


def _parse_extra(form: str, value: Mapping, path: str) -> dict:
    if form in ("box", "mask"):
        default = "tokens" if form == "box" else "fraction"
        return {"unit": choice(*UNITS)(value.get("unit", default), join(path, "unit"))}
    if form == "indices":
        return {"of": choice(*GROUPS)(value.get("of", "image"), join(path, "of"))}
    return {}


def _parse_words(value: Any, path: str) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not is_list(words) or not words:
        raise wrong(path, value, "a word or phrase of the prompt, or a list of them")
    for i, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise wrong(f"{path}[{i}]", word, "a word or phrase of the prompt")
    return list(words)


def _parse_indices(value: Any, path: str) -> list[int]:
    if not is_list(value):
        return [integer(value, path, "a token's index or a list of them")]
    if not value:
        raise wrong(path, [], "at least one index")
    return [integer(n, f"{path}[{i}]", "a token's index") for i, n in enumerate(value)]


_PARSE = {
    "words": _parse_words,
    "box": box,
    "mask": bitmap,
    "indices": _parse_indices,
    "reference": lambda value, path: integer(value, path, "a reference's number, from 0"),
}


def resolve_tokens(selection: str | dict | list, context: Context, sample: int, path: str) -> Tensor:
    """Indices `(n,)` into the sequence, ascending. `UserError` naming `path` where nothing is selected."""
    layout = context.layout
    chosen = torch.zeros(layout.tokens, dtype=torch.bool)
    lenient = False
    for i, part in enumerate(selection if isinstance(selection, list) else [selection]):
        here = f"{path}[{i}]" if isinstance(selection, list) else path
        if isinstance(part, dict) and "words" in part:
            if not context.prompts:
                raise UserError(f"{join(here, 'words')}: {part['words']}, but no prompt was given to find them in")
            prompt = context.prompts[sample]
            lenient |= prompt is None
            found = (
                []
                if prompt is None
                else [t for word in part["words"] for t in find_word(prompt, word, join(here, "words"))]
            )
            chosen[found] = True
        else:
            chosen[_indices(part, layout, here)] = True
    if not chosen.any() and not lenient:
        raise UserError(f"{path}: {selection} selects none of {_described(layout)}")
    return chosen.nonzero()[:, 0].to(context.ids.device)


def names_words(value: Any) -> bool:
    """Whether a canonical selection, or anything that holds one, depends on the prompt."""
    if isinstance(value, Mapping):
        return "words" in value or any(names_words(part) for part in value.values())
    return is_list(value) and any(names_words(part) for part in value)


def _described(layout: Layout) -> str:
    grid = f"{layout.grid[0]} × {layout.grid[1]} image tokens"
    more = f", {len(layout.references)} references" if layout.references else ", no references"
    return f"the {layout.text} text and {grid}{more}"


def _indices(part: str | dict, layout: Layout, path: str) -> Tensor:
    if isinstance(part, str):
        return torch.arange(*_span(part, layout))
    if "indices" in part:
        start, stop = _span(part["of"], layout)
        count = stop - start
        for n in part["indices"]:
            if not -count <= n < count:
                raise wrong(join(path, "indices"), n, f"an index below {count} (the {part['of']} tokens)")
        return torch.tensor([start + n % count for n in part["indices"]])
    if "reference" in part:
        if not 0 <= part["reference"] < len(layout.references):
            raise wrong(join(path, "reference"), part["reference"], f"one of {len(layout.references)} references")
        return torch.arange(*layout.range(REFERENCE + part["reference"]))
    start, _ = layout.range(IMAGE)
    if "box" in part:
        top, left, bottom, right = box_in_tokens(part["box"], part["unit"], layout, join(path, "box"))
        rows, cols = (torch.arange(n) + 0.5 for n in layout.grid)
        inside = ((rows >= top) & (rows < bottom))[:, None] & ((cols >= left) & (cols < right))
    else:
        inside = mask_on_grid(part["mask"], part["unit"], layout, join(path, "mask"))
    return start + inside.flatten().nonzero()[:, 0]


def _span(group: str, layout: Layout) -> tuple[int, int]:
    kinds = {"text": (TEXT, TEXT), "image": (IMAGE, IMAGE), "all": (TEXT, IMAGE + len(layout.references))}
    if group == "reference":
        return layout.range(IMAGE)[1], layout.tokens
    first, last = kinds[group]
    return layout.range(first)[0], layout.range(last)[1]


def box_in_tokens(edges: list[float], unit: str, layout: Layout, path: str) -> list[float]:
    """[top, left, bottom, right] as edges in tokens: token r covers r … r + 1. `UserError` beyond the image."""
    rows, cols = layout.grid
    to_tokens = {"tokens": (1, 1), "pixels": (1 / layout.pixels_per_token,) * 2, "fraction": (rows, cols)}[unit]
    found = [edge * to_tokens[i % 2] for i, edge in enumerate(edges)]
    if min(found[:2]) < 0 or found[2] > rows + 1e-9 or found[3] > cols + 1e-9:
        limit = {"tokens": (rows, cols), "fraction": (1, 1)}.get(
            unit, [n * layout.pixels_per_token for n in layout.grid]
        )
        raise wrong(path, edges, f"a box within [0, 0, {limit[0]}, {limit[1]}] ({unit})")
    return found


def mask_on_grid(rows: list[str], unit: str, layout: Layout, path: str) -> Tensor:
    """A mask, boolean `(rows, cols)` of the token grid: tokens of which it covers at least half."""
    shape = (len(rows), len(rows[0]))
    scale = {"tokens": 1, "pixels": layout.pixels_per_token, "fraction": None}[unit]
    if scale and shape != (need := tuple(n * scale for n in layout.grid)):
        raise UserError(f"{path}: {shape[0]} × {shape[1]}, expected {need[0]} × {need[1]} {unit}, or unit: fraction")
    marks = torch.tensor([[mark == "#" for mark in row] for row in rows], dtype=torch.float32)
    return F.adaptive_avg_pool2d(marks[None, None], layout.grid)[0, 0] >= 0.5
