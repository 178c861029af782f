"""How a model samples when the user says, when its files say, and when nobody does."""

import math
from dataclasses import replace

import pytest
import torch

from fluxlab import load_pipeline, sampling
from fluxlab.checkpoints import Found, find, save_autoencoder, save_transformer
from fluxlab.checkpoints.random import write_random
from fluxlab.config import ModelRow, model_row
from fluxlab.errors import UserError
from fluxlab.model import TRANSFORMERS
from fluxlab.sampling import Schedule
from fluxlab.schedules import decide, read_settings

DEV = Schedule()
EVEN = Schedule(use_dynamic_shifting=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Diffusers folder without guidance embedding; its times are shifted by image size."""
    return write_random(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """Its networks as single files. Tests that name the folder for the text encoders say so."""
    target = tmp_path_factory.mktemp("single")
    pipe = load_pipeline(folder, device="cpu")
    save_transformer(pipe.transformer, target / "flux.safetensors")
    save_autoencoder(pipe.autoencoder, target / "ae.safetensors")
    return target


def row(path, **more):
    return ModelRow("local", str(path), **more)


def alone(**more):
    """The decision for a single file without guidance embedding."""
    found = Found("transformer", None, frozenset(["transformer"]))
    return decide(row("flux.safetensors", **more), found, TRANSFORMERS["schnell"])


def test_a_file_that_does_not_say_is_refused():
    with pytest.raises(UserError) as error:
        alone()
    message = str(error.value)
    assert len(message.splitlines()) == 3
    for words in ("flux.safetensors: has no guidance embedding", "like=dev", "like=schnell", "schedule={shift: 3.0}"):
        assert words in message
    assert "model.like=dev" in message


def test_what_the_user_says_comes_first(folder):
    assert alone(like="schnell")[:2] == (EVEN, "schnell")
    assert alone(like="schnell").steps == 4
    assert alone(like="dev")[:2] == (DEV, "dev")
    assert alone(like="dev").steps == 28
    decision = decide(row(folder, schedule={"shift": 3.0}), find(folder), TRANSFORMERS["dev"])
    assert decision.schedule == replace(EVEN, shift=3.0)
    assert "times shifted by 3 (mu 1.1): as model.schedule says" in decision.describe()
    assert alone(schedule={"shift": 3.0}).steps == 28
    assert alone(schedule={"shift": 3.0}, like="schnell").steps == 4
    with pytest.raises(UserError, match=r"model.like 'def', expected dev or schnell; did you mean dev"):
        alone(like="def")


def test_a_guidance_embedding_means_dev():
    decision = decide(row("x"), Found("transformer", None), TRANSFORMERS["dev"])
    assert decision[:2] == (DEV, "dev")
    assert "guidance embedding" in decision.describe()


def test_a_folder_s_scheduler_counts(folder):
    decision = decide(row(folder), find(folder), TRANSFORMERS["schnell"])
    assert decision.schedule == sampling.read_schedule(folder / "scheduler")
    assert str(folder / "scheduler") in decision.why


def test_a_companion_of_the_same_sizes_counts_if_its_times_are_shifted(folder, single, tmp_path):
    parts = {"autoencoder": str(single / "ae.safetensors"), "text": str(folder)}
    found = find(single / "flux.safetensors")
    params = load_pipeline(folder, device="cpu").transformer.params
    decision = decide(row(single / "flux.safetensors", **parts), found, params)
    assert decision[:2] == (sampling.read_schedule(folder / "scheduler"), "dev")
    assert f"as {folder}/scheduler says" in decision.why
    with pytest.raises(UserError, match="like=dev"):  # another model's folder
        decide(row(single / "flux.safetensors", **parts), found, replace(params, depth=3))
    write_random(tmp_path / "even")
    file = tmp_path / "even" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"use_dynamic_shifting": true', '"use_dynamic_shifting": false'))
    with pytest.raises(UserError, match="like=dev"):  # text encoders of schnell are used with every model
        decide(row(single / "flux.safetensors", **{**parts, "text": str(tmp_path / "even")}), found, params)


def test_the_pipeline_samples_as_decided(folder, single):
    common = {"autoencoder": single / "ae.safetensors", "text": folder, "device": "cpu"}
    pipe = load_pipeline(single / "flux.safetensors", schedule={"mu": 1.15}, **common)
    for tokens in (16, 4096):
        times = [t / 4 for t in (4, 3, 2, 1)]
        expected = [math.exp(1.15) / (math.exp(1.15) + 1 / t - 1) for t in times] + [0]
        assert pipe.schedule.times(4, tokens) == pytest.approx(expected)
    assert (pipe.steps, load_pipeline(single / "flux.safetensors", like="schnell", **common).steps) == (28, 4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shift": 3}, replace(EVEN, shift=3)),
        ({"mu": 0.0}, EVEN),
        ({"base_shift": 0.4, "max_shift": 1.0}, replace(DEV, base_shift=0.4, max_shift=1.0)),
        ({"use_dynamic_shifting": True, "shift": 3.0}, replace(DEV, shift=3.0)),
        ({"use_dynamic_shifting": False}, EVEN),
    ],
)
def test_settings_of_a_schedule(settings, expected):
    assert read_settings(settings, "model.schedule") == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shfit": 3}, "model.schedule.shfit: unknown key"),
        ({"shift": 0}, "model.schedule.shift: 0, expected a positive number"),
        ({"shift": "3"}, "expected a positive number"),
        ({"mu": float("nan")}, "model.schedule.mu: nan, expected a finite number"),
        ({"mu": True}, "expected a finite number"),
        ({"mu": 1.0, "shift": 3}, "give it alone"),
        ({"time_shift_type": "cubic"}, "expected exponential or linear"),
        ({"use_dynamic_shifting": "no"}, "expected true or false"),
        ({}, "expected for instance {shift: 3.0}"),
        (3.0, "expected for instance {shift: 3.0}"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(UserError) as error:
        read_settings(settings, "model.schedule")
    assert words in str(error.value)


def test_keys_that_older_stores_do_not_know_are_left_out_unless_set():
    assert {"like", "schedule", "tokenizers"} & set(row("x").values()) == set()
    assert row("x", like="dev").values()["like"] == "dev"
    assert model_row({"name": "a", "path": "b", "schedule": {"shift": 3}}, "here").schedule == {"shift": 3}


def test_a_scheduler_with_another_number_of_training_steps_is_refused(folder, tmp_path):
    config = (folder / "scheduler" / "scheduler_config.json").read_text()
    (tmp_path / "scheduler_config.json").write_text(config.replace(": 1000", ": 500"))
    with pytest.raises(UserError, match="num_train_timesteps=500 is not supported, expected 1000"):
        sampling.read_schedule(tmp_path)


def test_text_encoders_of_other_widths_are_refused(folder, single, tmp_path):
    from fluxlab.checkpoints.random import random_text_encoders
    from fluxlab.pipeline import Pipeline

    pipe: Pipeline = load_pipeline(folder, device="cpu")
    text = random_text_encoders(32, 16)
    pipe.text = text
    pipe.save(tmp_path / "other")
    with pytest.raises(UserError, match="this CLIP gives 16 channels, the transformer takes 24"):
        load_pipeline(tmp_path / "other", device="cpu")


def test_the_default_device_is_the_best_there_is(folder, monkeypatch):
    assert load_pipeline(folder).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    from fluxlab.checkpoints import default_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == "cuda"
