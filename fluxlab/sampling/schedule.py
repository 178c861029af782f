"""Which times a run visits: FLUX's resolution-dependent shift, and what a Diffusers scheduler folder asks for."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fluxlab.errors import UserError
from fluxlab.settings import check_count

# Settings of Diffusers' FlowMatchEulerDiscreteScheduler that change the times in ways FLUX.1 does not use.
_UNUSED = {
    "invert_sigmas": False,
    "num_train_timesteps": 1000,  # the network is given 1000 t; Diffusers would give it another multiple
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


@dataclass(frozen=True)
class Schedule:
    """How times are spread, under the names that Diffusers' `scheduler_config.json` gives them.

    With `use_dynamic_shifting`, μ is linear in the packed image token count, through (base_image_seq_len, base_shift)
    and (max_image_seq_len, max_shift); otherwise the constant `shift` applies (1 = none, as FLUX.1 schnell).
    """

    use_dynamic_shifting: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift: float = 1.0
    time_shift_type: str = "exponential"

    def times(self, num_steps: int, image_seq_len: int) -> list[float]:
        """`num_steps + 1` times from 1 (noise) to 0 (image) for `image_seq_len` packed image tokens."""
        if num_steps is None:
            raise UserError("steps=None: expected a whole number, at least 1")
        check_count("steps", num_steps)
        times = [1 - i / num_steps for i in range(num_steps + 1)]
        if not self.use_dynamic_shifting:
            return [self.shift * t / (1 + (self.shift - 1) * t) for t in times]
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (image_seq_len - self.base_image_seq_len)
        pull = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return [pull / (pull + (1 / t - 1)) if t > 0 else 0.0 for t in times]

    def config(self) -> dict:
        """What a Diffusers folder's `scheduler_config.json` holds for these settings."""
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **asdict(self)}


FLUX_SCHEDULE = Schedule(shift=3.0)  # FLUX.1 dev's file also carries a constant shift, unused while shifting is dynamic


def schedule(
    num_steps: int, image_seq_len: int, *, shift: bool = True, base_shift: float = 0.5, max_shift: float = 1.15
) -> list[float]:
    """`num_steps + 1` times from 1 to 0, as FLUX.1's original release spreads them.

    t ← e^μ / (e^μ + 1/t - 1), μ linear in `image_seq_len`, the number of packed image tokens: `base_shift` at 256,
    `max_shift` at 4,096. `shift=False` (schnell) keeps them even. Raises `UserError` for less than one step.
    """
    return Schedule(use_dynamic_shifting=shift, base_shift=base_shift, max_shift=max_shift).times(
        num_steps, image_seq_len
    )


def read_schedule(path: str | Path) -> Schedule:
    """The schedule of a Diffusers `scheduler/` folder or its `scheduler_config.json`.

    Raises `UserError` naming the file and key for another scheduler class or a setting that FLUX.1 has no use for:
    sampling on with other times than the file asks for would be another experiment.
    """
    file = Path(path)
    file = file / "scheduler_config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: no readable scheduler config ({error})") from None
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UserError(f"{file}: scheduler {name} is not supported, only FlowMatchEulerDiscreteScheduler")
    for key, neutral in _UNUSED.items():
        if config.get(key, neutral) not in (neutral, None):
            raise UserError(f"{file}: {key}={config[key]} is not supported, only {neutral}")
    if config.get("time_shift_type", "exponential") not in ("exponential", "linear"):
        raise UserError(f"{file}: time_shift_type={config['time_shift_type']}, expected exponential or linear")
    # Diffusers' own default is no dynamic shifting; ours is FLUX.1 dev's
    known = {"use_dynamic_shifting": False}
    known |= {f.name: config[f.name] for f in fields(Schedule) if config.get(f.name) is not None}
    return Schedule(**known)
