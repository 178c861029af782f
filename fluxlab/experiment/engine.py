"""The seam between a run and what computes its images: which batches are missing, and how each one ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fluxlab.experiment.cells import Batch, Settings
from fluxlab.experiment.spec import Experiment
from fluxlab.experiment.store import Store


@dataclass(frozen=True)
class Done:
    """A batch that an engine has finished: its images are in the store, except for `failures`.

    failures: one line per cell without an image. error: the traceback of a batch that was set aside after it had failed
    several times; "" for a batch that was computed.
    """

    batch: Batch
    failures: list[str] = field(default_factory=list)
    error: str = ""


class Engine(Protocol):
    """Computes batches. A run calls `settle` unless its store has the settings, `check` if a batch is missing, and then
    `compute`. `fluxlab.engines` has the implementations.
    """

    def settle(
        self, experiment: Experiment, known: Settings | None, batch_tokens: int | None, threads: int | None
    ) -> Settings:
        """Load the model and return the settings of the run. known: those of the images that the store has."""
        ...

    def check(self, experiment: Experiment, settings: Settings, fixed: bool) -> list[str]:
        """Load the model if it is not loaded yet, and raise `UserError` for what does not fit it.

        Returns notes on the programs (`fluxlab.experiment.notes`).

        fixed: the settings are the store's, so that another `batch_tokens` needs another folder.
        """
        ...

    def compute(
        self, experiment: Experiment, settings: Settings, store: Store, batches: Sequence[Batch]
    ) -> Iterator[Done]:
        """Compute the batches, in any order, and yield each one when its files are written.

        Stops early, with no batch half done, once `fluxlab.stopping.asked()`. Raises what `settings.halved` expects if
        memory runs out, and nothing is lost then but the batches at hand.
        """
        ...
