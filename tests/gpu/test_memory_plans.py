"""FLUX.1 from files of its real size on pretended cards of 24, 12 and 8 GB: what a run takes is within its plan.

The files are sparse: they have headers and sizes, and take no room on the disk. Weights are never read.
"""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks.fullsize import TINY, TRANSFORMER, encoders, files
from fluxlab.conditioning import Texts
from fluxlab.conditioning.encoders import StoredEncoders
from fluxlab.config import find_row
from fluxlab.loading import load_row
from fluxlab.memory.costs import modulation_width
from fluxlab.memory.ring import CudaEngine
from fluxlab.memory.source import Unit, WeightSource
from fluxlab.model import TRANSFORMERS
from fluxlab.probes import Probe
from fluxlab.sampling import Sampling
from tests.gpu.fake_device import UNAVAILABLE, available, captured, pretend
from tests.gpu.fake_streams import RaceError

pytestmark = pytest.mark.skipif(not available(), reason=UNAVAILABLE)

PROMPT = "a red cat holding a sign that says hello world"
GB = 10**9
TIED = 2 * 32128 * 4096
"""Bytes of T5's embeddings, which two of its modules share. On the pretended device each of them gets a copy."""
LENGTHS = {"dev": 512, "schnell": 256}
NAMES = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


def write_sparse(file, shapes, dtype) -> None:
    """Write a file of the real size that takes no room. A tensor without axes is a counter, and comes first."""
    header, at = {}, 0
    for name in sorted(shapes, key=lambda name: shapes[name] != ()):
        shape = shapes[name]
        size = dtype.itemsize * torch.Size(shape).numel() if shape else 8
        kind = NAMES[dtype] if shape else "I64"
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(file, "wb") as out:
        out.write(len(content).to_bytes(8, "little") + content)
        out.truncate(8 + len(content) + at)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dev and schnell in bf16 and float8, the autoencoder, and text encoders as large as FLUX.1's."""
    path = tmp_path_factory.mktemp("sparse")
    for name, (config, _) in encoders("dev").items():
        (path / name).mkdir()
        config.save_pretrained(path / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TINY / name, path / name)
    for model in ("dev", "schnell"):
        for name, shapes in files(model).items():
            if name != TRANSFORMER:
                write_sparse(path / name, shapes, torch.bfloat16)
                continue
            for kind, dtype in (("bf16", torch.bfloat16), ("float8", torch.float8_e4m3fn)):
                write_sparse(path / f"flux1-{model}-{kind}.safetensors", shapes, dtype)
    return path


@pytest.fixture
def unread(monkeypatch):
    """Nothing is read from the files."""
    monkeypatch.setattr("fluxlab.checkpoints.casting._finite", lambda *_: True)
    monkeypatch.setattr(WeightSource, "read", lambda self, unit, buffer, run=None: None)
    monkeypatch.setattr(Unit, "check", lambda *_: None)


def load(folder, name, kind, prompts=(PROMPT,), **memory):
    """Load a pipeline as a run does: its prompts are encoded first."""
    row = replace(
        find_row(folder / f"flux1-{name}-{kind}.safetensors"),
        autoencoder=str(folder / "ae.safetensors"),
        text=str(folder),
        tokenizers=str(folder),
        like=name,
        max_sequence_length=LENGTHS[name],
    )
    return load_row(row, device="cuda", texts=Texts(prompts, unknown_words="allow"), cache="none", memory=memory)


@pytest.fixture
def encoded(monkeypatch):
    """Text encoders are not opened: their states are 0."""

    def encode(self, prompts, length):
        return [(torch.zeros(1, length, 4096).bfloat16(), torch.zeros(1, 768).bfloat16()) for _ in prompts]

    monkeypatch.setattr(StoredEncoders, "_encode", encode)


@pytest.mark.parametrize(
    ("name", "card", "kind"),
    [("dev", 24, "bf16"), ("dev", 12, "bf16"), ("dev", 8, "float8"), ("schnell", 24, "bf16"), ("schnell", 8, "float8")],
)
def test_word_maps_at_full_size(folder, unread, encoded, name, card, kind):
    """Traced ≤ planned ≤ the card, of which 1 GB stays free. The plan promises at most a tenth more than is used."""
    with pretend("cuda", card * GB) as device:
        pipe, probe = load(folder, name, kind), Probe("words")
        plan = pipe.prepare(Sampling(steps=1), [PROMPT], probe)
        device.read_back.clear()
        pipe.generate(PROMPT, steps=1, probe=probe)
        assert device.peak <= plan.peak_bytes <= (card - 1) * GB
        assert plan.peak_bytes <= 1.1 * device.peak
        assert (len(plan.streamed) > 0) == (card < 24)
        assert (device.streams.copies > len(pipe.streaming.residency.source.units)) == (card < 24)
        known = modulation_width(TRANSFORMERS[name])
        tables = [shape for shape, dtype in device.read_back if dtype == torch.bfloat16]
        device.read_back = [(shape, dtype) for shape, dtype in device.read_back if dtype != torch.bfloat16]
        assert tables == [(1, known)]  # made once, and kept on the host
        assert sum(math.prod(shape) for shape in captured(device)) == probe.arrays["words"].values.size


def test_batches_in_turns(folder, unread, encoded):
    """Two batches go through each streamed block before the next one is loaded."""
    prompts, settings = (PROMPT, "a cat"), Sampling(steps=1, height=512, width=512)
    with pretend("cuda", 9 * GB) as device:
        pipe = load(folder, "schnell", "float8", prompts)
        plan = pipe.prepare(settings, [PROMPT], batches=2)
        assert plan.together == 2
        assert plan.streamed

        def task(prompt):
            with device, torch.inference_mode():  # a mode belongs to a thread
                return pipe.sample([prompt], [0], None, settings)

        before = device.streams.copies
        pipe.streaming.together([lambda prompt=prompt: task(prompt) for prompt in prompts])
        read = device.streams.copies - before
        assert device.peak <= plan.peak_bytes <= 8 * GB
    streamed, made = len(plan.streamed), plan.blocks + 1  # modulations of all blocks and the final layer
    assert streamed <= read - 2 * made <= streamed + 4  # two tables; the ring reads ahead


@pytest.mark.parametrize(("card", "how"), [(24, "first"), (8, "layers")])
def test_text_goes_first(folder, unread, card, how):
    with pretend("cuda", card * GB) as device:
        pipe = load(folder, "schnell", "float8")
        peak = device.peak
        plan = pipe.prepare(Sampling(steps=1), [PROMPT])
        assert plan.text == how
        assert peak - TIED <= plan.phases["text"] <= (card - 1) * GB
        assert device.live <= plan.parts["ends"] + plan.parts["autoencoder"] + plan.parts["resident"] + 10**6


def test_a_copy_that_nobody_waits_for_is_found(folder, unread, encoded, monkeypatch):
    """What the tests above rely on: without any of the waits of the ring, a run on the pretended card fails."""
    for wait in ("wait", "computed"):
        with pretend("cuda", 8 * GB) as device, monkeypatch.context() as patch:
            pipe = load(folder, "schnell", "float8")
            pipe.prepare(Sampling(steps=1), [PROMPT])
            patch.setattr(CudaEngine, wait, lambda self, mark=None: device.streams.event())
            with pytest.raises(RaceError):
                pipe.generate(PROMPT, steps=1, height=256, width=256)
