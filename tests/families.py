"""Both families for the same tests: tiny random folders, each written once per process and shared by all tests."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import fluxlab
from tests import tiny, tiny2

NAMES = ("flux1", "flux2")
FIRST = {"flux1": 0, "flux2": 1}
"""The text token of the first word of a prompt. In FLUX.2 the template's tokens come before it."""

BLOCKS = {"flux1": 4, "flux2": 5}


@cache
def folder(family: str) -> Path:
    """Return a folder without guidance. 16 text tokens are enough for a prompt of a few words of `tiny.WORDS`."""
    where = Path(tempfile.mkdtemp(prefix=f"fluxlab-{family}-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    if family == "flux1":
        return tiny.save(where, guidance=False, dynamic_shift=False)
    return tiny2.save(where, words=tiny.WORDS)


def load(family: str, **options) -> fluxlab.Pipeline:
    """Load `folder(family)`; nothing is cached. Each call returns a pipeline of its own."""
    return fluxlab.load_pipeline(folder(family), cache="none", **options)
