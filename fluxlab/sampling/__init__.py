"""Sampling: settings, noise, schedules, and the loops from noise to latents and back, around a velocity `v(x, t)`."""

from fluxlab.sampling.denoise import OnStep, Velocity, euler, round_timesteps, with_negative
from fluxlab.sampling.finite import FiniteCheck, finite_samples, sample_names
from fluxlab.sampling.invert import invert
from fluxlab.sampling.latents import image_ids, pack, text_ids, unpack
from fluxlab.sampling.noise import noise
from fluxlab.sampling.schedule import FLUX_SCHEDULE, Schedule, read_schedule, schedule
from fluxlab.sampling.shared import Rows, own_rows, shared_rows
from fluxlab.settings import Sampling

__all__ = [
    "FLUX_SCHEDULE",
    "FiniteCheck",
    "OnStep",
    "Rows",
    "Sampling",
    "Schedule",
    "Velocity",
    "euler",
    "finite_samples",
    "image_ids",
    "invert",
    "noise",
    "own_rows",
    "pack",
    "read_schedule",
    "round_timesteps",
    "sample_names",
    "schedule",
    "shared_rows",
    "text_ids",
    "unpack",
    "with_negative",
]
