"""Probes against a dense softmax in fp64: every kind of request, every kind of program, every block and step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fluxlab.model import layers
from fluxlab.model.attention import attend, kernel
from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import apply_rotary
from fluxlab.probes import PROBES, Probe
from tests import families

TEXT, STEPS, HEADS = 24, 2, 2
PROMPT = "a red cat holding a sign"
PROGRAMS = {
    "untouched": None,
    "ids": {"a": {"op": "scale", "factor": 2, "blocks": [0, 2]}, "b": {"op": "rotate", "degrees": 30, "heads": 1}},
    "mask": {"a": {"op": "mask", "from": "image", "to": {"words": "cat"}}},
    "soft mask of a head": {"a": {"op": "mask", "from": "text", "to": "image", "heads": 0, "strength": 0.9}},
    "temperature": {"a": {"op": "temperature", "factor": 2, "tokens": "all"}},
    "drop": {"a": {"op": "drop", "axes": "row", "side": "queries"}},
    "keys": {"a": {"op": "shuffle", "side": "keys", "blocks": "single"}},
    "groups": {
        "a": {"op": "zero", "side": "keys", "seen_by": "text"},
        "b": {"op": "offset", "by": [0, 1, 1], "side": "keys", "seen_by": {"box": [0, 0, 4, 1]}, "heads": 1},
        "c": {"op": "mask", "from": "image", "to": {"indices": [0]}, "steps": [0]},
    },
}
BOX = {"box": [1, 1, 3, 4]}
SPOTS = [{"indices": [0, 7, 2]}, {"words": "sign"}]


@pytest.fixture(scope="module", params=families.NAMES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    pipe = families.load(family)
    sharpen(pipe.transformer)
    return pipe


@pytest.fixture
def blocks(family) -> int:
    return families.BLOCKS[family]


@pytest.fixture
def cat(family) -> int:
    """The text token "cat" of `PROMPT`."""
    return families.FIRST[family] + 2


def sharpen(flux) -> None:
    """Increase q and k: with random weights, attention is nearly uniform."""
    with torch.no_grad():
        for name, weight in flux.named_parameters():
            if name.endswith("norm.scale"):
                weight.add_(0.5)
            elif "qkv" in name or "linear1" in name:
                weight.mul_(3)


def generate(pipe, programs, capture=None, size=(16, 24), prompts=PROMPT, **more):
    probe = None if capture is None else Probe({"max_mb": 300, **capture})
    latents = pipe.generate(
        prompts,
        seeds=[3] * len(programs),
        programs=programs,
        height=size[0],
        width=size[1],
        steps=STEPS,
        max_sequence_length=TEXT,
        output="latent",
        probe=probe,
        **more,
    )
    return latents, probe and probe.arrays


@pytest.fixture
def dense(monkeypatch):
    """Record each block's softmax in fp64, `(B, H, N, N)`, in the order of the calls, and the scores before masks."""
    recorded = []
    real = layers.joint_attention

    def attention(q, k, v, keys, mask, tap):
        groups = keys if isinstance(keys, KeyGroups) else None
        scores = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.float64)
        unrounded = mask is None and kernel("cpu", v.dtype, k.shape[2]) == "dense"
        wide = q.dtype if unrounded else v.dtype
        for n in range(q.shape[2]):
            table = (
                None
                if groups is None
                else next(t for i, t in zip(groups.queries, groups.tables, strict=True) if n in i)
            )
            turned = k if table is None else apply_rotary(k, table)
            row = q[:, :, n, None].to(wide).double() @ turned.to(wide).double().mT
            scores[:, :, n] = row[:, :, 0] / math.sqrt(q.shape[-1])
        biased = scores if mask is None else scores + mask.double()
        recorded.append((biased.softmax(-1), scores))
        return real(q, k, v, keys, mask, tap)

    monkeypatch.setattr(layers, "joint_attention", attention)
    return recorded


def stacked(dense, of=0) -> np.ndarray:
    """`(B, steps, blocks, H, N, N)`."""
    every = torch.stack([pair[of] for pair in dense]).unflatten(0, (STEPS, -1))
    return every.permute(2, 0, 1, 3, 4, 5).numpy()


def close(found, expected, bound=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound


SIZE, ALL = (16, 24), list(PROGRAMS)
CASES = [(SIZE, [name]) for name in PROGRAMS] + [(size, ALL) for size in (SIZE, (24, 24), (20, 16))]


class Dense(NamedTuple):
    """The dense softmax p and the scores of a run, `(B, steps, blocks, H, N, N)`, and indices of selected tokens."""

    p: np.ndarray
    scores: np.ndarray
    rows: int
    cols: int
    image: np.ndarray
    box: np.ndarray
    spots: np.ndarray
    first: int

    @property
    def grid(self) -> tuple[int, ...]:
        return self.p.shape[:4]


def named(size, first=0):
    """Return rows, cols, and the tokens of the image, of `BOX` and of `SPOTS`, for images of `size`.

    first: the token of the prompt's first word.
    """
    rows, cols = size[0] // 4, size[1] // 4
    image = TEXT + np.arange(rows * cols)
    box = image.reshape(rows, cols)[1:3, 1:4].ravel()
    return rows, cols, image, box, np.sort([first + 5, *image[[0, 7, 2]]])


REFERENCES: dict[str, tuple[dict, Callable]] = {}


def reference(**request) -> Callable:
    """Register the dense computation of a request: a function of `Dense` → expected values by output.

    The request has the function's name. At least one is needed for each registered kind.
    """

    def register(function: Callable) -> Callable:
        REFERENCES[function.__name__] = (request, function)
        return function

    return register


@reference(kind="map", **{"from": "all", "to": "all"})
def map_of_everything(d):
    return {"": d.p}


@reference(kind="map", **{"from": SPOTS, "to": "image"})
def map_of_spots(d):
    return {"": d.p[..., d.spots, :][..., d.image].reshape(*d.grid, len(d.spots), d.rows, d.cols)}


@reference(kind="words", words=["cat", "sign"])
def words(d):
    cat, sign = [d.first + 2], [d.first + 5]
    at = np.stack([d.p[..., d.image, :][..., w].sum(-1) for w in (cat, sign)], 4)
    of = np.stack([d.p[..., w, :][..., d.image].mean(-2) for w in (cat, sign)], 4)
    return {"": np.stack((at, of), 4).reshape(*d.grid, 2, 2, d.rows, d.cols)}


@reference(kind="words", direction="image_to_word")
def all_words(d):
    tokens = [[d.first + i] for i in range(6)]  # a#1 red cat holding a#2 sign
    maps = np.stack([d.p[..., d.image, :][..., w].sum(-1) for w in tokens], 4)
    return {"": maps.reshape(*d.grid, 1, 6, d.rows, d.cols)}


@reference(kind="regions", regions={"box": BOX, "cat": {"words": "cat"}, "spots": SPOTS})
def regions(d):
    parts = [d.box, [d.first + 2], d.spots]
    sums = [np.stack([d.p[..., a, :][..., b].sum(-1).mean(-1) for b in parts], -1) for a in parts]
    return {"": np.stack(sums, -2)}


@reference(kind="quadrants")
def quadrants(d):
    parts = [np.arange(TEXT), d.image]
    sums = [np.stack([d.p[..., a, :][..., b].sum(-1).mean(-1) for b in parts], -1) for a in parts]
    return {"": np.stack(sums, -2)}


@reference(kind="incoming", tokens=SPOTS, **{"from": BOX})
def incoming(d):
    return {"": d.p[..., d.box, :][..., d.spots].mean(-2)}


@reference(kind="entropy", tokens="all")
def entropy(d):
    return {"": -np.where(d.p > 0, d.p * np.log(np.where(d.p > 0, d.p, 1)), 0).sum(-1)}


def offsets(d, queries, *shape):
    r, c = np.divmod(np.arange(d.rows * d.cols), d.cols)
    p = d.p[..., d.image[queries], :][..., d.image]
    down, right = (r - r[:, None])[queries], (c - c[:, None])[queries]
    means = [(p * part).sum(-1) / p.sum(-1) for part in (down, right, np.hypot(down, right))]
    histogram = np.zeros((*d.grid, 2 * d.rows - 1, 2 * d.cols - 1))
    for q in range(len(queries)):
        for n in range(d.rows * d.cols):
            histogram[..., down[q, n] + d.rows - 1, right[q, n] + d.cols - 1] += p[..., q, n] / len(queries)
    return {"offset": np.stack(means, -1).reshape(*d.grid, *shape, 3), "histogram": histogram}


@reference(kind="distance")
def distance(d):
    return offsets(d, np.arange(d.rows * d.cols), d.rows, d.cols)


@reference(kind="distance", tokens=BOX)
def distance_of_a_box(d):
    return offsets(d, d.box - TEXT, 2, 3)


@reference(kind="similarity", tokens=SPOTS)
def similarity(d):
    own, first = d.p[..., d.spots, :], d.p[:1][..., d.spots, :]
    cosine = (own * first).sum(-1) / np.linalg.norm(own, axis=-1) / np.linalg.norm(first, axis=-1)
    return {"": np.stack((np.minimum(own, first).sum(-1), cosine), -1)}


@reference(kind="logits", **{"from": SPOTS, "to": BOX})
def logits(d):
    """Of the sum over rotary pairs: each pair is tested in `test_each_pair_is_its_own_share`."""
    return {"": d.scores[..., d.spots, :][..., d.box].mean((-1, -2))}


@reference(kind="peak")
def peak(d):
    """The weight only: its position may be that of an equal one, and is tested in `test_peaks`."""
    return {"": d.p[..., d.image, :][..., d.image].max(-1).reshape(*d.grid, d.rows, d.cols)}


REDUCE = {"logits": lambda values: values.sum(-1), "peak": lambda values: values[..., 2]}
"""What is compared of the results of a kind, if not all of them."""

BOUNDS = {"entropy": 3e-5, "distance": 3e-5}
"""Largest errors where a result weighs that of p: by |ln p|, by tokens. Elsewhere 1e-5."""


def test_every_kind_has_a_reference():
    elsewhere = {"activation", "concepts"}  # tests/numerics/test_activations.py, test_concepts.py
    assert {request["kind"] for request, _ in REFERENCES.values()} | elsewhere == set(PROBES)


@pytest.mark.parametrize(("size", "batch"), CASES, ids=lambda part: "+".join(map(str, part))[:24])
def test_against_dense_softmax(pipe, dense, size, batch, family):
    capture, first = {name: request for name, (request, _) in REFERENCES.items()}, families.FIRST[family]
    _, arrays = generate(pipe, [PROGRAMS[name] for name in batch], capture, size)
    found, d = (
        {name: one.values for name, one in arrays.items()},
        Dense(*map(stacked, (dense, dense), (0, 1)), *named(size, first), first),
    )
    for name, (request, function) in REFERENCES.items():
        for output, expected in function(d).items():
            values = found[f"{name}.{output}" if output else name]
            values = REDUCE.get(request["kind"], lambda values: values)(values)
            close(values, expected, 1e-5 if output == "histogram" else BOUNDS.get(request["kind"], 1e-5))
    assert np.abs(found["map_of_everything"].sum(-1) - 1).max() <= 1e-5
    assert arrays["all_words"].labels("word") == ["a#1", "red", "cat", "holding", "a#2", "sign"]


def test_peaks(pipe, dense):
    _, arrays = generate(pipe, list(PROGRAMS.values()), {"peak": {"kind": "peak"}})
    p, (rows, cols, image, _, _) = stacked(dense), named(SIZE)
    weights, found = p[..., image, :][..., image], arrays["peak"].values.reshape(*p.shape[:4], rows * cols, 3)
    index = (found[..., 0] * cols + found[..., 1]).astype(int)
    close(np.take_along_axis(weights, index[..., None], -1)[..., 0], weights.max(-1))  # equal weights may tie


def test_the_programs_differ(pipe, dense):
    """No two programs give the same attention: the test above tests every one of them."""
    generate(pipe, list(PROGRAMS.values()))
    p = stacked(dense)
    for i in range(len(p)):
        for j in range(i):
            assert np.abs(p[i] - p[j]).max() > 1e-3, (i, j)


def test_selected_and_averaged(pipe, dense, cat, blocks):
    common = {"kind": "words", "words": ["cat"], "direction": "image_to_word"}
    selected = {"steps": [1], "blocks": {"single": "all", "double": [0]}, "heads": [1]}
    capture = {
        "some": {**common, **selected},
        **{key: {**common, "average": [key]} for key in ("steps", "blocks", "heads")},
        "all": {**common, "average": ["steps", "blocks", "heads"]},
        "of_some": {**common, **selected, "average": ["blocks", "heads"]},
        "entropy": {"kind": "entropy", "average": ["heads", "tokens"]},
        "distance": {"kind": "distance", "average": ["tokens"], "tokens": BOX},
        "similarity": {"kind": "similarity", "to": 1, "average": ["tokens"]},
    }
    _, arrays = generate(pipe, [PROGRAMS["groups"], PROGRAMS["temperature"]], capture)
    p, (rows, cols, image, box, _) = stacked(dense), named((16, 24))
    cat = p[..., image, cat].reshape(2, STEPS, blocks, HEADS, 1, 1, rows, cols)
    some = cat[:, 1:][:, :, [0, *range(2, blocks)]][:, :, :, 1:]
    close(arrays["some"].values, some)
    assert arrays["some"].labels("block") == [0, *range(2, blocks)]
    assert arrays["some"].coords["stream"] == (("block",), ["double"] + ["single"] * (blocks - 2))
    for n, key in enumerate(("steps", "blocks", "heads"), 1):
        close(arrays[key].values, cat.mean(n))
        assert f"{key[:-1]}" not in arrays[key].axes
    close(arrays["all"].values, cat.mean((1, 2, 3)))
    close(arrays["of_some"].values, some.mean((2, 3)))
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)[..., image]
    close(arrays["entropy"].values, entropy.mean((3, 4)), 3e-5)
    weights = p[..., box, :][..., image]
    r = np.arange(rows * cols) // cols
    down = (weights * (r - r[box - TEXT][:, None])).sum(-1) / weights.sum(-1)
    close(arrays["distance.offset"].values[..., 0], down.mean(-1))
    overlap = np.minimum(p, p[1:])[..., image, :].sum(-1).mean(-1)
    close(arrays["similarity"].values[..., 0], overlap)


AXES = {
    "flux1": (["index"] * 2 + ["row"] * 7 + ["col"] * 7, [1, 100, 1]),
    "flux2": (["index"] * 4 + ["row"] * 4 + ["col"] * 4 + ["order"] * 4, [1, 2000**0.25, 2000**0.5]),
}
"""The axis of each rotary pair, by the names that every family shares, and the first wavelengths over 2π."""


@pytest.mark.parametrize("name", ["untouched", "temperature", "drop", "groups"])
def test_pairs_sum_to_the_logit(pipe, dense, name, cat, family):
    point = {"indices": [5]}
    capture = {
        "pair": {"kind": "logits", "from": point, "to": {"words": "cat"}},
        "region": {"kind": "logits", "from": SPOTS, "to": BOX},
        "against": {"kind": "logits", "from": point, "to": BOX, "against": "all"},
    }
    _, arrays = generate(pipe, [PROGRAMS[name]], capture)
    scores, (_, _, image, box, spots) = stacked(dense, 1), named((16, 24), families.FIRST[family])
    query = image[5]
    close(arrays["pair"].values.sum(-1), scores[..., query, cat])
    close(arrays["region"].values.sum(-1), scores[..., spots, :][..., box].mean((-1, -2)))
    close(arrays["against"].values.sum(-1), scores[..., query, box].mean(-1) - scores[..., query, :].mean(-1))
    pair = arrays["pair"]
    axes, wavelengths = AXES[family]
    assert pair.coords["axis"][1] == axes
    assert pair.coords["wavelength"][1][: len(wavelengths)] == pytest.approx([2 * math.pi * w for w in wavelengths])


def test_each_pair_is_its_own_share(pipe):
    """A shift along an axis changes only the scores of the pairs of this axis."""
    shift = {"a": {"op": "offset", "by": {"row": 1.5}, "side": "keys", "tokens": "all", "blocks": [0]}}
    capture = {
        "pair": {"kind": "logits", "from": {"indices": [5]}, "to": {"indices": [9]}, "blocks": [0], "steps": [0]}
    }
    _, arrays = generate(pipe, [None, shift], capture)
    change = np.abs(np.diff(arrays["pair"].values, axis=0)).reshape(HEADS, -1)
    axis = np.array(arrays["pair"].coords["axis"][1])
    assert change[:, axis != "row"].max() <= 1e-6
    assert change[:, axis == "row"][:, :3].min() > 1e-5  # long wavelengths change little


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_output_is_the_same_bits(pipe, program):
    capture = {
        "a": {"kind": "entropy"},
        "b": {"kind": "words", "blocks": [1]},
        "c": {"kind": "map", "from": SPOTS, "to": "all"},
    }
    plain, _ = generate(pipe, [program])
    probed, _ = generate(pipe, [program], capture)
    assert torch.equal(plain, probed)


@pytest.mark.parametrize("keys", [100, 400])  # flash, and the dense path of bf16
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_log_sum_exp_of_every_kernel(dtype, grad, masked, keys):
    """Kernels on the CPU: a tap leaves the output equal bit for bit, and the log-sum-exp agrees with fp64."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70 if i == 0 else keys, 3, 20, generator=g).transpose(1, 2) for i in range(3))
    v = v.to(dtype).requires_grad_(grad)
    q, k = (2 * x.double() if dtype == torch.float64 else 2 * x for x in (q, k))
    masks = (
        [None]
        if not masked
        else [torch.randn(*shape, generator=g).to(dtype) for shape in ((70, keys), (3, 70, keys), (2, 1, 70, keys))]
    )
    bound = 1e-4 if v.dtype.itemsize == 2 else 1e-5
    for mask in masks:
        calls = []
        with torch.set_grad_enabled(grad):
            plain, probed = attend(q, k, v, mask), attend(q, k, v, mask, calls.append)
        assert torch.equal(plain, probed)
        (call,) = calls
        scores = call.q.double() @ call.k.double().mT / math.sqrt(20) + (0 if mask is None else mask.double())
        assert (call.lse - scores.logsumexp(-1)).abs().max() <= bound
        assert call.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not call.lse.requires_grad


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-4), (torch.float64, 1e-6)], ids=["bf16", "fp64"])
@pytest.mark.parametrize("size", [(16, 24), (64, 64)], ids=["flash", "long"])
def test_other_dtypes(family, blocks, dense, dtype, bound, size):
    pipe = families.load(family, dtype=dtype)
    sharpen(pipe.transformer)
    capture = {"all": {"kind": "map", "from": {"box": [0, 0, 2, 2]}, "to": "all"}}
    plain, _ = generate(pipe, [None], None, size)
    dense.clear()
    probed, arrays = generate(pipe, [None], capture, size)
    assert torch.equal(plain, probed)
    rows, cols, image, _, _ = named(size)
    spot = image.reshape(rows, cols)[:2, :2].ravel()
    found = arrays["all"].values.reshape(1, STEPS, blocks, HEADS, 4, -1)
    close(found, stacked(dense)[..., spot, :], bound)


def test_the_negative_prompt_is_not_recorded(pipe, dense, cat, blocks):
    capture = {"words": {"kind": "words", "words": "cat", "direction": "image_to_word"}}
    _, arrays = generate(pipe, [None], capture, true_cfg=3, negative_prompts="a dog")
    half = len(dense) // 2
    assert half == STEPS * blocks
    rows, cols, image, _, _ = named((16, 24))
    each = torch.stack([p for p, _ in dense]).reshape(STEPS, 2, blocks, 1, HEADS, *dense[0][0].shape[-2:])
    # the order of the two forward passes of a step does not matter
    to_cat = [each[:, n, :, 0].numpy()[..., image, cat] for n in (0, 1)]
    both = [maps.reshape(1, STEPS, blocks, HEADS, 1, 1, rows, cols) for maps in to_cat]
    errors = sorted(np.abs(arrays["words"].values - one).max() for one in both)
    assert errors[0] <= 1e-5 < 1e-3 < errors[1]
