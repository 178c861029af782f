"""Experiments, cells, batches and the store, without a model."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxlab.compose import compose
from fluxlab.config import ModelRow, config_folder
from fluxlab.experiment.cells import Settings, batches, cell_key, cells, references
from fluxlab.experiment.spec import SCHEMA, Experiment, checked, read_seeds, read_variants
from fluxlab.experiment.store import open_store
from fluxlab.positions import Program
from fluxlab.probes import Capture, Captured
from fluxlab.run import RunConfig
from fluxlab.sampling import Sampling

SCALE = Program.from_config({"a": {"op": "scale", "factor": 1.5}})
SETTINGS = Settings(
    model_digest="m",
    height=64,
    width=64,
    steps=4,
    schedule={"shift": 1.0},
    guidance=None,
    true_cfg=None,
    negative_prompt=None,
    max_sequence_length=24,
    device="cpu",
    dtype="float32",
    batch_tokens=1000,
    threads=2,
    kernel="sdpa",
    tokens=280,
    pixels_per_token=4,
)


def experiment(**changes):
    values = {
        "name": "test",
        "model": ModelRow("tiny", "somewhere"),
        "model_digest": "m",
        "variants": {"half": SCALE, "baseline": Program(), "same": Program()},
        "prompts": ("a cat", "a dog"),
        "seeds": (0, 1, 2),
    }
    return checked(Experiment(**{**values, **changes}))


def test_cells_come_baseline_first_then_as_listed():
    made = cells(experiment(), SETTINGS)
    assert [c.variant for c in made[::6]] == ["baseline", "half", "same"]
    assert [(c.prompt, c.seed) for c in made[:6]] == [(p, s) for p in ("a cat", "a dog") for s in (0, 1, 2)]
    assert made[0].key == made[12].key  # variants of one program are one picture
    assert len({c.key for c in made}) == 12


def test_a_picture_s_key_knows_everything_it_depends_on_and_nothing_else():
    key = cell_key(SETTINGS, "a cat", 0, SCALE)
    for changed in (
        {"model_digest": "n"},
        {"height": 48},
        {"steps": 5},
        {"schedule": {"shift": 2.0}},
        {"guidance": 3.5},
        {"true_cfg": 2.0},
        {"negative_prompt": "x"},
        {"max_sequence_length": 12},
        {"device": "cuda"},
        {"dtype": "bfloat16"},
    ):
        assert cell_key(replace(SETTINGS, **changed), "a cat", 0, SCALE) != key, changed
    for same in ({"batch_tokens": 9}, {"threads": 1}, {"device": "cpu:0"}, {"kernel": "other"}):
        assert cell_key(replace(SETTINGS, **same), "a cat", 0, SCALE) == key
    assert cell_key(SETTINGS, "a cat", 1, SCALE) != key != cell_key(SETTINGS, "a cat ", 0, SCALE)
    spelt = Program.from_config({"other": {"factor": [1.5, 1.5, 1.50], "op": "scale"}})
    assert cell_key(SETTINGS, "a cat", 0, spelt) == key


def test_the_experiment_s_digest():
    digest = experiment().digest
    assert digest == experiment(name="other", caption="x", clip="c").digest
    assert digest == experiment(model=ModelRow("renamed", "elsewhere")).digest
    assert digest == experiment(guidance=None).digest
    assert experiment(guidance=4).digest == experiment(guidance=4.0).digest != digest
    for changes in (
        {"seeds": (0, 1)},
        {"prompts": ("a cat",)},
        {"variants": {"baseline": Program()}},
        {"steps": 9},
        {"model_digest": "n"},
        {"model": ModelRow("tiny", "somewhere", steps=3)},
    ):
        assert experiment(**changes).digest != digest, changes


def test_digests_and_keys_of_release_0_1_stay():
    """Otherwise runs from before would not be found in their folders, and their images would be computed again."""
    assert experiment().digest == "15bddb244c0e"
    assert (
        experiment(guidance=3, dtype="float32", capture=Capture.from_config({"w": {"kind": "words"}})).digest
        == "1cdf0848c76b"
    )
    assert cell_key(SETTINGS, "a cat", 0, SCALE) == "0467ea6dd8ef747a426890f2989ef1bb"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("timestep_rounding", "bfl"), ("truncate", True), ("unknown_words", "allow"), ("max_sequence_length", 12)],
)
def test_settings_added_later_count_only_where_they_are_used(setting, value):
    plain, changed = experiment(), experiment(**{setting: value})
    assert changed.digest != plain.digest
    assert getattr(changed.sampling, setting) == changed.request()[setting] == value
    assert setting not in plain.request()
    used = replace(SETTINGS, **{setting: value})
    assert cell_key(used, "a cat", 0, SCALE) != cell_key(SETTINGS, "a cat", 0, SCALE)
    assert used.record()[setting] == value
    assert (setting in SETTINGS.record()) == (setting == "max_sequence_length")
    assert getattr(used.sampling, setting) == value


def test_every_setting_of_sampling_is_a_key_of_a_config():
    for f in fields(Sampling):
        assert RunConfig.__dataclass_fields__[f.name].default == f.default
        assert f"{f.name}:" in (config_folder() / "config.yaml").read_text()
    config = compose("config", RunConfig, "schema", ["+exp=hello", "truncate=true", "timestep_rounding=bfl"])
    assert (config.truncate, config.timestep_rounding) == (True, "bfl")


def test_what_is_captured_is_asked_for_and_changes_no_picture():
    config = {
        "max_mb": 300,
        "cats": {"kind": "words", "words": ["cat"], "blocks": {"double": "0-3"}, "average": "heads"},
        "two": {"kind": "regions", "regions": {"sky": {"box": [0, 0, 4, 16]}, "rest": {"mask": ["..##", "...."]}}},
        "where": {"kind": "peak", "steps": {"sigma": [0.7, 1]}, "heads": [0, 1]},
    }
    asked = experiment(capture=Capture.from_config(config))
    assert asked.digest == experiment().digest
    assert asked.request() != experiment().request()
    assert yaml.safe_load(yaml.safe_dump(asked.request())) == asked.request()  # plain values, as the store keeps them
    assert Capture.from_config(asked.request()["capture"]) == asked.capture
    assert experiment().request()["capture"] == {}
    assert experiment().captures == ""
    more = experiment(capture=Capture.from_config({**config, "max_mb": 400}))
    assert asked.captures == more.captures
    assert len(asked.captures) == 12
    for other in (
        {"cats": config["cats"]},
        {**config, "cats": {"kind": "words"}},
        {"dogs" if name == "cats" else name: request for name, request in config.items()},
        {**config, "two": {"kind": "regions", "regions": dict(reversed(config["two"]["regions"].items()))}},
    ):
        assert experiment(capture=Capture.from_config(other)).captures != asked.captures


def test_similarity_is_not_for_runs():
    with pytest.raises(ValueError, match=r"capture\.alike\.kind: similarity compares samples of one batch") as told:
        experiment(capture=Capture.from_config({"alike": {"kind": "similarity"}}))
    assert len(str(told.value).splitlines()) == 3
    assert "fluxlab.probes.similarity(a, b)" in str(told.value)


def test_references():
    made = references(experiment(), SETTINGS)
    assert [(c.variant, c.prompt, c.seed) for c in made] == [("noise floor", "a cat", 0), ("noise floor", "a dog", 0)]
    alone = references(experiment(seeds=(5,)), SETTINGS)
    assert [(c.variant, c.seed) for c in alone] == [("noise floor", 5)] * 2 + [("another seed", 4)] * 2
    assert made[0].program.describe().startswith("offset by [3, -2.5, 7] on all")


@given(st.integers(1, 5000), st.integers(1, 6), st.integers(1, 4))
def test_batches_hold_every_distinct_cell_once_in_order_and_keep_to_the_limit(batch_tokens, seeds, prompts):
    settings = replace(SETTINGS, batch_tokens=batch_tokens)
    asked = experiment(seeds=tuple(range(seeds)), prompts=tuple("abcd"[:prompts]))
    made = cells(asked, settings)
    parts = batches(made, settings)
    assert [c.key for part in parts for c in part] == list(dict.fromkeys(c.key for c in made))
    assert all(len(part) * settings.tokens <= batch_tokens or len(part) == 1 for part in parts)
    assert len({len(part) for part in parts[:-1]}) <= 1


def test_seeds():
    assert read_seeds(3) == (0, 1, 2)
    assert read_seeds([5, 3]) == (5, 3)
    assert read_seeds(list(np.arange(2))) == (0, 1)
    for wrong in (0, -1, True, 10**4000, [], [1, 1], [-1], [1.5], ["a"], "4", None, 2.0, [2**63], 10**9, {}):
        with pytest.raises(ValueError, match="seeds="):
            read_seeds(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "nothing"}, "baseline=nothing: no such variant"),
        ({"variants": {}}, "variants={}: expected at least one"),
        ({"prompts": ()}, r"prompts=\[\]: expected at least one"),
        ({"prompts": ("a", "b", "a")}, "'a' occurs twice"),
        ({"height": 0}, "height=0"),
        ({"height": 10**6}, "height=1000000: expected a whole number from 1 to 65536"),
        ({"steps": 10**20}, "steps=1000+: expected a whole number from 1 to 10000"),
        ({"guidance": 1e39}, r"guidance=1e\+39: expected a number of at most 3.4e\+38"),
        ({"dtype": "int8"}, "dtype='int8': expected float32, bfloat16 or float16"),
        ({"unknown_words": "skip"}, "unknown_words='skip': expected error, allow or warn"),
        ({"name": "n" * 300}, "name=nnn.*at most 100 letters"),
        ({"steps": -3}, "steps=-3"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"true_cfg": float("inf")}, "true_cfg=inf"),
        ({"negative_prompt": "x"}, "negative_prompt has no effect without true_cfg"),
        ({"name": "../up"}, "name=../up"),
    ],
)
def test_what_cannot_be_asked_for(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment(**changes)


def test_variants_are_named_in_errors():
    with pytest.raises(ValueError, match=r"variants\.half\.a\.factor"):
        read_variants({"half": {"a": {"op": "scale", "factor": "wide"}}})
    for name in ("a/b", "", "noise floor", "../x", "x" * 300):
        with pytest.raises(ValueError, match="is not a valid name"):
            read_variants({name: {}})


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))


def test_a_cell_is_there_once_it_is_whole(tmp_path, picture):
    cell = cells(experiment(), SETTINGS)[0]
    with open_store(tmp_path / "s") as store:
        assert not store.has(cell)
        file = store.put(cell, picture, {"steps": 4})
        assert store.has(cell)
        assert json.loads(file.with_suffix(".json").read_text())["prompt"] == "a cat"
        before = file.stat().st_mtime_ns
        store.put(cell, picture, {})
        assert file.stat().st_mtime_ns == before  # never rewritten
        file.write_bytes(file.read_bytes()[:-1])
        assert not store.has(cell)  # damaged
        file.unlink()
        assert not store.has(cell)


def test_a_note_tells_the_hash_of_what_was_written(tmp_path, picture):
    from fluxlab.files import sha256_of

    with open_store(tmp_path / "s") as store:
        file = store.put(cells(experiment(), SETTINGS)[0], picture, {})
    assert json.loads(file.with_suffix(".json").read_text())["sha256"] == sha256_of(file)


def test_arrays_are_there_once_they_are_whole(tmp_path):
    cell = cells(experiment(), SETTINGS)[0]
    arrays = {"a": Captured(np.arange(6, dtype=np.float32).reshape(2, 3), ("row", "col"), {}, {"unit": "1"})}
    with open_store(tmp_path / "s") as store:
        assert not store.has_arrays(cell, "c" * 12)
        store.put_arrays(cell, "c" * 12, arrays)
        file = store.arrays(cell.key, "c" * 12)
        assert file.relative_to(store.path).as_posix() == f"attention/{'c' * 12}/{cell.key}.safetensors"
        assert store.has_arrays(cell, "c" * 12)
        assert not store.has_arrays(cell, "d" * 12)
        before = file.read_bytes(), file.stat().st_mtime_ns
        store.put_arrays(cell, "c" * 12, arrays)
        assert file.stat().st_mtime_ns == before[1]  # never rewritten
        for length in (len(before[0]) - 1, len(before[0]) // 2, 4, 0):
            file.write_bytes(before[0][:length])
            assert not store.has_arrays(cell, "c" * 12), length
        store.put_arrays(cell, "c" * 12, arrays)
        assert file.read_bytes() == before[0]


def test_a_store_reads_back_what_was_written(tmp_path, picture):
    asked = experiment()
    with open_store(tmp_path / "s") as store:
        store.write_experiment(asked, SETTINGS, {"torch": "2"}, "the command")
        store.put(cells(asked, SETTINGS)[0], picture, {})
        store.write("metrics.csv", "a\n")
        store.seal()
    with open_store(tmp_path / "s") as store:
        assert store.settings() == SETTINGS
        assert store.record["digest"] == asked.digest
        assert store.record["request"] == asked.request()
        assert store.sealed(("metrics.csv",))
        (tmp_path / "s" / "metrics.csv").write_text("b\n")
        assert not store.sealed(("metrics.csv",))
    told = [json.loads(line)["file"] for line in (tmp_path / "s" / "manifest.jsonl").read_text().splitlines()]
    assert told == sorted(told)
    assert len(told) == 4


def test_one_process_a_store(tmp_path):
    with open_store(tmp_path / "s"), pytest.raises(ValueError, match="another process is running"):  # noqa: SIM117
        with open_store(tmp_path / "s"):
            raise AssertionError("two at a time")
    with open_store(tmp_path / "s"):
        pass


def test_strays_are_swept_and_other_folders_left_alone(tmp_path):
    with open_store(tmp_path / "s") as store:
        store.write_experiment(experiment(), SETTINGS, {}, "")
        (store.path / "cells").mkdir()
    stray = tmp_path / "s" / "cells" / ".x.png.123.part"
    stray.write_bytes(b"half")
    with open_store(tmp_path / "s"):
        assert not stray.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with (
        pytest.raises(ValueError, match=r"it contains 'thesis\.tex' and no experiment\.yaml"),
        open_store(tmp_path / "mine"),
    ):
        pass
    with pytest.raises(ValueError, match="a file, expected a folder"), open_store(tmp_path / "mine" / "thesis.tex"):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml.safe_dump({"schema": SCHEMA + 1}), f"schema {SCHEMA + 1}, but this version writes {SCHEMA}"),
        ("a: [", "cannot be read"),
        ("", "cannot be read"),
        (yaml.safe_dump({"schema": SCHEMA, "request": {}, "settings": {}}), "is missing"),
        (yaml.safe_dump({"schema": SCHEMA, "settings": asdict(SETTINGS)}), "request is missing"),
    ],
)
def test_a_store_that_is_not_ours_to_read(tmp_path, text, message):
    (tmp_path / "experiment.yaml").write_text(text)
    with pytest.raises(ValueError, match=message), open_store(tmp_path):
        pass


def test_a_full_disk_is_said_and_what_was_finished_stays(tmp_path, picture, monkeypatch):
    import errno

    from fluxlab import files

    first, second = cells(experiment(), SETTINGS)[:2]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"No space left on device\nFinished images are kept"):  # noqa: PT012, SIM117
        with open_store(tmp_path / "s") as store:
            store.write_experiment(experiment(), SETTINGS, {}, "")
            store.put(first, picture, {})
            monkeypatch.setattr(files.os, "fsync", full)
            store.put(second, picture, {})
    monkeypatch.undo()
    with open_store(tmp_path / "s") as store:
        assert store.has(first)
        assert not store.has(second)
        assert sorted(p.suffix for p in (store.path / "cells").iterdir()) == [".json", ".png"]
