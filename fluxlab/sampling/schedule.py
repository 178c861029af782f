"""The times of the sampling steps: FLUX's resolution-dependent shift, and the schedules of Diffusers folders."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fluxlab.errors import UserError
from fluxlab.settings import check_count

# Settings of Diffusers' FlowMatchEulerDiscreteScheduler that FLUX.1 does not use. Other values would change the times.
_UNUSED = {
    "invert_sigmas": False,
    "num_train_timesteps": 1000,  # the network receives 1000·t; Diffusers would pass another multiple
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Schedule:
    """The parameters of a schedule, named as in Diffusers' `scheduler_config.json`.

    With `use_dynamic_shifting`, μ is linear in the number of packed image tokens, through the points
    (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift). Otherwise the constant `shift` applies. 1 is no
    shift, as in FLUX.1 schnell.
    """

    use_dynamic_shifting: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift: float = 1.0
    time_shift_type: str = "exponential"

    def times(self, num_steps: int, image_seq_len: int) -> list[float]:
        """Return `num_steps + 1` times from 1 (noise) to 0 (image), for `image_seq_len` packed image tokens.

        Raises `UserError` unless `num_steps` is a whole number, at least 1.
        """
        if num_steps is None:
            raise UserError("steps=None: expected a whole number, at least 1")
        check_count("steps", num_steps)
        times = [1 - i / num_steps for i in range(num_steps + 1)]
        if not self.use_dynamic_shifting:
            return [self.shift * t / (1 + (self.shift - 1) * t) for t in times]
        mu = self.mu(num_steps, image_seq_len)
        shift = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return [shift / (shift + (1 / t - 1)) if t > 0 else 0.0 for t in times]

    def mu(self, num_steps: int, image_seq_len: int) -> float:
        """Return the μ of dynamic shifting. FLUX.1's does not depend on the number of steps."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (image_seq_len - self.base_image_seq_len)

    def describe(self) -> str:
        """Return how times are spread, in a few words."""
        if self.use_dynamic_shifting:
            return f"times shifted by image size (mu {self.base_shift:g} to {self.max_shift:g})"
        return "even times" if self.shift == 1 else f"times shifted by {self.shift:g} (mu {math.log(self.shift):.3g})"

    def config(self) -> dict:
        """Return the content of a `scheduler_config.json` for Diffusers."""
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **asdict(self)}


FLUX_SCHEDULE = Schedule(shift=3.0)  # FLUX.1 dev's file has this constant shift, unused with dynamic shifting


def schedule(
    num_steps: int, image_seq_len: int, *, shift: bool = True, base_shift: float = 0.5, max_shift: float = 1.15
) -> list[float]:
    """Return `num_steps + 1` times from 1 to 0, as in the original release of FLUX.1.

    t ← e^μ / (e^μ + 1/t - 1), where μ is linear in `image_seq_len`, the number of packed image tokens: `base_shift` at
    256 and `max_shift` at 4,096. `shift=False` (schnell) returns evenly spaced times. Raises `UserError` for less than
    one step.
    """
    return Schedule(use_dynamic_shifting=shift, base_shift=base_shift, max_shift=max_shift).times(
        num_steps, image_seq_len
    )


def read_schedule(path: str | Path) -> Schedule:
    """Return the schedule of a Diffusers `scheduler/` folder or its `scheduler_config.json`.

    Raises `UserError`, naming the file and key, for another scheduler class and for settings that FLUX.1 does not use:
    ignoring them would sample at other times than the file says.
    """
    file = Path(path)
    file = file / "scheduler_config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a readable scheduler config ({error})") from None
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UserError(f"{file}: scheduler {name} is not supported, expected FlowMatchEulerDiscreteScheduler")
    for key, neutral in _UNUSED.items():
        if config.get(key, neutral) not in (neutral, None):
            raise UserError(f"{file}: {key}={config[key]} is not supported, expected {neutral}")
    if config.get("time_shift_type", "exponential") not in ("exponential", "linear"):
        raise UserError(f"{file}: time_shift_type={config['time_shift_type']}, expected exponential or linear")
    # a missing key means Diffusers' default, False; the default of `Schedule` is that of FLUX.1 dev
    known = {"use_dynamic_shifting": False}
    known |= {f.name: config[f.name] for f in fields(Schedule) if config.get(f.name) is not None}
    return Schedule(**known)
