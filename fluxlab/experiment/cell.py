"""One image of an experiment."""

from dataclasses import dataclass

from fluxlab.experiment.inputs import Inputs
from fluxlab.experiment.reference_images import ReferenceImage
from fluxlab.experiment.tasks import Task
from fluxlab.positions import Program


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant, prompt and seed. Cells with equal keys share one image: two variants may have equal programs.

    references: its reference images, in order. task: what makes its image; None for sampling from the prompt. inputs:
    what tasks work on, which metrics of every cell compare with.
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
    task: Task | None = None
    inputs: Inputs | None = None
