"""One experiment computed by several processes: shards in one folder, in folders of their own, merged, interrupted."""

import errno
import os
import shutil
import signal
import time

import pytest

from fluxlab import merge, stopping
from fluxlab import run as command_line
from fluxlab.experiment import locks, runner
from fluxlab.experiment.reading import read_run
from fluxlab.experiment.shards import Shard, read_shard
from fluxlab.experiment.store import open_store
from tests import processes, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"), guidance=True)


def arguments(model, out, *more):
    """Return the arguments of a run of 2 variants × 2 prompts × 2 seeds and 2 controls, two cells per batch."""
    return [
        *tiny.run_of(model),
        "steps=1",
        "batch_tokens=80",
        "threads=1",
        "+variants.half={a: {op: scale, factor: 0.5}}",
        f"out={out}",
        *more,
    ]


def start(*words):
    return processes.start("fluxlab.run", *words, merged=True)


def contents(folder):
    """Return the files that must not depend on who computed them: images, their JSON, arrays, tables, the grid."""
    parts = [folder / name for name in ("grid.png", "metrics.csv", "references.csv", "summary.csv")]
    parts += [*folder.glob("cells/*"), *folder.glob("references/*"), *folder.glob("attention/*/*")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in parts}


@pytest.fixture(scope="module", params=["none", "words"])
def inline(model, tmp_path_factory, request):
    """Return the folder of an undisturbed run, and its capture."""
    out = tmp_path_factory.mktemp("inline") / "run"
    assert command_line.main(arguments(model, out, f"capture={request.param}")) == 0
    return out, request.param


def test_shards_in_one_folder_at_the_same_time(model, inline, tmp_path):
    expected, capture = inline
    out = tmp_path / "run"
    shards = [start(*arguments(model, out, f"capture={capture}", f"shard={i}/3")) for i in range(3)]
    printed = [shard.communicate(timeout=300)[0] for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0, 0], printed
    assert contents(out) == contents(expected)
    assert sum("is done" in text for text in printed) == 2  # the last one measures
    assert "shard=" not in read_run(out).record["command"]
    names = {file.name for file in out.iterdir()} - {file.name for file in expected.iterdir()}
    assert names == {".lock.guard"}


def test_shards_in_their_own_folders_are_merged(model, inline, tmp_path, capsys):
    expected, capture = inline
    folders = [tmp_path / f"part-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        assert command_line.main(arguments(model, folder, f"capture={capture}", f"shard={i}/3")) == 0
        assert not (folder / "metrics.csv").exists()
    every = [{f.name for f in folder.glob("*/*.png")} for folder in folders]
    assert sum(map(len, every)) == len(set.union(*every)) == 10
    out = tmp_path / "merged"
    assert merge.main([*map(str, folders[:2]), f"out={out}"]) == 2
    message = capsys.readouterr().err
    assert "2 images are in none of the folders" in message
    assert len(message.splitlines()) <= 3
    assert merge.main([*map(str, folders), f"out={out}"]) == 0
    assert "2 images joined" in capsys.readouterr().out
    assert contents(out) == contents(expected)
    assert read_run(out).record["command"].endswith(f"out={out}")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert merge.main([*map(str, folders), f"out={out}"]) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_shards_of_tasks_are_merged(tmp_path):
    """Each shard draws the scenes of its own cells."""
    words = ["+exp=inpaint", "scenes.count=2", "steps=1", "batch_tokens=1200", "tracking=none", "device=cpu"]
    assert command_line.main([*words, f"out={tmp_path / 'run'}"]) == 0
    folders = [tmp_path / f"part-{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        assert command_line.main([*words, f"out={folder}", f"shard={i}/2"]) == 0
    assert merge.main([*map(str, folders), f"out={tmp_path / 'merged'}"]) == 0
    assert contents(tmp_path / "merged") == contents(tmp_path / "run")


@pytest.mark.parametrize("inline", ["none"], indirect=True)
def test_a_shard_is_resumed_bit_for_bit(model, inline, tmp_path, monkeypatch):
    expected, _ = inline
    out = tmp_path / "run"
    shutil.copytree(expected, out)
    lost = sorted(out.glob("cells/*.png"))[::3]
    for file in lost:
        file.unlink()
        file.with_suffix(".json").unlink()
    ran, run_batch = [], runner.run_batch
    monkeypatch.setattr(runner, "run_batch", lambda *given: (ran.append(given[3]), run_batch(*given))[1])
    for i in range(2):
        assert command_line.main(arguments(model, out, f"shard={i}/2")) == 0
    assert {cell.key for batch in ran for cell in batch} >= {file.stem for file in lost}
    assert len({cell.key for batch in ran for cell in batch}) == sum(map(len, ran))  # nothing twice
    assert contents(out) == contents(expected)


@pytest.mark.parametrize("inline", ["none"], indirect=True)
def test_other_experiments_are_not_merged(model, inline, tmp_path, capsys):
    first, _ = inline
    for more, message in (
        (["seeds=[4]"], "seeds is [0, 1] and [4]"),
        (["steps=2"], "steps is 1 and 2"),
        (["batch_tokens=40"], "settings.batch_tokens is 80 and 40"),
        (["variants.half.a.factor=0.25"], "variants is"),
    ):
        other = tmp_path / f"other-{len(list(tmp_path.iterdir()))}"
        assert command_line.main(arguments(model, other, *more, "shard=0/9")) == 0
        assert merge.main([str(first), str(other), f"out={tmp_path / 'merged'}"]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) <= 3
    assert not (tmp_path / "merged").exists()
    copy = shutil.copytree(first, tmp_path / "copy")
    file = min(copy.glob("cells/*.png"))
    other = max(copy.glob("cells/*.png"))
    notes = other.with_suffix(".json").read_text()
    file.write_bytes(other.read_bytes())
    file.with_suffix(".json").write_text(notes)
    assert merge.main([str(first), str(copy), f"out={tmp_path / 'both'}"]) == 2
    assert "two different images of one cell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the folders to join"),
        (["a"], "name the folders to join"),
        (["nowhere", "out=b"], "nowhere: not a run folder"),
        (["--plugin", "a", "out=b"], "--help lists the arguments"),
    ],
)
def test_wrong_arguments_of_merge(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert merge.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["3/3", "1", "a/b", "-1/3", "1/0", "0.5", "1/3/5", ""])
def test_a_wrong_shard(value):
    with pytest.raises(ValueError, match=r"shard=.*expected i/n with i from 0 to n - 1"):
        read_shard(value)


def test_shards_divide_the_batches():
    shards = [read_shard(f"{i}/3") for i in range(3)]
    assert [[n for n in range(7) if shard.has(n)] for shard in shards] == [[0, 3, 6], [1, 4], [2, 5]]
    assert read_shard(None) is None


# ---- locks


def test_of_shards_that_end_at_the_same_time_one_takes_over(tmp_path):
    """Each of them has looked before any of them has left its folder."""
    out = tmp_path / "s"
    with (
        open_store(out, Shard(0, 3)) as one,
        open_store(out, Shard(1, 3)) as two,
        open_store(out, Shard(2, 3)) as three,
    ):
        assert [store.lock.take_over(lambda: True) for store in (one, three, two)] == [False, False, True]
        with pytest.raises(ValueError, match="another process is running"), open_store(out):
            raise AssertionError("at the same time")


def test_shards_run_together_and_a_run_alone(tmp_path, capsys):
    out = tmp_path / "s"
    with open_store(out, Shard(0, 3)) as first:
        assert first.lock.alone
        with open_store(out, Shard(2, 3)) as second:
            assert not second.lock.alone
            for shard, message in (
                (Shard(2, 3), "shard=2/3: is running in .* already"),
                (Shard(0, 2), "shard=0/2: 0/3 is running in .* use shard=i/3"),
                (None, "shard 0/3 is running in this folder"),
            ):
                with pytest.raises(ValueError, match=message), open_store(out, shard):
                    raise AssertionError("at the same time")
            assert not first.lock.take_over(lambda: pytest.fail("looked at every image while another shard runs"))
            assert not first.lock.take_over(lambda: True)  # it has given its lock back
            with pytest.raises(ValueError, match="shard 2/3 is running in this folder"), open_store(out):
                raise AssertionError("at the same time")
    with open_store(out, Shard(0, 3)) as last:
        assert not last.lock.take_over(lambda: False)
    with open_store(out, Shard(0, 3)) as last:
        assert last.lock.take_over(lambda: True)
        with pytest.raises(ValueError, match="another process is running"), open_store(out, Shard(1, 3)):
            raise AssertionError("at the same time")
    assert not out.exists()  # nothing was written
    with open_store(out), pytest.raises(ValueError, match="another process is running"), open_store(out, Shard(1, 3)):
        raise AssertionError("at the same time")


def test_a_shard_leaves_the_files_alone_that_others_are_writing(tmp_path):
    out = tmp_path / "s"
    with open_store(out, Shard(0, 2)):
        (out / ".experiment.yaml.1.part").write_text("")
        with open_store(out, Shard(1, 2)):
            assert (out / ".experiment.yaml.1.part").exists()
    (out / ".experiment.yaml.1.part").write_text("")
    with open_store(out, Shard(1, 2)):
        assert not (out / ".experiment.yaml.1.part").exists()


def test_shards_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "s"
    with open_store(out, Shard(0, 2)), open_store(out, Shard(1, 2)):
        assert (out / ".lock.shard-1-of-2.marker").exists()
        with pytest.raises(ValueError, match=r"(?s)shard 0/2 is running.*If it was killed, delete .*0-of-2\.marker"):
            locks._lock_of_run(out)
    assert not [file.name for file in tmp_path.rglob("*shard*")]


# ---- SIGTERM


def test_sigterm_ends_a_run_after_the_batch_at_hand(model, inline, tmp_path):
    expected, capture = inline
    out = tmp_path / "run"
    run = start(*arguments(model, out, f"capture={capture}"))
    while not list(out.glob("cells/*.json")) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=120)
    if run.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert run.returncode == 143, printed
    assert "the same command continues from here" in printed
    assert len(list(out.glob("cells/*.json"))) % 2 == 0  # whole batches
    assert not list(out.rglob("*.part"))
    assert command_line.main(arguments(model, out, f"capture={capture}")) == 0
    assert contents(out) == contents(expected)


def test_sigterm_is_deferred_to_the_end_of_a_block():
    reached = []

    def work():
        with stopping.sigterm_raises():
            with stopping.deferred():
                assert not stopping.asked()
                signal.raise_signal(signal.SIGTERM)
                reached.append(stopping.asked())
            reached.append("after")

    with pytest.raises(stopping.Terminated):
        work()
    assert reached == [True]
    assert not stopping.asked()
    with pytest.raises(stopping.Terminated), stopping.sigterm_raises():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
