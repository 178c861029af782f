"""Commands go on when their output cannot be printed."""

import io
import os
import subprocess
import sys

import pytest

from fluxlab.compose import guarded
from fluxlab.terminal import tolerant_output

PRINTS = """
import sys
from fluxlab.compose import guarded

def work():
    for i in range(2000):
        print("1 × 2 → 3", i, flush=True)
    open(sys.argv[1], "w").write("finished")

sys.exit(guarded(work, "interrupted"))
"""


def test_a_command_goes_on_when_its_output_is_closed(tmp_path):
    file = tmp_path / "done.txt"
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 0
    assert errors == ""
    assert file.read_text() == "finished"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_a_terminal_lacks_are_replaced(encoding, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PRINTS, tmp_path / "done.txt"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    sign = "?" if encoding == "ascii" else "×"
    assert done.stdout.decode(encoding).splitlines()[0] == f"1 {sign} 2 ? 3 0"


def test_streams_are_restored(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with tolerant_output():
        print("→")
    assert sys.stdout is stream
    assert stream.errors == "strict"
    assert stream.buffer.getvalue() == b"?\n"
    assert guarded(lambda: None, "interrupted") == 0
