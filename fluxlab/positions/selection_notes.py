"""Notes on selections that are written as a part and are everything."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from fluxlab.errors import join
from fluxlab.positions.apply import resolve
from fluxlab.positions.edit import Edit
from fluxlab.select.arguments import is_list
from fluxlab.select.layout import IMAGE, TEXT, Context
from fluxlab.select.tokens import resolve_tokens


class Note(NamedTuple):
    """where: the edit or key that the note is about, empty for the whole program. text: what was found."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def selections(edit: Edit, context: Context, sample: int) -> Iterator[Note]:
    """Note selections that are written as a part and are everything."""
    where = edit.where
    for key in ("tokens", "seen_by"):
        if _is_part(where[key]) and edit.op != "mask":
            yield from _tokens(where[key], join(edit.path, key), context, sample)
    for key, value in edit.arguments.items():
        if key in ("from", "to") and edit.acts_on in ("attention", "scores") and _is_part(value):
            yield from _tokens(value, join(edit.path, key), context, sample)
    for i, part in enumerate(edit.arguments["where"] if edit.acts_on == "text" else ()):
        yield from _tokens(part, f"{join(edit.path, 'where')}[{i}]", context, sample)
    resolved = resolve(edit, context, sample)
    counts = {
        "steps": (sum(resolved.steps), context.steps),
        "blocks": (len(resolved.blocks), context.blocks),
        "heads": (context.heads if resolved.heads is None else len(resolved.heads), context.heads),
    }
    for key, (chosen, count) in counts.items():
        if where[key] != "all" and chosen == count > 1:
            yield Note(join(edit.path, key), f"selects all {count} {key}")


def _is_part(selection: Any) -> bool:
    """Return whether a selection is written as a part of a kind of tokens."""
    if is_list(selection):
        return any(map(_is_part, selection))
    return isinstance(selection, dict) and "reference" not in selection


def _tokens(selection: Any, path: str, context: Context, sample: int) -> Iterator[Note]:
    chosen = set(resolve_tokens(selection, context, sample, path).tolist())
    for kind, name in ((TEXT, "text"), (IMAGE, "image")):
        tokens = range(*context.layout.range(kind))
        if len(tokens) > 1 and chosen.issuperset(tokens):
            yield Note(path, f"selects all {len(tokens)} {name} tokens")
