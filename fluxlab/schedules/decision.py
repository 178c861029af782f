"""A schedule and why it was chosen, and the schedules that users write down."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from numbers import Real
from typing import Any, NamedTuple

from fluxlab.errors import UserError, nearest
from fluxlab.sampling import FLUX_SCHEDULE, Schedule


class Decision(NamedTuple):
    """like: the published model whose number of steps is the default. why: for the plan, a few words. distilled: the
    model was distilled to few steps and takes no guidance."""

    schedule: Schedule
    like: str
    why: str
    steps: int
    distilled: bool = False

    def describe(self) -> str:
        """Return the schedule and the reason in a few words."""
        return f"{self.schedule.describe()}: {self.why}"


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
    return replace(FLUX_SCHEDULE, **{"shift": 1.0, "use_dynamic_shifting": not constant, **values})
