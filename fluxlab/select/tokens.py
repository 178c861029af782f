"""Which tokens: from the words of a config to indices into the token sequence."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxlab.errors import UserError, join, show, unknown_key, wrong
from fluxlab.select.arguments import UNITS, box, choice, integer, is_list
from fluxlab.select.layout import IMAGE, REFERENCE, Context, Layout
from fluxlab.select.masks import parse_mask, to_array
from fluxlab.select.picked import GROUPS, KEYS, is_picked, parse_picked, unresolved
from fluxlab.select.words import find_word

FORMS = {"words": (), "box": ("unit",), "mask": ("unit",), "outside": (), "indices": ("of",), "reference": ()}
FORMS["probe"] = KEYS
PADDING = "padding"
"""The text tokens after the end of the prompt. Which they are depends on the prompt."""
ACCEPTED = f"{', '.join(GROUPS)}, {PADDING}, or one of {{{'}, {'.join(FORMS)}}}"
_ONE_REFERENCE = re.compile(r"reference\s*\[\s*(\d+)\s*\]")


def parse_tokens(value: Any, path: str) -> str | dict | list:
    """a token selection

    Returns it in canonical form. A list is the union of its parts. Raises UserError for anything else.
    """
    if is_list(value):
        if not value:
            raise wrong(path, list(value), ACCEPTED)
        parts = [parse_tokens(part, f"{path}[{i}]") for i, part in enumerate(value)]
        return parts[0] if len(parts) == 1 else parts
    if isinstance(value, str) and (one := _ONE_REFERENCE.fullmatch(value)):  # reference[0] is {reference: 0}
        value = {"reference": int(one[1])}
    if not isinstance(value, Mapping):
        if not isinstance(value, str) or value not in (*GROUPS, PADDING):
            raise wrong(path, value, ACCEPTED, (*GROUPS, PADDING, *FORMS))
        return value
    forms = [key for key in value if key in FORMS]
    for key in value:
        if key not in FORMS and key not in {extra for form in forms for extra in FORMS[form]}:
            options = [extra for form in forms for extra in (form, *FORMS[form])] or list(FORMS)
            raise unknown_key(path, key, value[key], options, "token selection" if not forms else "key")
    if len(forms) != 1:
        raise wrong(path, dict(value), f"exactly one of {', '.join(FORMS)} (a list of several is their union)")
    (form,) = forms
    if form == "probe":
        return parse_picked(value, path)
    return {form: _PARSE[form](value[form], join(path, form)), **_parse_extra(form, value, path)}


parse_tokens.suggestions = (*GROUPS, PADDING)


def _parse_extra(form: str, value: Mapping, path: str) -> dict:
    if form in ("box", "mask"):
        default = "tokens" if form == "box" else "fraction"
        return {"unit": choice(*UNITS)(value.get("unit", default), join(path, "unit"))}
    if form == "indices":
        return {"of": choice(*GROUPS)(value.get("of", "image"), join(path, "of"))}
    return {}


def _parse_words(value: Any, path: str) -> list[str]:
    words = value if is_list(value) else [value]
    if not words:
        raise wrong(path, value, "a word or phrase of the prompt, or a list of them")
    for i, word in enumerate(words):
        where = f"{path}[{i}]" if is_list(value) else path
        if not isinstance(word, str) and isinstance(word, bool | int | float):  # YAML reads yes, 1_000 and 1.50 so
            raise wrong(where, word, "a word or phrase of the prompt as text: write it in quotes, as in the prompt")
        if not isinstance(word, str) or not word.strip():
            raise wrong(where, word, "a word or phrase of the prompt")
    return list(words)


def _parse_outside(value: Any, path: str) -> dict | list:
    parsed = parse_tokens(value, path)
    for part in parsed if isinstance(parsed, list) else [parsed]:
        if not isinstance(part, dict) or not {"box", "mask"} & part.keys():
            raise wrong(path, value, "{box} or {mask} of the image, or a list of them")
    return parsed


def _parse_indices(value: Any, path: str) -> list[int]:
    if not is_list(value):
        return [integer(value, path, "a token's index or a list of them")]
    if not value:
        raise wrong(path, [], "at least one index")
    return [integer(n, f"{path}[{i}]", "a token's index") for i, n in enumerate(value)]


_PARSE = {
    "words": _parse_words,
    "box": box,
    "mask": parse_mask,
    "outside": _parse_outside,
    "indices": _parse_indices,
    "reference": lambda value, path: integer(value, path, "the number of a reference image, from 0"),
}


def resolve_tokens(selection: str | dict | list, context: Context, sample: int, path: str) -> Tensor:
    """Return indices `(n,)` into the sequence, ascending. Raises UserError if nothing is selected."""
    layout = context.layout
    chosen = torch.zeros(layout.tokens, dtype=torch.bool)
    may_be_empty = False
    for i, part in enumerate(selection if isinstance(selection, list) else [selection]):
        part_path = f"{path}[{i}]" if isinstance(selection, list) else path
        if part == PADDING:
            if not context.prompts:
                raise UserError(f"{part_path}: padding, but no prompt was given")
            may_be_empty = True  # a prompt may fill all text tokens
            if context.prompts[sample] is not None:
                chosen[len(context.prompts[sample].spans) : layout.text] = True
        elif is_picked(part):
            raise unresolved(part, part_path)
        elif isinstance(part, dict) and "words" in part:
            words_path = join(part_path, "words")
            if not context.prompts:
                raise UserError(f"{words_path}: {show(part['words'])}, but no prompt was given")
            prompt = context.prompts[sample]
            if prompt is None:  # a negative prompt has none of the words
                may_be_empty = True
                continue
            chosen[[token for word in part["words"] for token in find_word(prompt, word, words_path)]] = True
        else:
            chosen[_indices(part, layout, part_path)] = True
    if not chosen.any() and not may_be_empty:
        raise UserError(f"{path}: {show(selection)} selects none of {_described(layout)}")
    return chosen.nonzero()[:, 0].to(context.ids.device)


def names_words(value: Any) -> bool:
    """Return whether a canonical selection, or anything that contains one, depends on the prompt."""
    if value == PADDING:
        return True
    if isinstance(value, Mapping):
        return "words" in value or any(names_words(part) for part in value.values())
    return is_list(value) and any(names_words(part) for part in value)


def _described(layout: Layout) -> str:
    references = f", {len(layout.references)} reference images" if layout.references else ""
    return f"the {layout.text} text and {layout.grid[0]} × {layout.grid[1]} image tokens{references}"


def _check_references(part: str | dict, layout: Layout, path: str) -> None:
    """Raise UserError for a selection of reference tokens in a sequence without any."""
    named = part if isinstance(part, str) else part.get("of") or ("reference" if "reference" in part else "")
    if named == "reference" and not layout.references:
        raise UserError(f"{path}: {show(part)}, but there are no reference images; give some with references=")


def _indices(part: str | dict, layout: Layout, path: str) -> Tensor:
    _check_references(part, layout, path)
    if isinstance(part, str):
        return torch.arange(*layout.span(part))
    if "indices" in part:
        start, stop = layout.span(part["of"])
        count = stop - start
        for n in part["indices"]:
            if not -count <= n < count:
                raise wrong(join(path, "indices"), n, f"an index below {count} (the {part['of']} tokens)")
        return torch.tensor([start + n % count for n in part["indices"]])
    if "reference" in part:
        if not 0 <= part["reference"] < len(layout.references):
            raise wrong(join(path, "reference"), part["reference"], f"one of {len(layout.references)} references")
        return torch.arange(*layout.range(REFERENCE + part["reference"]))
    if "outside" in part:
        areas, path = part["outside"], join(path, "outside")
        inside = torch.zeros(layout.grid, dtype=torch.bool)
        for area in areas if isinstance(areas, list) else [areas]:
            inside |= _covered(area, layout, path)
        chosen = ~inside
    else:
        chosen = _covered(part, layout, path)
    return layout.range(IMAGE)[0] + chosen.flatten().nonzero()[:, 0]


def _covered(part: dict, layout: Layout, path: str) -> Tensor:
    """Return which image tokens a box or mask selects, boolean `(rows, cols)`: those whose middle is in the box."""
    if "mask" in part:
        return mask_on_grid(part["mask"], part["unit"], layout, join(path, "mask"))
    top, left, bottom, right = box_in_tokens(part["box"], part["unit"], layout, join(path, "box"))
    rows, cols = (torch.arange(n, dtype=torch.float32) + 0.5 for n in layout.grid)
    return ((rows >= top) & (rows < bottom))[:, None] & ((cols >= left) & (cols < right))


def box_in_tokens(edges: list[float], unit: str, layout: Layout, path: str) -> list[float]:
    """Return [top, left, bottom, right] in tokens, where token r covers r … r + 1.

    Raises UserError for a box that exceeds the image.
    """
    rows, cols = layout.grid
    scale = {"tokens": (1, 1), "pixels": (1 / layout.pixels_per_token,) * 2, "fraction": (rows, cols)}[unit]
    in_tokens = [edge * scale[i % 2] for i, edge in enumerate(edges)]
    if min(in_tokens[:2]) < 0 or in_tokens[2] > rows + 1e-9 or in_tokens[3] > cols + 1e-9:
        pixels = [n * layout.pixels_per_token for n in layout.grid]
        limit = {"tokens": (rows, cols), "fraction": (1, 1), "pixels": pixels}[unit]
        raise wrong(path, edges, f"a box within [0, 0, {limit[0]}, {limit[1]}] ({unit})")
    return in_tokens


def mask_on_grid(rows: list[str], unit: str, layout: Layout, path: str) -> Tensor:
    """Return a mask on the token grid, boolean `(rows, cols)`: the tokens of which it covers at least half."""
    size = (len(rows), len(rows[0]))
    scale = {"tokens": 1, "pixels": layout.pixels_per_token, "fraction": None}[unit]
    if scale and size != (need := tuple(n * scale for n in layout.grid)):
        raise UserError(f"{path}: {size[0]} × {size[1]}, expected {need[0]} × {need[1]} {unit}, or unit: fraction")
    covered = F.adaptive_avg_pool2d(torch.from_numpy(to_array(rows)).float()[None, None], layout.grid)[0, 0]
    return covered >= 0.5
