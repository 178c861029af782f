"""Settings, schedules, packing, noise and the sampler loops."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxlab import sampling
from fluxlab.errors import UserError
from fluxlab.sampling import Sampling, Schedule, euler, image_ids, invert, noise, pack, read_schedule, schedule, unpack


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_unpack_undoes_pack(batch, channels, rows, cols):
    z = torch.arange(batch * channels * rows * cols * 4.0).reshape(batch, channels, 2 * rows, 2 * cols)
    assert torch.equal(unpack(pack(z), rows, cols), z)


def test_pack_puts_channel_before_row_before_column():
    z = torch.arange(2 * 2 * 4.0).reshape(1, 2, 2, 4)  # two channels, one row of two patches
    assert pack(z).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]


def test_ids_are_row_and_column_in_raster_order():
    assert image_ids(1, 2, 3)[0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert image_ids(2, 2, 3).dtype == torch.float32


@given(st.integers(1, 60), st.integers(1, 20000), st.booleans())
def test_schedule_falls_from_one_to_zero(steps, tokens, shift):
    times = schedule(steps, tokens, shift=shift)
    assert len(times) == steps + 1
    assert times[0] == 1
    assert times[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(times))


def test_schedule_without_steps_raises():
    with pytest.raises(ValueError, match="steps=0"):
        schedule(0, 256)


def test_noise_depends_on_the_seed_only():
    together = noise([3, 5, 3], 4, 6, 8)
    assert torch.equal(together[1:2], noise([5], 4, 6, 8))
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", True])
def test_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match="seed"):
        noise([seed], 4, 6, 8)


def test_euler_follows_a_straight_path_exactly():
    start, end = torch.randn(2, 5), torch.randn(2, 5)
    seen = []
    result = euler(lambda x, t: start - end, start, [1.0, 0.6, 0.1, 0.0], lambda i, t, x: seen.append((i, t)))
    assert torch.allclose(result, end, atol=1e-6)
    assert seen == [(0, 0.6), (1, 0.1), (2, 0.0)]


def test_inversion_returns_to_the_image():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 3

    def velocity(x, t):
        return torch.tanh(x @ matrix) + t

    image = torch.randn(2, 6, dtype=torch.float64)
    times = schedule(10, 256)
    errors = [
        (euler(velocity, invert(velocity, image, times, n), times) - image).abs().max().item() for n in (1, 2, 5, 10)
    ]
    assert errors[0] > 1e-3
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_true_guidance_extrapolates_from_the_negative():
    velocity = sampling.with_negative(lambda x, t: 2 * x, lambda x, t: x, 3.0)
    assert torch.equal(velocity(torch.ones(2), 0.5), torch.full((2,), 4.0))


def test_rounded_timesteps():
    """At 4,096 tokens the two reference implementations differ in 7 of 28 and 17 of 50 steps, by up to 4."""
    for steps, differing in ((28, 7), (50, 17)):
        t = torch.tensor(schedule(steps, 4096)[:-1])
        gap = 1000 * (sampling.round_timesteps(t, "bfl") - sampling.round_timesteps(t, "diffusers")).abs()
        assert (gap > 1e-3).sum() == differing
        assert gap.max().item() == pytest.approx(4.0, abs=1e-3)
    assert 1000 * sampling.round_timesteps(torch.tensor([3.5]), "bfl").item() == pytest.approx(3504)
    with pytest.raises(ValueError, match="bf16"):
        sampling.round_timesteps(t, "bf16")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"shift_terminal": 0.02}, "shift_terminal=0.02"),
        ({"time_shift_type": "cubic"}, "cubic"),
    ],
)
def test_unsupported_schedulers_raise(tmp_path, config, message):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_schedule(tmp_path)


def test_schedule_is_read_back_from_its_file(tmp_path):
    for settings in (Schedule(base_shift=0.3, max_shift=1.3), Schedule(use_dynamic_shifting=False, shift=3.0)):
        (tmp_path / "scheduler_config.json").write_text(json.dumps(settings.config()))
        assert read_schedule(tmp_path) == settings


def test_settings_remember_what_was_changed():
    """Digests contain changed settings only: a new setting must not rename the folders and cells of old runs."""
    assert Sampling().changed() == {}
    assert Sampling(steps=4, truncate=True, unknown_words="error").changed() == {"steps": 4, "truncate": True}


def test_model_values_fill_settings_that_are_not_given():
    filled = Sampling(steps=4, guidance=0.0).filled(Sampling(steps=28, guidance=3.5, height=512))
    assert (filled.steps, filled.guidance, filled.height, filled.width) == (4, 0.0, 512, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: expected a whole number, at least 1"),
        ({"height": True}, "height=True: expected a whole number"),
        ({"max_sequence_length": 1.5}, "max_sequence_length=1.5"),
        ({"guidance": float("inf")}, "guidance=inf: expected a finite number"),
        ({"true_cfg": "4"}, "true_cfg='4': expected a finite number"),
        ({"dtype": "bf16"}, "dtype='bf16': expected float32, bfloat16 or float16"),
        ({"dtype": "float61"}, "did you mean float16"),
        ({"timestep_rounding": "BFL2"}, "timestep_rounding='BFL2': expected bfl or diffusers"),
        ({"unknown_words": None}, "unknown_words=None: expected error, allow or warn"),
        ({"truncate": 1}, "truncate=1: expected true or false"),
        ({"negative_prompt": "a dog"}, "negative_prompt has no effect without true_cfg"),
        ({"negative_prompt": 3, "true_cfg": 2.0}, "negative_prompt=3: expected a string"),
    ],
)
def test_settings_that_no_model_accepts(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings).check()
