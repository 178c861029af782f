"""From noise to latents and back: plain functions around a velocity field `v(x, t)`."""

from fluxlab.sampling.denoise import OnStep, Velocity, euler, round_timesteps, with_negative
from fluxlab.sampling.invert import invert
from fluxlab.sampling.latents import image_ids, pack, text_ids, unpack
from fluxlab.sampling.noise import noise
from fluxlab.sampling.schedule import FLUX_SCHEDULE, Schedule, read_schedule, schedule

__all__ = [
    "FLUX_SCHEDULE",
    "OnStep",
    "Schedule",
    "Velocity",
    "euler",
    "image_ids",
    "invert",
    "noise",
    "pack",
    "read_schedule",
    "round_timesteps",
    "schedule",
    "text_ids",
    "unpack",
    "with_negative",
]
