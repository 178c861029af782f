"""What a run logs to W&B, and runs whose W&B misbehaves: short scripts replace W&B's process."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fluxlab.config import ModelRow
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.spec import Experiment, checked, read_variants
from fluxlab.report.products import GRID_FILE, grid
from fluxlab.report.wandb import link, tracking
from fluxlab.report.wandb.link import Link, is_tracked
from fluxlab.report.wandb.process import RUNS
from tests.stores import PROMPTS, VARIANTS, make_store


def experiment(**changes):
    values = {
        "name": "test",
        "model": ModelRow("tiny", "fluxlab/assets/tiny", scenes=True),
        "model_digest": "0" * 16,
        "variants": read_variants({"baseline": {}, **VARIANTS}),
        "prompts": PROMPTS,
        "seeds": (0, 1),
    }
    return checked(Experiment(**{**values, **changes}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("runs") / "store", prompts=PROMPTS[:1])
    grid(read_store(path))
    return read_store(path)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that runs a script instead of W&B's process."""
    monkeypatch.setenv("WANDB_MODE", "offline")

    def put(text: str) -> Path:
        file = tmp_path / "stand_in.py"
        file.write_text(text)
        monkeypatch.setattr(link, "PROGRAM", str(file))
        return file

    return put


LISTENER = """
import json, sys
for line in sys.stdin:
    with open({file!r}, "a") as received:
        received.write(line)
    if "finish" in json.loads(line):
        break
print(json.dumps({{"mode": "offline", "id": "x", "folder": {folder!r}, "url": None, "why": None}}))
print(json.dumps({{"done": True}}))
"""


def received(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "wandb", "projekt": "x"},
            r"tracking\.projekt: 'x', unknown key of tracking, .*mean project",
        ),
        ({"name": "mlflow"}, r"tracking\.name=mlflow: expected none or wandb"),
        ({"name": "wandb", "mode": "onlin"}, r"tracking\.mode=onlin: expected online, offline, disabled or null"),
        ({"name": "wandb", "tags": "one"}, r"tracking\.tags=one: expected a list of words"),
        ({"name": "wandb", "tags": [1]}, r"tracking\.tags=\[1\]: expected a list of words"),
        ({"name": "wandb", "artifact": "yes"}, r"tracking\.artifact=yes: expected true or false"),
        ({"name": "wandb", "seconds": 0}, r"tracking\.seconds=0: expected a number above 0"),
        ({"name": "wandb", "seconds": True}, r"tracking\.seconds=True"),
        ({"name": "wandb", "project": 3}, r"tracking\.project=3: expected a name"),
    ],
)
def test_wrong_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tracking.start(settings, tmp_path, experiment())
    assert not list(tmp_path.iterdir())


def test_settings_come_before_environment_variables_and_defaults():
    defaults = tracking.init_arguments({"name": "wandb"}, experiment(), {})
    assert defaults["project"] == "fluxlab"
    assert defaults["group"] == "test"
    assert defaults["job_type"] == "run"
    assert defaults["tags"] == ["tiny"]
    assert "entity" not in defaults
    environment = {"WANDB_PROJECT": "theirs", "WANDB_ENTITY": "lab", "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "a,b"}
    unset = {"project", "entity", "group", "tags"}
    assert tracking.init_arguments({}, experiment(), environment).keys().isdisjoint(unset)
    settings = {"project": "mine", "entity": "me", "tags": ["one"]}
    chosen = tracking.init_arguments(settings, experiment(), environment)
    assert (chosen["project"], chosen["entity"], chosen["tags"]) == ("mine", "me", ["tiny", "one"])
    swept = tracking.init_arguments(settings, experiment(), {**environment, "WANDB_SWEEP_ID": "s"})
    assert swept.keys().isdisjoint({"project", "entity"})


def test_the_summary_has_each_variant_and_their_mean(run):
    found = tracking.summary(run)
    means = {(row["variant"], row["metric"]): row["mean"] for row in run.summary}
    for variant in ("zero", "half", "noise floor", "another seed"):
        assert found[f"metric.{variant}.ssim"] == means[variant, "ssim"]
    assert found["metric.ssim"] == pytest.approx((means["zero", "ssim"] + means["half", "ssim"]) / 2)
    assert found["metric.word"] == pytest.approx((means["zero", "word"] + means["half", "word"]) / 2)
    errors = [10 ** (-means[variant, "psnr"] / 10) for variant in ("zero", "half")]
    assert found["metric.psnr"] == pytest.approx(-10 * math.log10(sum(errors) / 2))
    assert "metric.baseline.psnr" not in found  # infinite
    assert all(math.isfinite(value) for value in found.values())
    floor = next(e for e in run.effects if (e.variant, e.metric) == ("noise floor", "sharpness"))
    assert found["metric.noise floor.sharpness"] == floor.value != floor.own_mean  # it has the first seed only
    alone = replace(run, metrics=run.metrics[:2], summary=[row for row in run.summary if row["variant"] == "baseline"])
    assert tracking.summary(alone)["metric.word"] == means["baseline", "word"]


def test_messages_name_existing_files_and_finite_numbers(run):
    messages = json.loads(json.dumps(tracking.messages(run, artifact=True), allow_nan=False))
    merged = {key: value for message in messages for key, value in message.items()}
    assert merged["config"]["settings"]["steps"] == 16
    assert list(merged["images"]) == ["grid", "layouts", "pictures/baseline", "pictures/zero", "pictures/half"]
    layouts = merged["images"].pop("layouts")
    assert [caption for _, caption in layouts] == [f"{name}: {run.describe(name)}" for name in run.variants]
    assert all(url.startswith("data:image/png;base64,iVBOR") for url, _ in layouts)
    files = [file for some in merged["images"].values() for file, _ in some]
    assert len(files) == 7
    assert merged["images"]["pictures/half"][1] == [str(run.image("half", PROMPTS[0], 1)), f"{PROMPTS[0]} · seed 1"]
    table = merged["tables"]["cells"]
    assert len(table["rows"]) == 6
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    last = dict(zip(table["columns"], table["rows"][-1], strict=True))
    assert last["picture"] == {"image": str(run.image("half", PROMPTS[0], 1))}
    assert last["baseline"] == {"image": str(run.image("baseline", PROMPTS[0], 1))}
    assert (last["variant"], last["seed"], last["ssim"]) == ("half", 1, run.cell("half", PROMPTS[0], 1)["ssim"])
    table = merged["tables"]["variants"]
    assert len(table["rows"]) == len(run.summary)
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    artifact = {name: file for file, name in merged["artifact"]["files"]}
    assert set(artifact) >= {"experiment.yaml", "metrics.csv", "manifest.jsonl"}
    assert all(Path(file).is_file() for file in [*files, *artifact.values()])
    assert GRID_FILE in [Path(file).name for file in files]


@pytest.mark.parametrize(("every", "shown"), [(math.inf, [1, 20]), (0, list(range(1, 21)))])
def test_progress_and_results_reach_the_process(every, shown, run, tmp_path, program, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "EVERY", every)
    file = tmp_path / "received.jsonl"
    program(LISTENER.format(file=str(file), folder=str(tmp_path / "it's")))
    before = dict(os.environ)
    with tracking.start({"name": "wandb"}, tmp_path, experiment(), "python -m fluxlab.run +exp=test") as tracker:
        for done in range(1, 21):
            tracker.progress(done, 20)
        tracker.finish(lambda: run)
    assert os.environ == before
    lines = received(file)
    assert lines[0]["modes"] == ["offline"]
    assert lines[0]["config"]["variants"]["half"] == {"a": {"op": "scale", "factor": 0.5}}
    assert lines[0]["config"]["command"] == "python -m fluxlab.run +exp=test"
    assert [line["log"]["progress/pictures"] for line in lines if "log" in line] == shown
    assert lines[1 + len(shown) : -1] == json.loads(json.dumps(tracking.messages(run)))
    assert lines[-1] == {"finish": 0}
    assert capsys.readouterr().out == f"W&B: offline: wandb sync '{tmp_path}/it'\"'\"'s' sends it\n"


def test_an_error_during_the_run_is_reported(tmp_path, program):
    file = tmp_path / "received.jsonl"
    program(LISTENER.format(file=str(file), folder=str(tmp_path)))
    with pytest.raises(KeyError), tracking.start({"name": "wandb"}, tmp_path, experiment()):
        raise KeyError
    assert received(file)[-1] == {"finish": 1}


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_online_falls_back_to_offline(mode, tmp_path, program, monkeypatch):
    file = tmp_path / "received.jsonl"
    program(LISTENER.format(file=str(file), folder=str(tmp_path)))
    monkeypatch.setenv("WANDB_MODE", mode)
    Link(tmp_path, {}, {}).close()
    assert received(file)[0]["modes"] == (["offline"] if mode == "offline" else ["online", "offline"])


def test_no_process_is_started_without_tracking(tmp_path, program, monkeypatch):
    program("raise SystemExit('started')")
    for settings in ({"name": "none"}, {}, {"name": "wandb", "mode": "disabled"}):
        with tracking.start(settings, tmp_path, experiment()) as tracker:
            tracker.progress(1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["stand_in.py"]


def test_a_tracked_store_gets_no_second_run_except_in_a_sweep(run, tmp_path, program, monkeypatch):
    file = tmp_path / "received.jsonl"
    program(LISTENER.format(file=str(file), folder=str(tmp_path)))
    tracking.start({"name": "wandb"}, tmp_path, experiment()).finish(lambda: run)
    mark = received(file)[0]["mark"]
    assert not is_tracked(tmp_path, mark)
    lines = [{"id": "x", "state": "started", "mark": mark}, {"id": "x", "state": "finished", "mark": mark}]
    (tmp_path / "wandb" / RUNS).write_text(json.dumps(lines[0]) + "\n")
    assert not is_tracked(tmp_path, mark)  # a run that did not finish
    (tmp_path / "wandb" / RUNS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert is_tracked(tmp_path, mark)
    assert tracking.start({"name": "wandb"}, tmp_path, experiment()).link is None
    changed = tracking.start({"name": "wandb"}, tmp_path, experiment(clip="some/clip"))  # it has other metrics
    assert changed.link is not None
    changed.failed()
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    swept = tracking.start({"name": "wandb"}, tmp_path, experiment())
    assert swept.link is not None
    swept.failed()


def test_a_process_that_ends_is_reported_once(tmp_path, program, capsys):
    program("import json; input(); print(json.dumps({'lost': 'no room'})); raise SystemExit(1)")
    opened = Link(tmp_path, {}, {})
    opened.process.wait()
    for _ in range(3):
        opened.send({"log": {}})
    opened.close()
    assert capsys.readouterr().err == f"W&B stopped (no room); the run continues, {tmp_path} has all results\n"


def test_a_process_that_hangs_stops_nothing(tmp_path, program, capsys, monkeypatch):
    """It never reads and never ends: a call that waited for it would not return."""
    monkeypatch.setattr(link, "_PATIENCE", 0)
    program(
        "import json, signal\n"
        f"print(json.dumps({{'folder': {str(tmp_path / 'offline-run-1')!r}}}), flush=True)\n"
        "signal.pause()"
    )
    opened = Link(tmp_path, {}, {})
    process = opened.process
    opened.wait_until_started()
    for i in range(2000):
        opened.send({"log": {"i": i, "words": "x" * 100}})  # more than a pipe and the backlog hold
    assert len(opened.unsent) < link._BACKLOG + 1000
    opened.close([{"summary": {"i": "x" * 1_000_000}}], seconds=0.1)
    assert process.wait() == -signal.SIGKILL
    assert capsys.readouterr().err.startswith(
        f"W&B stopped (not done after 0 s; wandb sync {tmp_path}/offline-run-1 sends it); the run continues"
    )


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, capsys):
    (tmp_path / "wandb").write_text("a file with this name")
    opened = Link(tmp_path, {}, {}, mode="offline")
    opened.send({"log": {}})
    opened.close()
    assert capsys.readouterr().err.count("W&B stopped (") == 1
