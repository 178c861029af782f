"""Ops on the size at which an image is computed: the controls of larger images."""

from fluxlab.positions.program import Program
from fluxlab.positions.registry import find_op, op
from fluxlab.select.arguments import choice

FILTERS = ("bicubic", "lanczos", "bilinear", "nearest")


@op("resample", {"filter": choice(*FILTERS)}, acts_on="size")
def resample(filter: str = "bicubic") -> str:
    """Compute the image at the model's own size, and resize it to the size asked for.

    The other edits of the program act at the model's own size. Returns the filter.
    """
    return filter


def split_resample(program: Program) -> tuple[Program, str | None]:
    """Return the program without `resample`, and the filter of the last one, None without any."""
    found = [edit for edit in program.edits if find_op(edit.op, edit.path).acts_on == "size"]
    rest = Program(tuple(edit for edit in program.edits if edit not in found))
    return rest, found[-1].arguments["filter"] if found else None
