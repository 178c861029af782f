"""Schedules compared with those of the original implementation and of Diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest

from fluxlab.sampling import Schedule, read_schedule, schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['num_steps']}-{c['image_seq_len']}-{c['shift']}")
def test_golden_schedule(case):
    times = schedule(case["num_steps"], case["image_seq_len"], shift=case["shift"])
    assert times == pytest.approx(case["timesteps"], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0, "max_image_seq_len": 1000},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": False, "shift": 3.0},
    ],
)
def test_diffusers_scheduler(tmp_path, options):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = FlowMatchEulerDiscreteScheduler(**options)
    theirs.save_pretrained(tmp_path)
    ours = read_schedule(tmp_path)
    assert isinstance(ours, Schedule)
    for steps, tokens in ((4, 256), (28, 4096), (7, 90)):
        c = theirs.config
        mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert ours.times(steps, tokens) == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "4", True])
def test_steps_must_be_a_whole_number(steps):
    with pytest.raises(ValueError, match=f"steps={steps!r}: expected a whole number"):
        schedule(steps, 256)
