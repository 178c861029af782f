"""Which schedule a model samples with, and why: what the user says, else what the files say."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from fluxlab import checkpoints, sampling
from fluxlab.checkpoints.files import read_json
from fluxlab.checkpoints.networks import TRANSFORMER, open_network
from fluxlab.config import LIKE, ModelRow
from fluxlab.errors import UserError, nearest
from fluxlab.families import FLUX2, family_of
from fluxlab.model import Flux2Params, FluxParams
from fluxlab.sampling import FLUX2_SCHEDULE, FLUX_SCHEDULE, Schedule, Schedule2

_DEV = replace(FLUX_SCHEDULE, shift=1.0)
_SCHNELL = replace(_DEV, use_dynamic_shifting=False)
_STEPS = {"dev": 28, "schnell": 4, "flux2": 50, "klein": 4}


class Decision(NamedTuple):
    """like: "dev", "schnell", "flux2" or "klein", which gives the number of steps. why: for the plan, a few words."""

    schedule: Schedule
    like: str
    why: str

    @property
    def steps(self) -> int:
        return _STEPS[self.like]

    def describe(self) -> str:
        """Return the schedule and the reason in a few words."""
        s = self.schedule
        if isinstance(s, Schedule2) and s.use_dynamic_shifting:
            shape = "times shifted by image size and steps"
        elif s.use_dynamic_shifting:
            shape = f"times shifted by image size (mu {s.base_shift:g} to {s.max_shift:g})"
        else:
            shape = "even times" if s.shift == 1 else f"times shifted by {s.shift:g} (mu {math.log(s.shift):.3g})"
        return f"{shape}: {self.why}"


def decide(row: ModelRow, found: "checkpoints.Found | None", params: FluxParams | Flux2Params) -> Decision:
    """Decide how a model's times are spread. found: what is at the row's path; None if it is still to be fetched.

    In this order: `schedule` and `like` of the row; the scheduler of the model's Diffusers folder; a guidance
    embedding, which only models like dev have; the scheduler of the folder that `text` or `autoencoder` names, if its
    model has the same sizes and its times are shifted. The number of steps is 28 like dev's or 4 like schnell's; a
    folder without guidance embedding has 4.

    Raises UserError if none of them says: a transformer without guidance embedding may be schnell or a de-distilled
    dev, which need other times.
    """
    if family_of(params) is FLUX2:
        return _decide_flux2(row, found, params)
    like = row.like or ("dev" if params.guidance_embed else None)
    if row.like is not None and row.like not in LIKE:
        raise UserError(f"model.like {row.like!r}, expected {' or '.join(LIKE)}{nearest(row.like, LIKE)}")
    if row.schedule is not None:
        schedule = read_settings(row.schedule, "model.schedule")
        return Decision(schedule, like or _like(schedule), "as model.schedule says")
    if row.like is not None:
        return Decision(_DEV if row.like == "dev" else _SCHNELL, row.like, f"as model.like={row.like} says")
    if found is None:  # a row of configs/model whose files are still to be fetched
        schedule = _DEV if params.guidance_embed else _SCHNELL
        return Decision(schedule, like or "schnell", f"as FLUX.1 {like or 'schnell'}'s")
    if found.kind == "pipeline":
        schedule = sampling.read_schedule(found.path / "scheduler")
        return Decision(schedule, like or "schnell", f"as {found.path / 'scheduler'} says")
    if params.guidance_embed:
        return Decision(_DEV, "dev", "as FLUX.1 dev's, since the transformer has a guidance embedding")
    for key, path in (("text", row.text), ("autoencoder", row.autoencoder)):
        schedule = _of_companion(path, row.variant, params)
        if schedule is not None:
            return Decision(schedule, "dev", f"as {path}/scheduler says, a model of the same sizes (model.{key})")
    raise UserError(
        f"{row.path}: has no guidance embedding, so it is like schnell or a de-distilled dev, and no file says which\n"
        "Pass like=schnell (4 steps, even times), like=dev (28 steps, shifted times) or schedule={shift: 3.0};\n"
        "on the command line model.like=dev or 'model.schedule={shift: 3.0}'"
    )


def _decide_flux2(row: ModelRow, found: "checkpoints.Found | None", params: Flux2Params) -> Decision:
    """Decide for FLUX.2, all of whose models share one rule. A distilled model, by its index, has 4 steps."""
    if row.like is not None:
        raise UserError(f"model.like {row.like!r}: says how FLUX.1 samples; leave it out for FLUX.2")
    folder = found.path if found is not None and found.kind == "pipeline" else None
    index = folder / "model_index.json" if folder else None
    distilled = bool(index and index.is_file() and read_json(index).get("is_distilled"))
    like = "klein" if distilled else "flux2"
    if row.schedule is not None:
        return Decision(read_settings(row.schedule, "model.schedule"), like, "as model.schedule says")
    if folder and (folder / "scheduler").is_dir():
        read = sampling.read_schedule(folder / "scheduler")
        return Decision(Schedule2(**asdict(read)), like, f"as {folder / 'scheduler'} says")
    return Decision(FLUX2_SCHEDULE, like, "as FLUX.2's")


def read_settings(settings: Mapping[str, Any], where: str) -> Schedule:
    """Return the schedule of {shift: 3.0}, {mu: 1.15} or the keys of Diffusers' scheduler_config.json.

    shift alone is the same at every image size; so is mu = log(shift). Raises UserError naming the key.
    """
    known = [f.name for f in fields(Schedule)] + ["mu"]
    if not isinstance(settings, Mapping) or not settings:
        raise UserError(f"{where}: {settings!r}, expected for instance {{shift: 3.0}} or {{mu: 1.15}}")
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key, expected {', '.join(known)}{nearest(key, known)}")
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        positive = key in ("shift", "base_image_seq_len", "max_image_seq_len")
        if key not in ("use_dynamic_shifting", "time_shift_type") and not (number and (value > 0 or not positive)):
            raise UserError(f"{where}.{key}: {value!r}, expected a {'positive' if positive else 'finite'} number")
    values = {key: value for key, value in settings.items() if key != "mu"}
    if not isinstance(values.get("use_dynamic_shifting", True), bool):
        raise UserError(f"{where}.use_dynamic_shifting: {values['use_dynamic_shifting']!r}, expected true or false")
    if values.get("time_shift_type", "exponential") not in ("exponential", "linear"):
        raise UserError(f"{where}.time_shift_type: {values['time_shift_type']!r}, expected exponential or linear")
    if "mu" in settings:
        if len(settings) > 1:
            raise UserError(f"{where}: mu is the same at every image size, so give it alone (mu = log(shift))")
        values = {"shift": math.exp(settings["mu"])}
    constant = "shift" in values and not {"base_shift", "max_shift"} & set(values)
    return replace(_DEV, **{"use_dynamic_shifting": not constant, **values})


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
