"""Which schedule a model of FLUX.1 samples with: like dev, whose times are shifted, or like schnell."""

from dataclasses import replace
from pathlib import Path

from fluxlab import checkpoints, sampling
from fluxlab.checkpoints.networks import TRANSFORMER, open_network
from fluxlab.config import ModelRow
from fluxlab.errors import UserError, nearest
from fluxlab.model import FluxParams
from fluxlab.sampling import FLUX_SCHEDULE, Schedule
from fluxlab.schedules.decision import Decision, read_settings

DEV = replace(FLUX_SCHEDULE, shift=1.0)
SCHNELL = replace(DEV, use_dynamic_shifting=False)
STEPS = {"dev": 28, "schnell": 4}
"""Of the models that `like` of a row may name."""


def decide(row: ModelRow, found: "checkpoints.Found | None", params: FluxParams) -> Decision:
    """Decide how a model's times are spread. found: what is at the row's path; None if it is still to be fetched.

    In this order: `schedule` and `like` of the row; the scheduler of the model's Diffusers folder; a guidance
    embedding, which only models like dev have; the scheduler of the folder that `text` or `autoencoder` names, if its
    model has the same sizes and its times are shifted. The number of steps is 28 like dev's or 4 like schnell's; a
    folder without guidance embedding has 4.

    Raises UserError if none of them says: a transformer without guidance embedding may be schnell or a de-distilled
    dev, which need other times.
    """
    like = row.like or ("dev" if params.guidance_embed else None)
    if row.like is not None and row.like not in STEPS:
        raise UserError(f"model.like {row.like!r}, expected {' or '.join(STEPS)}{nearest(row.like, STEPS)}")
    if row.schedule is not None:
        schedule = read_settings(row.schedule, "model.schedule")
        return _decision(schedule, like or _like(schedule), "as model.schedule says")
    if row.like is not None:
        return _decision(DEV if row.like == "dev" else SCHNELL, row.like, f"as model.like={row.like} says")
    if found is None:  # a row of configs/model whose files are still to be fetched
        schedule = DEV if params.guidance_embed else SCHNELL
        return _decision(schedule, like or "schnell", f"as FLUX.1 {like or 'schnell'}'s")
    if found.kind == "pipeline":
        schedule = sampling.read_schedule(found.path / "scheduler")
        return _decision(schedule, like or "schnell", f"as {found.path / 'scheduler'} says")
    if params.guidance_embed:
        return _decision(DEV, "dev", "as FLUX.1 dev's, since the transformer has a guidance embedding")
    for key, path in (("text", row.text), ("autoencoder", row.autoencoder)):
        schedule = _of_companion(path, row.variant, params)
        if schedule is not None:
            return _decision(schedule, "dev", f"as {path}/scheduler says, a model of the same sizes (model.{key})")
    raise UserError(
        f"{row.path}: has no guidance embedding, so it is like schnell or a de-distilled dev, and no file says which\n"
        "Pass like=schnell (4 steps, even times), like=dev (28 steps, shifted times) or schedule={shift: 3.0};\n"
        "on the command line model.like=dev or 'model.schedule={shift: 3.0}'"
    )


def _decision(schedule: Schedule, like: str, why: str) -> Decision:
    return Decision(schedule, like, why, STEPS[like])


def _like(schedule: Schedule) -> str:
    """Even times are schnell's, which takes 4 steps."""
    return "dev" if schedule.use_dynamic_shifting or schedule.shift != 1 else "schnell"


def _of_companion(path: str | None, variant: str | None, params: FluxParams) -> Schedule | None:
    """The schedule of another model's Diffusers folder, if that model has these sizes and its times are shifted."""
    folder = Path(path).expanduser() if path else None
    if folder is None or not (folder / "scheduler").is_dir() or not (folder / "transformer").is_dir():
        return None
    if open_network(TRANSFORMER, folder, variant).params != params:
        return None
    schedule = sampling.read_schedule(folder / "scheduler")
    return schedule if _like(schedule) == "dev" else None
