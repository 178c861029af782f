"""Which schedule a model samples with, and why: what the user says, else what the files say."""

from typing import TYPE_CHECKING

from fluxlab.config import ModelRow
from fluxlab.families import family_of
from fluxlab.model.protocols import TransformerSizes
from fluxlab.schedules.decision import Decision, read_settings

if TYPE_CHECKING:
    from fluxlab import checkpoints

__all__ = ["Decision", "decide", "read_settings"]


def decide(row: ModelRow, found: "checkpoints.Found | None", params: TransformerSizes) -> Decision:
    """Decide how a model's times are spread. found: what is at the row's path; None if it is still to be fetched.

    The family decides. In all of them `schedule` of the row comes first, then the scheduler of the model's Diffusers
    folder. Raises UserError for what the row may not say, and where nothing says it.
    """
    return family_of(params).schedules().decide(row, found, params)
