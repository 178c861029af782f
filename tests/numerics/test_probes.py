"""What a probe sees against every score written out: every kind of request and program, every block and step."""

import math

import numpy as np
import pytest
import torch

import fluxlab
from fluxlab.model import layers
from fluxlab.model.attention import attend
from fluxlab.model.groups import KeyGroups
from fluxlab.model.rope import apply_rotary
from fluxlab.probes import Probe
from tests import tiny

TEXT, STEPS, BLOCKS, HEADS = 24, 2, 4, 2
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


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    pipe = fluxlab.load_pipeline(tiny.save(tmp_path_factory.mktemp("folder"), guidance=False))
    sharpen(pipe.transformer)
    return pipe


def sharpen(flux) -> None:
    """Random weights look everywhere alike: larger q and k, and what they are made of."""
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
    """Every block's softmax in fp64, `(B, H, N, N)`, in the order of the calls, and the scores before masks."""
    seen = []
    real = layers.joint_attention

    def attention(q, k, v, keys, mask, tap):
        groups = keys if isinstance(keys, KeyGroups) else None
        scores = torch.empty(*q.shape[:3], k.shape[2], dtype=torch.float64)
        unrounded = v.dtype == torch.bfloat16 and k.shape[2] >= 256 and mask is None  # what `dense_attention` reads
        wide = q.dtype if unrounded else v.dtype
        for n in range(q.shape[2]):
            table = None if groups is None else next(t for i, t in zip(*groups, strict=True) if n in i)
            turned = k if table is None else apply_rotary(k, table)
            row = q[:, :, n, None].to(wide).double() @ turned.to(wide).double().mT
            scores[:, :, n] = row[:, :, 0] / math.sqrt(q.shape[-1])
        biased = scores if mask is None else scores + mask.double()
        seen.append((biased.softmax(-1), scores))
        return real(q, k, v, keys, mask, tap)

    monkeypatch.setattr(layers, "joint_attention", attention)
    return seen


def stacked(dense, of=0) -> np.ndarray:
    """`(B, steps, blocks, H, N, N)`."""
    every = torch.stack([pair[of] for pair in dense]).unflatten(0, (STEPS, BLOCKS))
    return every.permute(2, 0, 1, 3, 4, 5).numpy()


def close(found, expected, bound=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound


def named(size, word_cat=2, word_sign=5):
    """Places of what the requests below name, for images of `size`."""
    rows, cols = size[0] // 4, size[1] // 4
    image = TEXT + np.arange(rows * cols)
    box = image.reshape(rows, cols)[1:3, 1:4].ravel()
    return rows, cols, image, box, np.sort([word_sign, *image[[0, 7, 2]]])


SIZE, ALL = (16, 24), list(PROGRAMS)
CASES = [(SIZE, [name]) for name in PROGRAMS] + [(size, ALL) for size in (SIZE, (24, 24), (20, 16))]


@pytest.mark.parametrize(("size", "batch"), CASES, ids=lambda part: "+".join(map(str, part))[:24])
def test_against_dense_softmax(pipe, dense, size, batch):
    capture = {
        "all": {"kind": "map", "from": "all", "to": "all"},
        "spot": {"kind": "map", "from": SPOTS, "to": "image"},
        "words": {"kind": "words", "words": ["cat", "sign"]},
        "every": {"kind": "words", "direction": "image_to_word"},
        "regions": {"kind": "regions", "regions": {"box": BOX, "cat": {"words": "cat"}, "spots": SPOTS}},
        "quadrants": {"kind": "quadrants"},
        "entropy": {"kind": "entropy", "tokens": "all"},
        "distance": {"kind": "distance"},
        "part": {"kind": "distance", "tokens": BOX},
        "peak": {"kind": "peak"},
        "similarity": {"kind": "similarity", "tokens": SPOTS},
    }
    _, arrays = generate(pipe, [PROGRAMS[name] for name in batch], capture, size)
    p, found = stacked(dense), {name: one.values for name, one in arrays.items()}
    rows, cols, image, box, spots = named(size)
    grid = p.shape[:4]

    close(found["all"], p, 1e-5)
    assert np.abs(found["all"].sum(-1) - 1).max() <= 1e-5
    close(found["spot"], p[..., spots, :][..., image].reshape(*grid, len(spots), rows, cols))

    word = [[2], [5]]
    at = np.stack([p[..., image, :][..., w].sum(-1) for w in word], 4)
    of = np.stack([p[..., w, :][..., image].mean(-2) for w in word], 4)
    close(found["words"], np.stack((at, of), 4).reshape(*grid, 2, 2, rows, cols))
    assert arrays["every"].labels("word") == ["a#1", "red", "cat", "holding", "a#2", "sign"]
    close(found["every"][..., 0, [2, 5], :, :], at.reshape(*grid, 2, rows, cols))

    parts = [box, [2], spots]
    close(
        found["regions"],
        np.stack([np.stack([p[..., a, :][..., b].sum(-1).mean(-1) for b in parts], -1) for a in parts], -2),
    )
    parts = [np.arange(TEXT), image]
    close(
        found["quadrants"],
        np.stack([np.stack([p[..., a, :][..., b].sum(-1).mean(-1) for b in parts], -1) for a in parts], -2),
    )

    close(found["entropy"], -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1), 3e-5)

    r, c = np.divmod(np.arange(rows * cols), cols)
    look = p[..., image, :][..., image]
    down, right = r - r[:, None], c - c[:, None]
    for name, mine in (("distance", np.arange(rows * cols)), ("part", box - TEXT)):
        ours = look[..., mine, :]
        mass = ours.sum(-1)
        offset = [(ours * d[mine]).sum(-1) / mass for d in (down, right, np.hypot(down, right))]
        offset = np.stack(offset, -1)
        shape = (rows, cols) if name == "distance" else (2, 3)
        close(found[f"{name}.offset"], offset.reshape(*grid, *shape, 3), 3e-5)
        histogram = np.zeros((*grid, 2 * rows - 1, 2 * cols - 1))
        for q in range(len(mine)):
            for n in range(rows * cols):
                histogram[..., down[mine[q], n] + rows - 1, right[mine[q], n] + cols - 1] += ours[..., q, n] / len(mine)
        close(found[f"{name}.histogram"], histogram)

    peak = found["peak"].reshape(*grid, rows * cols, 3)
    close(peak[..., 2], look.max(-1))
    where = (peak[..., 0] * cols + peak[..., 1]).astype(int)
    close(np.take_along_axis(look, where[..., None], -1)[..., 0], look.max(-1))  # equal ones may tie

    mine, first = p[..., spots, :], p[:1][..., spots, :]
    cosine = (mine * first).sum(-1) / np.linalg.norm(mine, axis=-1) / np.linalg.norm(first, axis=-1)
    close(found["similarity"], np.stack((np.minimum(mine, first).sum(-1), cosine), -1))


def test_the_programs_differ(pipe, dense):
    """What makes the test above one of programs: no two of them look alike."""
    generate(pipe, list(PROGRAMS.values()))
    p = stacked(dense)
    for i in range(len(p)):
        for j in range(i):
            assert np.abs(p[i] - p[j]).max() > 1e-3, (i, j)


def test_selected_and_averaged(pipe, dense):
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
    cat = p[..., image, 2].reshape(2, STEPS, BLOCKS, HEADS, 1, 1, rows, cols)
    some = cat[:, 1:][:, :, [0, 2, 3]][:, :, :, 1:]
    close(arrays["some"].values, some)
    assert arrays["some"].labels("block") == [0, 2, 3]
    assert arrays["some"].coords["stream"] == (("block",), ["double", "single", "single"])
    for n, key in enumerate(("steps", "blocks", "heads"), 1):
        close(arrays[key].values, cat.mean(n))
        assert f"{key[:-1]}" not in arrays[key].axes
    close(arrays["all"].values, cat.mean((1, 2, 3)))
    close(arrays["of_some"].values, some.mean((2, 3)))
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)[..., image]
    close(arrays["entropy"].values, entropy.mean((3, 4)), 3e-5)
    look = p[..., box, :][..., image]
    r = np.arange(rows * cols) // cols
    down = (look * (r - r[box - TEXT][:, None])).sum(-1) / look.sum(-1)
    close(arrays["distance.offset"].values[..., 0], down.mean(-1))
    overlap = np.minimum(p, p[1:])[..., image, :].sum(-1).mean(-1)
    close(arrays["similarity"].values[..., 0], overlap)


@pytest.mark.parametrize("name", ["untouched", "temperature", "drop", "groups"])
def test_pairs_sum_to_the_logit(pipe, dense, name):
    point = {"indices": [5]}
    capture = {
        "pair": {"kind": "logits", "from": point, "to": {"words": "cat"}},
        "region": {"kind": "logits", "from": SPOTS, "to": BOX},
        "against": {"kind": "logits", "from": point, "to": BOX, "against": "all"},
    }
    _, arrays = generate(pipe, [PROGRAMS[name]], capture)
    scores, (_, _, image, box, spots) = stacked(dense, 1), named((16, 24))
    here = image[5]
    close(arrays["pair"].values.sum(-1), scores[..., here, 2])
    close(arrays["region"].values.sum(-1), scores[..., spots, :][..., box].mean((-1, -2)))
    close(arrays["against"].values.sum(-1), scores[..., here, box].mean(-1) - scores[..., here, :].mean(-1))
    pair = arrays["pair"]
    assert pair.coords["axis"][1] == ["index"] * 2 + ["row"] * 7 + ["col"] * 7
    assert pair.coords["wavelength"][1][:3] == pytest.approx([2 * math.pi, 2 * math.pi * 100, 2 * math.pi])


def test_each_pair_is_its_own_share(pipe):
    """A shift along an axis reaches only the scores of that axis' pairs."""
    shift = {"a": {"op": "offset", "by": {"row": 1.5}, "side": "keys", "tokens": "all", "blocks": [0]}}
    capture = {
        "pair": {"kind": "logits", "from": {"indices": [5]}, "to": {"indices": [9]}, "blocks": [0], "steps": [0]}
    }
    _, arrays = generate(pipe, [None, shift], capture)
    change = np.abs(np.diff(arrays["pair"].values, axis=0)).reshape(HEADS, -1)
    axis = np.array(arrays["pair"].coords["axis"][1])
    assert change[:, axis != "row"].max() <= 1e-6
    assert change[:, axis == "row"][:, :4].min() > 1e-5  # the long wavelengths hardly turn


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_output_is_the_same_bits(pipe, program):
    capture = {
        "a": {"kind": "entropy"},
        "b": {"kind": "words", "blocks": [1]},
        "c": {"kind": "map", "from": SPOTS, "to": "all"},
    }
    plain, _ = generate(pipe, [program])
    watched, _ = generate(pipe, [program], capture)
    assert torch.equal(plain, watched)


@pytest.mark.parametrize("keys", [100, 400])  # flash, and the dense path of bf16
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_log_sum_exp_of_every_kernel(dtype, grad, masked, keys):
    """The kernels of the CPU: the output to the bit, and p from their log-sum-exp."""
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
        seen = []
        with torch.set_grad_enabled(grad):
            plain, watched = attend(q, k, v, mask), attend(q, k, v, mask, seen.append)
        assert torch.equal(plain, watched)
        (one,) = seen
        scores = one.q.double() @ one.k.double().mT / math.sqrt(20) + (0 if mask is None else mask.double())
        assert (one.lse - scores.logsumexp(-1)).abs().max() <= bound
        assert one.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not one.lse.requires_grad


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-4), (torch.float64, 1e-6)], ids=["bf16", "fp64"])
@pytest.mark.parametrize("size", [(16, 24), (64, 64)], ids=["flash", "long"])
def test_other_dtypes(tmp_path, dense, dtype, bound, size):
    pipe = fluxlab.load_pipeline(tiny.save(tmp_path, guidance=False), dtype=dtype)
    sharpen(pipe.transformer)
    capture = {"all": {"kind": "map", "from": {"box": [0, 0, 2, 2]}, "to": "all"}}
    plain, _ = generate(pipe, [None], None, size)
    dense.clear()
    watched, arrays = generate(pipe, [None], capture, size)
    assert torch.equal(plain, watched)
    rows, cols, image, _, _ = named(size)
    spot = image.reshape(rows, cols)[:2, :2].ravel()
    found = arrays["all"].values.reshape(1, STEPS, BLOCKS, HEADS, 4, -1)
    close(found, stacked(dense)[..., spot, :], bound)


def test_a_negative_prompt_is_not_looked_at(pipe, dense):
    capture = {"words": {"kind": "words", "words": "cat", "direction": "image_to_word"}}
    _, arrays = generate(pipe, [None], capture, true_cfg=3, negative_prompts="a dog")
    half = len(dense) // 2
    assert half == STEPS * BLOCKS
    rows, cols, image, _, _ = named((16, 24))
    each = torch.stack([p for p, _ in dense]).reshape(STEPS, 2, BLOCKS, 1, HEADS, *dense[0][0].shape[-2:])
    # which of the two forwards of a step comes first is the sampler's business
    both = [each[:, n, :, 0].numpy()[..., image, 2].reshape(1, STEPS, BLOCKS, HEADS, 1, 1, rows, cols) for n in (0, 1)]
    errors = sorted(np.abs(arrays["words"].values - one).max() for one in both)
    assert errors[0] <= 1e-5 < 1e-3 < errors[1]
