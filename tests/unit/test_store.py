"""The run folder: locks, changed and damaged files, images that an experiment no longer has."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxlab
from fluxlab import files
from fluxlab.experiment import captures, locks
from fluxlab.experiment.manifest import NOT_AS_LISTED, Manifest
from fluxlab.experiment.reading import read_run, read_store
from fluxlab.experiment.rows import Records, Rows, read_table
from fluxlab.experiment.store import open_store
from fluxlab.experiment.versions import commit
from tests import stores


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return stores.make_store(tmp_path_factory.mktemp("store") / "s", attention="words")


@pytest.fixture
def store(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "s")


# ---- locks


@pytest.fixture
def without_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)


def test_a_file_system_without_locks(tmp_path, without_locks, capsys):
    with open_store(tmp_path / "s") as store:
        assert "this file system has no locks" in capsys.readouterr().err
        assert (tmp_path / "s" / locks.MARKER).exists()
        with pytest.raises(ValueError, match=r"(?s)another process is running .*delete .*marker"):  # noqa: SIM117
            with open_store(tmp_path / "s"):
                raise AssertionError("two at a time")
        store.write("experiment.yaml", "schema: 1")
    assert not (tmp_path / "s" / locks.MARKER).exists()


def test_a_marker_of_a_killed_process_is_taken_over(tmp_path, without_locks):
    code = (
        "import fcntl, os, sys, errno\n"
        "def flock(*_): raise OSError(errno.ENOLCK, 'no locks')\n"
        "fcntl.flock = flock\n"
        "from pathlib import Path\n"
        "from fluxlab.experiment.store import open_store\n"
        "with open_store(Path(sys.argv[1])): os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=False).returncode == 9
    assert (tmp_path / "s" / locks.MARKER).exists()
    with open_store(tmp_path / "s"):
        pass


def test_a_folder_that_another_process_has_just_locked_is_left_alone(tmp_path):
    with open_store(tmp_path / "s"):
        with pytest.raises(ValueError, match="another process is running"):  # noqa: SIM117
            with open_store(tmp_path / "s"):
                raise AssertionError("two at a time")
        assert (tmp_path / "s" / locks.LOCK).exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("fcntl.flock", read_only)
    with pytest.raises(ValueError, match=r"out=.*cannot be written \(Read-only file system\)"):  # noqa: SIM117
        with open_store(tmp_path / "s"):
            raise AssertionError("not writable")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out=.*cannot be written \(Not a directory\)"):  # noqa: SIM117
        with open_store(tmp_path / "file" / "s"):
            raise AssertionError("not a folder")


# ---- damaged files


@pytest.mark.parametrize(
    "name", ["metrics.csv", "references.csv", "summary.csv", "experiment.yaml", "attention/index.json"]
)
def test_a_cut_file_is_refused_by_name(store, name):
    content = (store / name).read_bytes()
    lines = content.splitlines(keepends=True)
    for cut in (b"".join(lines[:-1]), content[: len(content) // 2], b""):
        (store / name).write_bytes(cut)
        with pytest.raises(ValueError, match=name) as error:
            read_run(store).attention  # noqa: B018
        assert len(str(error.value).splitlines()) <= 2
    (store / name).write_bytes(content)
    assert read_run(store).metrics


def test_a_table_that_was_edited_is_refused(store):
    text = (store / "metrics.csv").read_text()
    (store / "metrics.csv").write_text(text.replace("half", "hulf"))
    with pytest.raises(ValueError, match=r"metrics\.csv: it is not the file that manifest\.jsonl lists; run the comm"):
        read_run(store)
    assert "hulf" in read_store(store, check=False).variants


@pytest.mark.parametrize(("content", "problem"), [(None, "is missing"), ("{", "is damaged"), ("", "does not list it")])
def test_a_damaged_manifest(store, content, problem):
    if content is None:
        (store / "manifest.jsonl").unlink()
    else:
        (store / "manifest.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"manifest\.jsonl {problem}"):
        read_run(store)


def test_a_missing_table(store):
    (store / "summary.csv").unlink()
    with pytest.raises(ValueError, match=r"summary\.csv: missing, so the run is not finished"):
        read_run(store)


def test_a_damaged_record_keeps_the_name_of_the_experiment(store):
    from fluxlab.experiment.store import Store

    content = (store / "experiment.yaml").read_bytes()
    assert not Store(store).damaged
    for cut in (content[: len(content) // 2], content[:-200], content.replace(b"versions:", b"version:")):
        (store / "experiment.yaml").write_bytes(cut)
        damaged = Store(store)
        assert damaged.damaged
        assert damaged.name == "test"
    (store / "experiment.yaml").write_bytes(b"")
    with pytest.raises(ValueError, match=r"experiment\.yaml: cannot be read"):
        Store(store)


# ---- reading


def test_read_run(finished):
    run = fluxlab.read_run(finished)
    place = run.places[0]
    assert isinstance(run.open("half", *place), Image.Image)
    assert run.open("half", *place).size == (64, 64)
    assert list(run.images) == [(row["variant"], row["prompt"], row["seed"]) for row in run.table]
    assert all(file.is_file() for file in run.images.values())
    assert len(run.table) == len(run.variants) * len(run.places)
    assert {entry.variant for entry in run.effects} == {*run.variants, "noise floor", "another seed"}
    assert run.captured("half", *place)["words"].values.ndim == 6
    with pytest.raises(KeyError):
        run.open("quarter", *place)


def test_a_missing_image_is_named(store):
    run = read_run(store)
    run.image("half", *run.places[0]).unlink()
    with pytest.raises(ValueError, match=r"image not found; run the command of this store again"):
        run.open("half", *run.places[0])


def test_controls_stand_at_the_baseline_if_they_change_nothing(finished):
    run = read_run(finished)
    levels = {(entry.variant, entry.metric): entry for entry in run.effects}
    floor, baseline = levels["noise floor", "object"], levels["baseline", "object"]
    assert floor.n == 2  # prompts, at the first seed
    assert baseline.n == 4
    assert floor.value == baseline.value + floor.difference


def test_the_row_of_a_cell_is_found_also_in_a_part_of_a_run(finished):
    run = read_run(finished)
    for part in (run, run.part(range(1)), run.part(range(1, len(run.places)))):
        for row in part.metrics:
            found = part.cell(row["variant"], row["prompt"], row["seed"])
            keys = ("variant", "prompt", "seed", "cell")
            assert [found[key] for key in keys] == [row[key] for key in keys]
        assert len(part.images) == len(part.metrics)
    with pytest.raises(KeyError):
        run.cell("half", "a prompt of another run", 0)


# ---- a cell without an image


def test_cells_without_an_image_have_rows_without_values(tmp_path):
    folder = stores.make_store(tmp_path / "s", skip=lambda cell: cell.variant == "half" and cell.seed == 1)
    run = read_run(folder)
    place = run.places[1]
    assert np.isnan(run.cell("half", *place)["ssim"])
    assert run.cell("half", *run.places[0])["ssim"] < 1
    entry = next(e for e in run.effects if (e.variant, e.metric) == ("half", "sharpness"))
    assert entry.n == 2
    folder = stores.make_store(tmp_path / "t", skip=lambda cell: cell.variant == "baseline" and cell.seed == 0)
    run = read_run(folder)
    assert all(np.isnan(run.cell(variant, *run.places[0])["ssim"]) for variant in run.variants)
    assert run.cell("half", *run.places[1])["ssim"] < 1


def test_images_of_other_cells_are_counted_by_variant(store):
    with open_store(store) as opened:
        every = stores.every_key(store)
        assert opened.other_cells(every) == {}
        assert opened.other_cells(set()) == {"baseline": 4, "zero": 4, "half": 4}


# ---- versions


def test_a_modified_checkout_is_marked(tmp_path, monkeypatch):
    package = tmp_path / "fluxlab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(fluxlab, "__file__", str(package / "__init__.py"))
    assert commit() == "none"

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit()
    assert len(clean) == 40
    (package / "__init__.py").write_text("changed = True\n")
    assert commit() == f"{clean}-dirty"


# ---- what is read again


@pytest.mark.parametrize("verify", [False, True])
def test_a_drawn_file_that_is_missing_or_damaged_is_noticed(store, verify):
    page = store / "report-pages" / "0002.html"
    page.parent.mkdir()
    page.write_text("a page")
    with open_store(store, verify=verify) as opened:
        opened.seal()
        assert opened.sealed(())
        page.write_text("a cut")
        assert not opened.sealed(())
        page.unlink()
        assert not opened.sealed(())


def test_a_file_is_read_again_if_its_size_or_time_changed(store, monkeypatch):
    from fluxlab.experiment import manifest
    from fluxlab.experiment import store as store_module
    from fluxlab.experiment.cells import cells
    from fluxlab.experiment.spec import from_request

    def hashed(verify=False):
        """Return (files that were hashed, keys of complete cells)."""
        read = []
        for module in (manifest, store_module):
            monkeypatch.setattr(module, "sha256_of", lambda file: (read.append(file.name), files.sha256_of(file))[1])
        with open_store(store, verify=verify) as opened:
            asked, how = from_request(opened.record["request"]), opened.settings()
            complete = {c.key for c in cells(asked, how) if opened.has(c) and opened.has_arrays(c, asked.captures)}
        return set(read), complete

    every = stores.every_key(store)
    sealed = (store / "manifest.jsonl").stat().st_mtime_ns
    for file in store.rglob("*"):
        if file.name != "manifest.jsonl":
            os.utime(file, ns=(sealed - 10**9, sealed - 10**9))
    assert hashed() == (set(), every)
    read, complete = hashed(verify=True)
    assert {f"{key}.png" for key in every} <= read
    assert complete == every

    image = min((store / "cells").glob("*.png"))
    content, arrays = image.read_bytes(), min(store.glob("attention/*/*.safetensors"))
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # newer, and as large as before
    assert hashed() == ({image.name}, every - {image.stem})
    os.utime(image, ns=(sealed - 10**9, sealed - 10**9))  # a damage that leaves no trace but in the content
    assert hashed() == (set(), every)
    assert hashed(verify=True)[1] == every - {image.stem}
    image.write_bytes(content)
    assert hashed() == ({image.name}, every)
    flipped = bytearray(arrays.read_bytes())
    flipped[-1] ^= 1
    arrays.write_bytes(flipped)
    assert hashed(verify=True)[1] == every - {arrays.stem}


def test_the_rows_of_a_large_table_are_written_once():
    import csv
    import io

    from fluxlab.experiment.effects import to_csv

    rows = [{"cell": f"c{i}", "ssim": i / 8, "psnr": float("nan")} for i in range(2500)]
    read = list(csv.DictReader(io.StringIO("".join(to_csv(rows)))))
    assert read == [{"cell": f"c{i}", "ssim": f"{i / 8:.6g}", "psnr": ""} for i in range(2500)]


def large_manifest(folder, count):
    lines = (json.dumps({"file": f"cells/{i:032x}.png", "bytes": i, "sha256": f"{i:064x}"}) for i in range(count))
    (folder / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Manifest(folder)


def test_files_are_found_in_every_block_of_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr("fluxlab.experiment.manifest.BLOCK", 3)
    (tmp_path / "cells").mkdir()
    for i in range(9):
        (tmp_path / "cells" / f"{i:032x}.png").write_bytes(b"x" * i)
    for count in (0, 1, 3, 8):
        manifest = large_manifest(tmp_path, count)
        os.utime(tmp_path / "manifest.jsonl", (2**33, 2**33))
        manifest = Manifest(tmp_path)
        assert manifest.problem == ""
        assert list(manifest.names) == [f"cells/{i:032x}.png" for i in range(count)]
        assert [manifest.unchanged(f"cells/{i:032x}.png") for i in range(9)] == [i < count for i in range(9)]
        for name in ("a.csv", "cells/0.png", "cells-b/a.png", "z.csv"):
            assert manifest.changed(name) == "manifest.jsonl does not list it"
    (tmp_path / "cells" / f"{5:032x}.png").write_bytes(b"y")
    assert not manifest.unchanged(f"cells/{5:032x}.png")
    assert manifest.changed(f"cells/{5:032x}.png") == NOT_AS_LISTED


def test_a_manifest_in_another_order_is_damaged(tmp_path):
    large_manifest(tmp_path, 3)
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines(keepends=True)
    for order in ((1, 0, 2), (0, 0, 1)):
        (tmp_path / "manifest.jsonl").write_text("".join(lines[i] for i in order))
        manifest = Manifest(tmp_path)
        assert manifest.problem == "manifest.jsonl is damaged"
        assert list(manifest.names) == []
        assert not manifest.unchanged(f"cells/{1:032x}.png")


def test_a_large_store_s_manifest_and_tables_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("fluxlab.experiment.rows.IN_MEMORY", 1 << 16)
    count = 4000
    names = [f"m{i}" for i in range(20)]
    lines = [",".join(["variant", "prompt", "seed", "cell", *names])]
    lines += [f"v,a prompt,{i},{i:032x}," + ",".join(str(i / 7)[:6] for _ in names) for i in range(count)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    tracemalloc.start()
    try:
        manifest = large_manifest(tmp_path, count)
        of_manifest, _ = tracemalloc.get_traced_memory()
        rows = read_table(tmp_path / "metrics.csv")
        of_both, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert manifest.problem == ""
    assert of_manifest < 5 * count
    assert of_both - of_manifest < 5 * count
    keys = {"variant": "v", "prompt": "a prompt", "seed": 1, "cell": f"{1:032x}"}
    assert rows[1] == keys | dict.fromkeys(names, 0.1428)
    assert rows[-2:] == [rows[count - 2], rows[count - 1]]


def test_the_manifest_lists_files_in_the_order_of_their_parts(tmp_path):
    names = ["a/z.png", "a-b/c.png", "a.csv", "a/b/c.json", "B.csv"]
    for name in [*names, "wandb/run/log.txt", "deep/wandb/kept.txt", ".manifest.jsonl.0.part", "a/.z.png.0.part"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = sorted(Path(name) for name in [*names, "deep/wandb/kept.txt"])
    assert list(files.files_in(tmp_path, ("wandb",))) == [path.as_posix() for path in expected]


def test_files_are_listed_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 500)
    expected = sorted(f"{i:032x}.json" for i in range(4000))
    (tmp_path / "a").mkdir()
    for name in expected:
        (tmp_path / "a" / name).touch()
    names = files.files_in(tmp_path)
    tracemalloc.start()
    try:
        count = sum(1 for _ in names)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4000
    assert peak < 250 * 500 + 4000 // 500 * 20_000  # bytes of names, and of the files with the other parts
    assert list(files.files_in(tmp_path)) == [f"a/{name}" for name in expected]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 12, 13])
def test_texts_in_order(count, monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 4)
    texts = [f"{7 * i % 13:02} \n\udc80ü" for i in range(count)]  # as names that are not UTF-8 are read
    assert list(files.in_order(iter(texts))) == sorted(texts)
    assert list(files.left_over(sorted(texts), files.in_order(texts[::2]))) == sorted(texts[1::2])


def test_others_are_not_read_without_texts():
    def read():
        raise AssertionError
        yield ""

    assert list(files.left_over([], read())) == []
    assert list(files.left_over(["a", "c"], ["b"])) == ["a", "c"]


def test_the_content_of_a_file_is_compared_in_parts(tmp_path):
    file = tmp_path / "f"
    assert not files.has_content(file, [])
    file.write_bytes(b"abcdef")
    assert files.has_content(file, [b"ab", b"", b"cdef"])
    for parts in ([], [b"abcde"], [b"abcdefg"], [b"abcdef", b"g"], [b"x", b"bcdef"]):
        assert not files.has_content(file, parts)


@pytest.mark.parametrize("in_memory", [0, 100, 1 << 20])
def test_rows_are_kept_in_memory_and_in_a_file(in_memory, monkeypatch):
    monkeypatch.setattr("fluxlab.experiment.rows.IN_MEMORY", in_memory)
    records = Records(["variant", "seed", "cell", "ssim"])
    expected = [
        {"variant": "ab"[i % 2], "seed": 2**63 - 1 - i, "cell": f"{i:032x}", "ssim": value}
        for i, value in enumerate([0.1, -0.0, float("inf"), 5e-324])
    ]
    for i in (2, 0, 3, 1):
        records.put(i, expected[i].values())
    rows = Rows(records, range(4))
    assert repr(list(rows)) == repr(expected)
    assert rows[1:3] == expected[1:3]
    assert rows.choose([3, 0]) == [expected[3], expected[0]]
    for wrong in (["a", 2**63, f"{1:032x}", 0.5], ["a", 1, "ab", 0.5], ["a", 1, f"{1:032x}"]):
        with pytest.raises(ValueError, match=r"out of range|32 hex digits|expected 4 items"):
            records.put(4, wrong)
    assert len(records) == 4


@pytest.mark.parametrize("rows", [[], [{"prompt": "é\n"}], [{"seed": 1}, {"file": 'a"b', "size": [2, {}]}]])
def test_an_index_is_the_json_of_its_rows(rows):
    content = {"capture": {"words": [1, 2]}, "cells": []}
    expected = json.dumps(content | {"cells": rows}, indent=1, ensure_ascii=False) + "\n"
    assert "".join(captures._with_rows(content, rows)) == expected


def test_a_full_disk_of_temporary_files(monkeypatch):
    monkeypatch.setattr("fluxlab.experiment.rows.IN_MEMORY", 0)
    write, room = os.pwrite, 20

    def pwrite(file, content, place):  # as a disk does that becomes full
        if place >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[: min(room - place, 7)], place)

    monkeypatch.setattr("fluxlab.experiment.rows.os.pwrite", pwrite)
    records = Records(["seed", "ssim"])
    records.put(0, [3, 0.5])
    assert records.row(0) == {"seed": 3, "ssim": 0.5}
    with pytest.raises(OSError, match="No space left") as raised:
        records.put(1, [4, 0.25])
    assert raised.value.filename == tempfile.gettempdir()
    assert len(records) == 1
