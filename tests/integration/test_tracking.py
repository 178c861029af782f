"""The real W&B, offline: what it writes can be read back, and its failures never affect a run."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from fluxlab.checkpoints.random import write_random
from fluxlab.config import ModelRow
from fluxlab.experiment.reading import Run, read_store
from fluxlab.experiment.spec import Experiment, checked, read_variants
from fluxlab.probes import Capture
from fluxlab.report.attention.pictures import write_pictures
from fluxlab.report.products import GRID_FILE, grid
from fluxlab.report.wandb import link, tracking
from fluxlab.report.wandb.link import Link
from fluxlab.run import main
from tests.stores import PROMPTS, make_store

ROOT = Path(__file__).parents[2]
WANDB = [sys.executable, "-m", "wandb"]
TIMEOUT = 300  # s; only a test that fails takes so long
CSV = ("metrics.csv", "references.csv", "summary.csv")


def inspect(folder: Path, *flags: str) -> list[dict]:
    """Return the records of a run's log, read by W&B's own command."""
    command = [*WANDB, "leet", "inspect", *flags, "--json", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return [json.loads(text) for text in ([done.stdout] if "--summary" in flags else done.stdout.splitlines())]


def folders(store: Path) -> list[Path]:
    """Return the folders of the store's W&B runs, oldest first."""
    ids = [json.loads(line)["id"] for line in (store / "wandb" / "runs.jsonl").read_text().splitlines()]
    return [next((store / "wandb").glob(f"*run-*-{name}")) for name in dict.fromkeys(ids)]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def store(tmp_path_factory, patch):
    """A store tracked by a run that failed and by one that finished; HOME and TMPDIR are in the test's folder."""
    folder = tmp_path_factory.mktemp("tracked")
    words = {"words": {"kind": "words", "direction": "image_to_word"}, "entropy": {"kind": "entropy"}}
    store = make_store(folder / "store", prompts=PROMPTS[:1], size=(320, 320), attention=words)
    run = read_store(store)
    grid(run)
    write_pictures(run)
    experiment = experiment_of(run)
    tracking.messages(run)  # matplotlib writes its list of fonts to HOME
    for variable, name in (("HOME", "home"), ("TMPDIR", "tmp")):
        (folder / name).mkdir()
        patch.setenv(variable, str(folder / name))
    for attempt in range(2):
        with tracking.start({"name": "wandb", "artifact": True}, store, experiment, run.record["command"]) as tracker:
            tracker.progress(6, 6)
            tracker.link.wait_until_started()
            if attempt:
                tracker.finish(lambda: run)
    return store


def experiment_of(run: Run) -> Experiment:
    """Return the experiment of a store."""
    request = dict(run.record["request"])
    request["capture"] = Capture.from_config(request["capture"] or None)
    request |= {"model": ModelRow(**request["model"]), "variants": read_variants(request["variants"])}
    return checked(Experiment(**{**request, "prompts": tuple(request["prompts"]), "seeds": tuple(request["seeds"])}))


def test_config_summary_tables_and_images_are_logged(store):
    folder = folders(store)[1]
    run = read_store(store)
    logged = inspect(folder, "--summary")[0]
    assert logged["exit_code"] == 0
    assert logged["project"] == "fluxlab"
    assert logged["config"]["variants"]["half"] == {"a": {"op": "scale", "factor": 0.5}}
    assert logged["config"]["prompts"] == [PROMPTS[0]]
    assert logged["config"]["settings"]["steps"] == 16
    assert logged["config"]["versions"]["torch"] == "2.9.0"
    expected = {(row["variant"], row["metric"]): row["mean"] for row in run.summary}
    assert logged["summary"]["metric.half.ssim"] == pytest.approx(expected["half", "ssim"])
    assert logged["summary"]["metric.ssim"] == pytest.approx((expected["half", "ssim"] + expected["zero", "ssim"]) / 2)

    records = inspect(folder)
    opened = next(record["run"] for record in records if record["type"] == "run")
    assert (opened["run_group"], opened["job_type"], opened["tags"]) == ("test", "run", ["tiny"])
    started = next(record["environment"] for record in records if record["type"] == "environment")
    assert (started["program"], started["args"]) == ("-m fluxlab.run", ["+exp=test"])
    history = {}
    for record in records:
        history |= record.get("history", {}).get("item", {})
    assert history["progress/pictures"] == 6
    for variant in run.variants:
        images = f"pictures/{variant}"
        assert history[f"{images}.count"] == 2
        assert history[f"{images}.captions"] == [f"{PROMPTS[0]} · seed {seed}" for seed in (0, 1)]
        files = [folder / "files" / name for name in history[f"{images}.filenames"]]
        assert [sha256(file) for file in files] == [sha256(run.image(variant, PROMPTS[0], seed)) for seed in (0, 1)]
        assert os.path.samefile(files[0], run.image(variant, PROMPTS[0], 0))  # a hard link, not a copy
    assert sha256(folder / "files" / history["grid.filenames"][0]) == sha256(store / GRID_FILE)

    assert history["layouts.captions"] == [f"{variant}: {run.describe(variant)}" for variant in run.variants]
    assert all(Image.open(folder / "files" / name).width > 300 for name in history["layouts.filenames"])

    counts = {"sheets": 3, "figures": 1, "steps": 1}
    assert {name: history[f"attention/{name}.count"] for name in counts} == counts
    assert logged["summary"]["attention.half.entropy"] > 0
    assert 0 < logged["summary"]["attention.half.words"] < 1
    files = [folder / "files" / name for name in history["attention/sheets.filenames"]]
    sheets = [store / "attention" / f"{entry['cell']}.png" for entry in run.attention if entry["seed"] == 0]
    assert [sha256(file) for file in files] == [sha256(file) for file in sheets]
    animations = list((folder / "files" / "media" / "videos").rglob("*.gif"))
    assert [sha256(file) for file in animations] == [sha256(store / "attention" / "steps-1.gif")]

    for name, rows in (("cells", 6), ("variants", len(run.summary))):
        table = json.loads((folder / "files" / history[f"{name}.path"]).read_text())
        assert len(table["data"]) == rows == history[f"{name}.nrows"]
    table = json.loads((folder / "files" / history["cells.path"]).read_text())
    assert table["columns"][:4] == ["picture", "baseline", "variant", "prompt"]


def test_files_for_a_later_sync_are_in_the_store(store):
    records = inspect(folders(store)[1])
    artifacts = {record["artifact"]["type"]: record["artifact"] for record in records if record["type"] == "artifact"}
    for record in records:
        for entry in record.get("artifact", {}).get("manifest", {}).get("contents", ()):
            assert Path(entry["local_path"]).is_relative_to(store)
            assert Path(entry["local_path"]).stat().st_size == int(entry["size"])
    cells = [r["artifact"] for r in records if r["type"] == "artifact" and r["artifact"]["name"].endswith("-cells")]
    pictures = [entry for entry in cells[0]["manifest"]["contents"] if entry["path"].endswith(".png")]
    assert len(pictures) == 6
    assert {Image.open(entry["local_path"]).size for entry in pictures} == {(256, 256)}
    whole = {entry["path"]: entry["local_path"] for entry in artifacts["store"]["manifest"]["contents"]}
    manifest = [json.loads(line)["file"] for line in (store / "manifest.jsonl").read_text().splitlines()]
    assert whole == {name: str(store / name) for name in [*manifest, "manifest.jsonl"]}
    strays = [file for name in ("home", "tmp") for file in (store.parent / name).rglob("*") if file.is_file()]
    assert [file for file in strays if not file.name.startswith("debug-cli")] == []  # written by `inspect`


def test_a_resumed_run_names_the_earlier_ones_and_a_finished_one_is_not_repeated(store):
    first, second = folders(store)
    assert inspect(first, "--summary")[0]["exit_code"] == 1
    logged = inspect(second, "--summary")[0]
    assert logged["config"]["resumed_from"] == [first.name.rsplit("-", 1)[1]]
    run = read_store(store)
    assert tracking.start({"name": "wandb"}, store, experiment_of(run)).link is None


def test_more_images_than_fit_into_one_step(store, tmp_path):
    run = read_store(store)
    file = str(run.image(run.baseline, *run.places[0]))
    opened = Link(tmp_path, {"project": "p"}, {}, mode="offline")
    opened.close([{"images": {"many": [(file, str(i)) for i in range(150)], "few": [(file, "x")]}}])
    (folder,) = folders(tmp_path)
    steps = [record["history"]["item"] for record in inspect(folder) if record["type"] == "history"]
    assert [step["many.count"] for step in steps] == [108, 42]
    assert [name for step in steps for name in step["many.captions"]] == [str(i) for i in range(150)]
    assert [step.get("few.count") for step in steps] == [1, None]


SLEEPER = """
import signal, sys
from pathlib import Path
from fluxlab.report.wandb.link import Link
link = Link(Path(sys.argv[1]), {"project": "p"}, {}, mode="offline")
link.send({"log": {"x": 1}})
link.wait_until_started()
print(link.process.pid, flush=True)
signal.pause()
"""


def test_a_run_that_is_killed_is_reported_as_failed(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", SLEEPER, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    process = psutil.Process(int(run.stdout.readline()))
    run.kill()
    run.communicate()
    process.wait(TIMEOUT)
    assert "failed" in (tmp_path / "wandb" / "runs.jsonl").read_text()
    logged = inspect(folders(tmp_path)[0], "--summary")[0]
    assert logged["exit_code"] == 1
    assert logged["summary"]["x"] == 1


# --- fluxlab.run, with failures of W&B


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("random") / "model")


def run_main(model: Path, out: Path, *more: str) -> int:
    fixed = ["+exp=hello", "model=local", "steps=1", "height=16", "width=24", "+op@variants.half.a=scale", "threads=1"]
    return main([*fixed, f"model.path={model}", f"out={out}", "batch_tokens=1", *more])


@pytest.fixture(scope="module")
def untracked(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("untracked") / "store"
    assert run_main(model, out, "tracking=none") == 0
    return out


def whole(store: Path, untracked: Path) -> bool:
    same = [name for name in CSV if (store / name).read_bytes() == (untracked / name).read_bytes()]
    listed = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    kept = all(sha256(store / line["file"]) == line["sha256"] for line in listed)
    names = [json.loads(line)["file"] for line in (untracked / "manifest.jsonl").read_text().splitlines()]
    return same == list(CSV) and kept and [line["file"] for line in listed] == names


def test_a_run_is_tracked(model, untracked, tmp_path, capsys):
    assert run_main(model, tmp_path / "s", "tracking=wandb", "tracking.tags=[one]") == 0
    assert whole(tmp_path / "s", untracked)
    (folder,) = folders(tmp_path / "s")
    assert f"W&B: offline: wandb sync {folder} sends it" in capsys.readouterr().out
    logged = inspect(folder, "--summary")[0]
    assert logged["exit_code"] == 0
    assert logged["summary"]["progress/share"] == 1
    assert logged["config"]["command"].startswith("python -m fluxlab.run +exp=hello")
    assert run_main(model, tmp_path / "s", "tracking=wandb", "tracking.tags=[one]") == 0  # W&B already has it
    assert folders(tmp_path / "s") == [folder]


@pytest.mark.parametrize("victim", ["process", "wandb-core"])
def test_a_tracker_that_is_killed_during_the_run(victim, model, untracked, tmp_path, capsys, monkeypatch):
    killed = []

    def kill(tracker, done, total):
        if not killed:
            tracker.link.wait_until_started()
            process = psutil.Process(tracker.link.process.pid)
            if victim == "wandb-core":
                process = next(child for child in process.children() if child.name() == "wandb-core")
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)
        if tracker.link:
            tracker.link.send({"log": {"progress/pictures": done}})

    monkeypatch.setattr(tracking.Tracker, "progress", kill)
    assert run_main(model, tmp_path / "s", "tracking=wandb", "tracking.seconds=30") == 0
    assert killed
    assert whole(tmp_path / "s", untracked)
    assert capsys.readouterr().err.count("W&B stopped") == 1


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """Mount a file system of 400 kB that is almost full as the store's wandb folder before W&B starts."""
    folder, start = tmp_path / "s" / "wandb", tracking.start

    def mounted(*arguments):
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        (folder / "ballast").write_bytes(b"x" * 380_000)
        return start(*arguments)

    monkeypatch.setattr(tracking, "start", mounted)
    yield folder
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def test_a_disk_that_is_full_for_the_tracker(small_disk, model, untracked, tmp_path, capsys):
    assert run_main(model, tmp_path / "s", "tracking=wandb", "tracking.seconds=30") == 0
    assert shutil.disk_usage(small_disk).free < 10_000
    assert whole(tmp_path / "s", untracked)
    assert capsys.readouterr().err.count("W&B stopped") == 1


def test_online_without_a_network(model, untracked, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(link, "INIT_SECONDS", 2)
    assert run_main(model, tmp_path / "s", "tracking=wandb") == 0
    assert whole(tmp_path / "s", untracked)
    (folder,) = folders(tmp_path / "s")
    printed = capsys.readouterr()
    assert "W&B: offline (Timed out" in printed.out
    assert f"wandb sync {folder} sends it" in printed.out
    assert printed.err == ""
    assert sorted((tmp_path / "s" / "wandb").glob("*run-*")) == [folder]
    assert inspect(folder, "--summary")[0]["exit_code"] == 0


def test_a_run_that_fails_is_reported_to_wandb(model, tmp_path):
    assert run_main(model, tmp_path / "s", "tracking=wandb", "height=18") == 2
    (folder,) = folders(tmp_path / "s")
    assert inspect(folder, "--summary")[0]["exit_code"] == 1
    assert run_main(model, tmp_path / "s", "tracking=none") == 0  # the folder is still usable
