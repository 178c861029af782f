"""From the programs of a batch and a context to `Compiled`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fluxlab.errors import UserError
from fluxlab.positions.apply import resolve
from fluxlab.positions.compiled import Compiled
from fluxlab.positions.trial import try_out
from fluxlab.select.layout import Context

if TYPE_CHECKING:
    from fluxlab.positions.program import Program


def compile_programs(programs: "Sequence[Program]", context: Context) -> Compiled:
    """Compile one program per sample, or one for all. Equal samples share their tables.

    Raises UserError, with the path of the edit, for what the context does not have.
    """
    ids = context.ids
    tokens, axes = context.layout.tokens, len(context.axes_dim)
    if ids.ndim != 3 or ids.shape[1:] != (tokens, axes) or not ids.is_floating_point():
        raise UserError(f"ids: shape {tuple(ids.shape)} {ids.dtype}, expected floating point (B, {tokens}, {axes})")
    batch = max(len(programs), len(ids), len(context.prompts or ()))
    sizes = {"programs": len(programs), "ids": len(ids), "prompts": len(context.prompts or [None])}
    if any(n not in (1, batch) for n in sizes.values()):
        raise UserError(", ".join(f"{n} {key}" for key, n in sizes.items()) + ": expected equal numbers, or one")
    samples, sources, of = [], [], []
    for b in range(batch):
        program = programs[b % len(programs)]
        prompt = b % len(context.prompts) if context.prompts else 0
        named = context.prompts[prompt] if context.prompts and program.names_words else None
        source = (b % len(ids), program, named, b if program.sees_latent else None)
        if source not in sources:
            sources.append(source)
            samples.append(tuple(resolve(edit, context, prompt) for edit in program.edits))
            try_out(samples[-1], ids[b % len(ids)], context)
        of.append(sources.index(source))
    return Compiled(samples, [ids[source[0]] for source in sources], of, context)
