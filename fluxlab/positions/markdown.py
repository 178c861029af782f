"""Markdown tables of the ops and of the keys that say where an edit acts. docs/tables.py writes them into the docs."""

import inspect
from collections.abc import Iterable, Sequence

from fluxlab.positions.edit import DEFAULTS, PARSE
from fluxlab.positions.registry import ACTS_ON, OPS, Op

WHERE_VALUES = {
    "tokens": 'image, text, padding (text after the end of the prompt), all; `{words: [cat, "cat#2"]}`; '
    "`{box: [top, left, bottom, right], unit: tokens}` (or "
    'pixels, fraction); `{mask: ["..##", …]}` or `{mask: file.png}`; `{outside: {box: …}}` (image tokens '
    "that are not in a box or mask); `{indices: [0, 5], of: text}`; "
    "`{probe: incoming, top: 8}`; a list of these is their union",
    "axes": "index, row, col, order (of text, on FLUX.2), plane (row and col), t, h, w, l, or 0 … 3; one or a list",
    "steps": "`[0, 1]`, `0-3`, `{fraction: [0, 0.5]}`, `{sigma: [0.7, 1]}`",
    "blocks": "double, single; `0-18` counted through all blocks; `{double: [0, 1], single: all}`",
    "heads": "`[0, 5]`, `0-3`",
    "side": "queries, keys, both",
    "seen_by": "tokens; only with `side: keys`: these queries see the edited keys, the others see the unchanged ones",
    "strength": "from 0 (no effect) to 1; `{from: 1, to: 0}` from the first to the last noise level; points "
    "`[[σ, strength], …]`, linear between them",
}
"""What each key accepts, in words. The keys and their defaults come from the code."""


def ops_table(acts_on: Iterable[str] = tuple(ACTS_ON)) -> str:
    """Return a Markdown table of the ops that act on one of `acts_on`: name, arguments, and what they do."""
    rows = [[f"`{op.name}`", _arguments(op), op.summary] for op in OPS.values() if op.acts_on in acts_on]
    return _table(["op", "arguments", "what it does"], rows)


def where_table() -> str:
    """Return a Markdown table of the keys of every edit: name, default, and what they accept."""
    rows = [[f"`{key}`", _default(DEFAULTS.get(key, "image")), WHERE_VALUES[key]] for key in PARSE]
    return _table(["key", "default", "accepts"], rows)


def _arguments(op: Op) -> str:
    described = []
    for key, parse in op.types.items():
        accepted = (inspect.getdoc(parse) or "a value").partition("\n")[0]
        default = "" if key in op.required or op.defaults[key] is None else f"; default {_default(op.defaults[key])}"
        described.append(f"`{key}`: {accepted}{default}")
    return "<br>".join(described) or "none"


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
