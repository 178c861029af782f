"""The cache of encoded prompts, across processes: the second run opens no file of the text encoders."""

import ctypes
import ctypes.util
import os
import struct
import sys
import time
from pathlib import Path

import pytest

from fluxlab import run as command_line
from fluxlab.checkpoints.random import write_random
from tests import processes

IN_OPEN = 0x20


class Opens:
    """Counts which files of some folders any process opens, as Linux's inotify sees it."""

    def __init__(self, *folders: Path):
        self._libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        self._folders = {}
        for folder in folders:
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_OPEN)
            assert watch >= 0, os.strerror(ctypes.get_errno())
            self._folders[watch] = folder

    def read(self) -> set[str]:
        """Return folder/name of what was opened since the last call."""
        opened = set()
        while True:
            try:
                content = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return opened
            while content:
                watch, _, _, length = struct.unpack_from("iIII", content)
                name = content[16 : 16 + length].rstrip(b"\0").decode()
                if name:
                    opened.add(f"{self._folders[watch].name}/{name}")
                content = content[16 + length :]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_random(tmp_path_factory.mktemp("text") / "model")
    time.sleep(2.1)  # files that have just changed are not remembered
    return folder


def run(model, out, *words, process=False):
    """Return the images of a run, in this process or in one of its own."""
    arguments = [
        *("+exp=hello", "model=local", f"model.path={model}", "model.max_sequence_length=24", "prompts=[a cat,a fox]"),
        *("height=16", "width=16", "steps=2", "seeds=1", "tracking=none", "device=cpu", f"out={out}", *words),
    ]
    if process:
        ran = processes.start("fluxlab.run", *arguments)
        assert ran.wait() == 0, ran.read()
    else:
        assert command_line.main(arguments) == 0
    return {file.name: file.read_bytes() for file in sorted((out / "cells").glob("*.png"))}


ENCODERS = {"text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}


def test_the_second_run_opens_no_file_of_the_encoders(model, tmp_path):
    opens = Opens(*(model / part for part in ("text_encoder", "text_encoder_2", "transformer")))
    transformer = "transformer/diffusion_pytorch_model.safetensors"
    cache = f"cache={tmp_path / 'cache'}"
    without = run(model, tmp_path / "without", "cache=none")
    assert opens.read() >= {*ENCODERS, transformer}
    first = run(model, tmp_path / "first", cache)
    assert opens.read() >= {*ENCODERS, transformer}
    second = run(model, tmp_path / "second", cache, "+variants.zero.a.op=zero", process=True)  # another experiment
    opened = opens.read()
    assert transformer in opened
    assert not opened & ENCODERS
    assert first == without
    assert len(first) == 2
    assert {name: second[name] for name in first} == without
    more = run(model, tmp_path / "more", cache, "prompts=[a cat,a dog]")
    assert opens.read() >= ENCODERS
    assert len(set(more.values()) & set(without.values())) == 1


def test_negative_prompts_are_cached_too(model, tmp_path):
    opens = Opens(model / "text_encoder", model / "text_encoder_2")
    words = (f"cache={tmp_path / 'cache'}", "true_cfg=2")
    first = run(model, tmp_path / "first", *words)
    assert opens.read() >= ENCODERS
    assert run(model, tmp_path / "second", *words) == first
    assert not opens.read() & ENCODERS
    run(model, tmp_path / "third", *words, "negative_prompt=a dog")
    assert opens.read() >= ENCODERS
    run(model, tmp_path / "fourth", *words, "negative_prompt=a dog")
    assert not opens.read() & ENCODERS
