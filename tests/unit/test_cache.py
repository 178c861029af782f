"""The cache folder: atomic, checked, limited in size, and never needed."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from fluxlab import cache as caching
from fluxlab.cache import Cache, open_cache, read_tensors, remembered, write_tensors
from fluxlab.errors import UserError


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", 10**9)


def tensors(seed=0, size=100):
    draw = torch.Generator().manual_seed(seed)
    return {
        "txt": torch.randn(1, 5, size, generator=draw).bfloat16(),
        "y": torch.randn(1, 3, generator=draw).half(),
        "z": torch.randn(2, 2, dtype=torch.float64, generator=draw),
    }


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def files(cache, kind="text"):
    return sorted(file.name for file in (cache.folder / kind).iterdir())


def test_tensors_come_back_bit_by_bit(cache):
    assert read_tensors(cache, "a") is None
    write_tensors(cache, "a", tensors())
    write_tensors(cache, "b", tensors(1))
    assert equal(read_tensors(cache, "a"), tensors())
    assert equal(read_tensors(cache, "b"), tensors(1))
    assert files(cache) == ["a.safetensors", "b.safetensors"]


def test_a_changed_copy_does_not_change_the_file(cache):
    write_tensors(cache, "a", tensors())
    read_tensors(cache, "a")["txt"].zero_()
    assert equal(read_tensors(cache, "a"), tensors())


@pytest.mark.parametrize("damage", ["one bit of each byte", "cut", "empty", "text", "other tensors", "no digest"])
def test_a_damaged_entry_counts_as_missing(cache, damage):
    write_tensors(cache, "a", tensors())
    file = cache.folder / "text" / "a.safetensors"
    content = file.read_bytes()
    if damage == "one bit of each byte":
        start = 8 + int.from_bytes(content[:8], "little")
        for i in range(start, len(content), 97):
            file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            assert read_tensors(cache, "a") is None, i
    elif damage == "cut":
        for length in (1, 7, 100, len(content) - 1):
            file.write_bytes(content[:length])
            assert read_tensors(cache, "a") is None, length
    elif damage in ("empty", "text"):
        file.write_bytes(b"" if damage == "empty" else b"x" * 5000)
    else:
        from safetensors.torch import save

        noted = {"sha256": caching._digest(tensors())} if damage == "other tensors" else None
        file.write_bytes(save(tensors(7), noted))
    assert read_tensors(cache, "a") is None
    write_tensors(cache, "a", tensors())
    assert equal(read_tensors(cache, "a"), tensors())


def test_the_oldest_used_entries_are_removed(tmp_path):
    size = len(entry(tmp_path))
    cache = Cache(tmp_path / "cache", 3 * size)
    for i, key in enumerate("abc"):
        write_tensors(cache, key, tensors(i))
        age(cache, key, 100 - i)
    assert read_tensors(cache, "a")  # used again: now b is the oldest
    write_tensors(cache, "d", tensors(3))
    assert files(cache) == ["a.safetensors", "c.safetensors", "d.safetensors"]
    assert equal(read_tensors(cache, "a"), tensors(0))
    write_tensors(Cache(cache.folder, size), "e", tensors(4))
    assert files(cache) == ["e.safetensors"]


def entry(tmp_path) -> bytes:
    write_tensors(Cache(tmp_path / "one", 10**9), "a", tensors())
    return (tmp_path / "one" / "text" / "a.safetensors").read_bytes()


def age(cache, key, seconds):
    then = time.time() - seconds
    os.utime(cache.folder / "text" / f"{key}.safetensors", (then, then))


def test_an_entry_stays_readable_for_who_has_it_when_it_is_removed(tmp_path):
    cache = Cache(tmp_path / "cache", len(entry(tmp_path)))
    write_tensors(cache, "a", tensors())
    held = read_tensors(cache, "a")
    age(cache, "a", 10)
    write_tensors(cache, "b", tensors(1))
    assert files(cache) == ["b.safetensors"]
    assert equal(held, tensors())


def test_what_killed_processes_left_is_removed_after_an_hour(cache):
    write_tensors(cache, "a", tensors())
    old, new = (cache.folder / "text" / f".{name}.1.part" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"x" * 10)
    os.utime(old, (time.time() - 4000,) * 2)
    write_tensors(cache, "b", tensors())
    assert not old.exists()
    assert new.exists()


def test_writers_and_readers_at_once(tmp_path):
    """Eight threads write, read and evict: a reader gets what was written, or nothing."""
    cache = Cache(tmp_path / "cache", 4 * len(entry(tmp_path)))
    wrong = []

    def work(number):
        for i in range(12):
            key = (number + i) % 6
            write_tensors(cache, str(key), tensors(key))
            found = read_tensors(cache, str((key + 1) % 6))
            if found is not None and not equal(found, tensors((key + 1) % 6)):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_full_disk_is_no_error(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fluxlab.files.os.fsync", full)
    write_tensors(cache, "a", tensors())
    assert read_tensors(cache, "a") is None
    assert files(cache) == []
    assert remembered(cache, "kind", [], lambda: 3) == 3


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("FLUXLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_cache().folder == tmp_path / "xdg" / "fluxlab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for platform, folder in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(caching.sys, "platform", platform)
        assert open_cache().folder == tmp_path / "home" / folder / "fluxlab"
    monkeypatch.setattr(caching.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert open_cache().folder == tmp_path / "local" / "fluxlab"
    monkeypatch.setenv("FLUXLAB_CACHE", str(tmp_path / "variable"))
    assert open_cache().folder == tmp_path / "variable"
    assert open_cache(tmp_path / "key").folder == tmp_path / "key"
    assert open_cache("none") is None
    monkeypatch.setenv("FLUXLAB_CACHE", "none")
    assert open_cache() is None
    assert open_cache(str(tmp_path / "key")).folder == tmp_path / "key"


def test_a_named_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cache={tmp_path}/file: cannot be written .*; .* or cache=none"):
        open_cache(tmp_path / "file")
    monkeypatch.setenv("FLUXLAB_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(UserError, match=r"FLUXLAB_CACHE=.*cannot be written"):
        open_cache()
    monkeypatch.setattr(caching.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to write"):
        open_cache(tmp_path / "read-only")
    monkeypatch.delenv("FLUXLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_cache() is None  # nobody asked for this one


def test_the_limit(tmp_path, monkeypatch):
    assert open_cache(tmp_path).limit == 4_000_000_000
    monkeypatch.setenv("FLUXLAB_CACHE_GB", "0.5")
    assert open_cache(tmp_path).limit == 500_000_000
    for text in ("0", "-1", "much", "nan", "inf"):
        monkeypatch.setenv("FLUXLAB_CACHE_GB", text)
        with pytest.raises(UserError, match=f"FLUXLAB_CACHE_GB={text}: expected a number of gigabytes above 0"):
            open_cache(tmp_path)


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(caching, "_SETTLED", -1)


def test_what_is_remembered_of_files(cache, tmp_path, settled):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    calls = []

    def read():
        calls.append(1)
        return [file.read_text() for file in (one, other)]

    for _ in range(2):
        assert remembered(cache, "kind", [one, other], read) == ["1", "2"]
    assert len(calls) == 1
    assert remembered(cache, "kind", [one, other], read, "an argument") == ["1", "2"]
    assert remembered(cache, "more", [other, one], read) == ["1", "2"]
    assert len(calls) == 3
    other.write_text("3")  # of the same size
    assert remembered(cache, "kind", [one, other], read) == ["1", "3"]
    times = other.stat().st_mtime_ns
    other.unlink()
    other.write_text("4")
    os.utime(other, ns=(times, times))  # with the same time, as `cp -p` gives it
    assert remembered(cache, "kind", [one, other], read) == ["1", "4"]
    for note in (cache.folder / "files").iterdir():
        note.write_text('{"state": ')
    assert remembered(cache, "kind", [one, other], read) == ["1", "4"]
    calls.clear()
    assert remembered(None, "kind", [one, other], read) == ["1", "4"]
    assert len(calls) == 1


def test_a_file_that_has_just_changed_is_not_remembered(cache, tmp_path):
    """Its next change may leave size and times as they are, where times are rounded."""
    file = tmp_path / "file"
    file.write_text("1")
    assert remembered(cache, "kind", [file], file.read_text) == "1"
    assert not (cache.folder / "files").exists()
