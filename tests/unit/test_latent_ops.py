"""Ops that see the latents: SEGA against a derivation with NumPy, and the latents of each sample and step."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab import gradients
from fluxlab.positions import Program, compile_programs, op, tables
from fluxlab.positions.at_step import sequence
from fluxlab.positions.registry import OPS
from fluxlab.sampling import Sampling
from tests import families

TEXT, TRAINED = 3, (8, 8)
SIZES = {"flux1": {"axes_dim": (16, 56, 56), "theta": 10000.0}, "flux2": {"axes_dim": (32,) * 4, "theta": 2000.0}}


LEAST = {"flux1": 0.01, "flux2": 0.001}
"""How far latents with `sega` are from others at least: positions mean less to random weights."""


@pytest.fixture(scope="module", params=families.NAMES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    """The embedded FLUX.1, or a random FLUX.2 of the same size of images."""
    if family == "flux1":
        return fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    return replace(families.load("flux2"), size=(64, 64), max_sequence_length=16)


def latents(rows, cols, seed=0, smooth=True):
    """Packed latents with most energy at low frequencies."""
    g = np.random.default_rng(seed)
    x = g.standard_normal((rows, cols, 16))
    if smooth:
        y = np.arange(rows)[:, None, None] / rows + np.arange(cols)[None, :, None] / cols
        x = 0.2 * x + 3 * np.sin(2 * np.pi * y) + np.cos(9 * y)
    return x


def profile(image, axis):
    """Energy of each frequency along an axis, one at a time, with the sum of the transform written out."""
    lines = image if axis == 0 else image.T
    n = len(lines)
    energies = []
    for f in range(n // 2 + 1):
        turn = np.exp(-2j * np.pi * f * np.arange(n) / n)
        energies.append(np.mean([abs(sum(turn * line)) ** 2 for line in lines.T]))
    return energies


def spread_of(image, power):
    rows, cols = image.shape
    energy = abs(np.fft.fftshift(np.fft.fft2(image))) ** 2
    bins = max(rows, cols) // 2
    far = max(math.hypot(r - rows / 2, c - cols / 2) for r in range(rows) for c in range(cols))
    members = [[] for _ in range(bins)]
    for r in range(rows):
        for c in range(cols):
            members[min(int(math.hypot(r - rows / 2, c - cols / 2) / far * bins), bins - 1)].append(energy[r, c])
    means = [max(sum(m) / len(m), 1e-8) if m else 1e-8 for m in members]
    flatness = math.exp(sum(map(math.log, means)) / bins) / (sum(means) / bins)
    return 1 - flatness**power


def gains(x, axis, s, pairs, alpha=0.15, beta=1.5, kappa=0.08, power=1.5, least=1.0):
    image = x.mean(-1)
    image = image - image.mean()
    logs = [math.log(max(e, 1e-8)) for e in profile(image, axis)]
    raw = []
    for i in range(pairs):
        place = (1 - i / (pairs - 1)) * (len(logs) - 1)
        low = min(int(place), len(logs) - 2)
        raw.append(logs[low] * (1 - (place - low)) + logs[low + 1] * (place - low))
    mean = sum(raw) / pairs
    std = math.sqrt(sum((r - mean) ** 2 for r in raw) / (pairs - 1))
    shares = [math.tanh(beta * (r - mean) / std) for r in raw]
    shares = [share - sum(shares) / pairs for share in shares]
    spread = spread_of(image, power)
    return [max(s**kappa * (1 - alpha * spread * share), least) for share in shares]


def expected(x, family, **arguments):
    rows, cols = x.shape[:2]
    dims, theta = SIZES[family].values()
    cos, sin = (np.zeros((TEXT + rows * cols, sum(dims) // 2)) for _ in range(2))
    pairs, first, last = dims[1] // 2, dims[0] // 2, dims[0] // 2 + dims[1]
    cos[:, :first] = 1
    for i in range(sum(dims) // 2 - last):  # the order of the text
        for token in range(TEXT + rows * cols):
            at = (token if token < TEXT else 0) * theta ** (-2 * i / dims[3])
            cos[token, last + i], sin[token, last + i] = math.cos(at), math.sin(at)
    for axis, n, start in ((0, rows, first), (1, cols, first + pairs)):
        s = max(n / TRAINED[axis], 1)
        by = gains(x, axis, s, pairs, **arguments) if s > 1 else [1.0] * pairs
        for i in range(pairs):
            omega = (theta * s ** (2 * pairs / (2 * pairs - 2))) ** (-i / pairs)
            for token in range(TEXT + rows * cols):
                at = 0 if token < TEXT else divmod(token - TEXT, cols)[axis]
                cos[token, start + i] = by[i] * math.cos(at * omega)
                sin[token, start + i] = by[i] * math.sin(at * omega)
    return cos, sin


@pytest.mark.parametrize("arguments", [{}, {"alpha": 0.5, "beta": 3, "kappa": 0.3, "power": 2, "least": 0}])
@pytest.mark.parametrize("size", [(12, 10), (9, 16), (12, 8)])
def test_sega_against_a_derivation(family, size, arguments):
    x = latents(*size)
    given = {"text_tokens": TEXT, "trained": TRAINED, **SIZES[family]}
    packed = torch.tensor(x).reshape(-1, 16)
    found = tables({"a": {"op": "sega", **arguments}}, *size, **given, latent=packed)
    for part, want in zip(found, expected(x, family, **arguments), strict=True):
        assert np.abs(part.numpy() - want).max() < 1e-6


def test_sega_at_the_trained_size_and_without_latents():
    own, none = tables(None, 8, 8, trained=TRAINED), tables({"a": {"op": "sega"}}, 8, 8, trained=TRAINED)
    assert all(map(torch.equal, own, none))
    flat, ntk = (tables({"a": {"op": name}}, 16, 16, trained=TRAINED) for name in ("sega", "ntk"))
    assert torch.allclose(flat[0][:, 8:], ntk[0][:, 8:] * 2**0.08, atol=1e-6)


def compiled(programs, **more):
    sizes = {"grid": (12, 10), "text": TEXT, "double": 1, "single": 1, "heads": 2, "steps": 4, "trained": TRAINED}
    context = sequence(**{**sizes, **more})
    return compile_programs([Program.from_config(program) for program in programs], context)


SEGA = {"a": {"op": "sega"}}


def test_each_sample_has_the_table_of_its_latents():
    programs = [SEGA, {}, SEGA, {"a": {"op": "sega", "steps": [1], "strength": 0.5}}]
    x = torch.stack([torch.tensor(latents(12, 10, seed)).reshape(-1, 16) for seed in range(4)]).float()
    batch = compiled(programs)
    assert batch.sees_latents
    assert not compiled([{}, {"a": {"op": "dype"}}]).sees_latents
    for t in (1.0, 0.75, 0.5):
        together = batch.at(t, latents=x).rotary
        for b, program in enumerate(programs):
            alone = compiled([program]).at(t, latents=x[b : b + 1]).rotary
            assert all(torch.equal(a[min(b, len(a) - 1)], c[0]) for a, c in zip(together, alone, strict=True))
    assert not torch.equal(together.cos[0], together.cos[2])


def test_tables_are_a_function_of_latents_and_step():
    """Equal latents at an equal time give the same object; other latents, other tables; equal again, equal again."""
    x = torch.tensor(latents(12, 10)).reshape(1, -1, 16).float()
    batch = compiled([SEGA])
    first = batch.at(0.75, latents=x)
    assert batch.at(0.75, latents=x.clone()) is first
    other = batch.at(0.75, latents=x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(other.rotary.cos, first.rotary.cos)
    assert torch.equal(batch.at(0.75, latents=x).rotary.cos, first.rotary.cos)


def test_images_do_not_depend_on_the_batch(pipe):
    more = {"height": 96, "width": 96, "steps": 3, "output": "latent"}
    programs = [SEGA, {"a": {"op": "ntk"}}, SEGA]
    together = pipe.generate("a cat", [0, 0, 1], programs, **more)
    for b, (seed, program) in enumerate(zip((0, 0, 1), programs, strict=True)):
        alone = pipe.generate("a cat", seed, program, **more)[0]
        assert (together[b] - alone).abs().max() <= 1e-4 * alone.std()
    assert (together[0] - together[1]).abs().max() > LEAST[pipe.family.name] * together.std()


def test_guidance_and_inversion_see_the_latents(pipe):
    more = {"height": 96, "width": 96, "steps": 2}
    guided = pipe.generate("a cat", 0, SEGA, true_cfg=2.0, output="latent", **more)
    assert guided.isfinite().all()
    (image,) = pipe.generate("a cat", 0, SEGA, **more)
    assert pipe.invert(image, "a cat", steps=2, programs=SEGA).isfinite().all()


def test_an_op_of_ones_own():
    seen = []

    @op("looks", acts_on="frequencies", tokens="all", sees_latent=True)
    def looks(waves, spectrum):
        """See the latents."""
        if spectrum.latent is not None:
            seen.append((spectrum.t, spectrum.latent))
        return waves._replace(frequency=waves.frequency / 2)

    try:
        x = torch.arange(2 * 120 * 4.0).reshape(2, 120, 4)
        batch = compiled([{"a": {"op": "looks"}}])
        batch.at(1.0, latents=x[:1])
        (t, latent) = seen[-1]
        assert t == 1.0
        assert torch.equal(latent, x[0].double().reshape(12, 10, 4))
    finally:
        del OPS["looks"]


def test_gradients_of_one_program_for_a_batch(pipe):
    """Every sample has its own latents there, too."""
    sizes = {"height": 96, "width": 96, "steps": 2}
    prepared = gradients.prepare(pipe, ["a cat"] * 2, [0, 1], Sampling(**sizes))
    step = gradients.stepping(prepared, gradients.compiled(prepared, Program.from_config(SEGA)))
    with torch.no_grad():
        x = gradients.sampled(prepared, step)
        own = pipe.generate("a cat", [0, 1], SEGA, **sizes, output="latent")
    assert (x - own).abs().max() <= 1e-3 * own.std()


def test_shared_steps_see_the_latents_that_they_share(pipe):
    """Samples that act alike until a step share it; afterwards each has its own spectrum."""
    later = {**SEGA, "b": {"op": "scale", "factor": 1.3, "steps": [2]}}
    more = {"height": 96, "width": 96, "steps": 4, "output": "latent"}
    together = pipe.generate("a cat", [0, 0, 1], [SEGA, later, SEGA], **more)
    for b, (seed, program) in enumerate(zip((0, 0, 1), (SEGA, later, SEGA), strict=True)):
        alone = pipe.generate("a cat", seed, program, **more)[0]
        assert (together[b] - alone).abs().max() <= 1e-3 * alone.std()
    assert (together[0] - together[1]).abs().max() > LEAST[pipe.family.name] * together.std()
