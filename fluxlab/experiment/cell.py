"""One image of an experiment."""

from dataclasses import dataclass

from fluxlab.experiment.reference_images import ReferenceImage
from fluxlab.positions import Program


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant, prompt and seed. Cells with equal keys share one image: two variants may have equal programs.

    references: its reference images, in order.
    takes_from: the key of the source of each `inject` of its program. sources: these cells, without the cell itself.
    """

    variant: str
    prompt: str
    seed: int
    program: Program
    key: str
    takes_from: tuple[str, ...] = ()
    sources: tuple["Cell", ...] = ()
    references: tuple[ReferenceImage, ...] = ()
