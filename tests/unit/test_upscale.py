"""Super-resolution: what is exact about known tokens, the positions of each method, and which arguments are refused."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fluxlab.editing.upscale import arranged, enlarged, known_tokens
from fluxlab.errors import UserError
from fluxlab.positions import compile_programs
from fluxlab.positions.at_step import sequence
from tests import families

PROMPT = "a cat"
SETTINGS = {"steps": 2, "max_sequence_length": 16}
ROWS, COLS = 2, 3  # of the small image, in tokens of 4 px


@pytest.fixture(scope="module", params=families.NAMES)
def pipe(request):
    return families.load(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def image():
    """A contiguous tensor: the convolutions of the autoencoder round differently for other strides."""
    return torch.rand(3, 4 * ROWS, 4 * COLS, generator=torch.Generator().manual_seed(0))


def large(n, factor):
    """Return the number, in the large grid, of token n of the small one."""
    return n // COLS * factor * COLS * factor + n % COLS * factor


def path_of(pipe, image, program, factor, **options):
    """Return the latents of the small image before the first step and after each, at the large grid's noise levels."""
    rows, cols = factor * ROWS, factor * COLS
    sigmas = pipe.schedule.times(SETTINGS["steps"], rows * cols)
    path = [pipe.encode(image)[0]]
    pipe.invert(
        image,
        PROMPT,
        programs=program,
        sigmas=sigmas,
        on_step=lambda i, t, x: path.append(x.clone()),
        **SETTINGS,
        **options,
    )
    return path[::-1]


GUIDED = {"true_cfg": 3.0, "negative_prompts": "a dog"}


@pytest.mark.parametrize(
    ("method", "factor", "more"),
    [("spacing", 2, {}), ("half_steps", 3, {}), ("aligned", 2, {}), ("spacing", 2, GUIDED)],
)
def test_known_tokens_are_on_the_inverted_path_at_every_step(pipe, image, method, factor, more):
    spaced = {"a": {"op": "scale", "factor": factor, "axes": ["row", "col"]}} if method == "spacing" else None
    path = path_of(pipe, image, spaced, factor, **more)
    known = [large(n, factor) for n in range(ROWS * COLS)]
    new = [n for n in range(ROWS * COLS * factor**2) if n not in known]
    seen = []
    final = pipe.upscale(
        image,
        PROMPT,
        factor=factor,
        method=method,
        until=0,
        output="latent",
        on_step=lambda i, t, x: seen.append((i, t, x.clone())),
        **SETTINGS,
        **more,
    )
    assert [i for i, _, _ in seen] == [0, 1]
    assert [t for _, t, _ in seen] == pipe.schedule.times(2, len(known) * factor**2)[1:]
    for i, _, x in seen:
        assert torch.equal(x[:, known], path[i + 1])
    assert torch.equal(final[:, known], pipe.encode(image)[0])
    assert final[:, new].isfinite().all()
    assert not torch.equal(seen[0][2][:, new], seen[1][2][:, new])


@pytest.mark.parametrize("path", ["noised", "inverted"])
def test_known_tokens_of_the_enlarged_image(pipe, image, path):
    """At each step they are those of the path of the enlarged image, at the positions of the method."""
    sigmas, size = pipe.schedule.times(2, 4 * ROWS * COLS), (2 * ROWS, 2 * COLS)
    big, known, seen = enlarged(image[None], 2), [large(n, 2) for n in range(ROWS * COLS)], []
    encoded = pipe.encode(big)[0]
    if path == "noised":
        noise = pipe.family.noise([0], 4, *size, torch.float32)
        expected = [(1 - t) * encoded + t * noise for t in sigmas[1:-1]] + [encoded]
    else:
        expected, half = [encoded], {"half": {"op": "scale", "factor": 0.5, "axes": ["row", "col"]}}
        pipe.invert(big, PROMPT, programs=half, on_step=lambda i, t, x: expected.append(x.clone()), **SETTINGS)
        expected = expected[-2::-1]
    pipe.upscale(image, PROMPT, known="enlarged", path=path, on_step=lambda i, t, x: seen.append(x.clone()), **SETTINGS)
    for x, on_path in zip(seen, expected, strict=True):
        assert torch.equal(x[:, known], on_path[:, known])


def test_known_tokens_are_free_below_until(pipe, image):
    sigmas = pipe.schedule.times(2, 4 * ROWS * COLS)
    path, known, seen = path_of(pipe, image, None, 2), [large(n, 2) for n in range(ROWS * COLS)], []
    until = sigmas[1]
    pipe.upscale(
        image, PROMPT, method="half_steps", until=until, on_step=lambda i, t, x: seen.append(x.clone()), **SETTINGS
    )
    assert [torch.equal(x[:, known], path[i + 1]) for i, x in enumerate(seen)] == [True, False]


def test_with_one_way_attention_known_tokens_would_return_by_themselves(pipe, image):
    """At half steps, one-way attention leaves them all that they saw in the inversion, and nothing else."""
    path, known = path_of(pipe, image, None, 2, iterations=40), [large(n, 2) for n in range(ROWS * COLS)]
    inside = {"indices": known}
    outside = {"indices": [n for n in range(4 * ROWS * COLS) if n not in known]}
    program = {
        "half": {"op": "scale", "factor": 0.5, "axes": ["row", "col"]},
        "mask": {"op": "mask", "from": ["text", inside], "to": outside},
    }
    noise = torch.randn(1, 4 * ROWS * COLS, 16, generator=torch.Generator().manual_seed(0))
    noise[:, known] = path[0]
    for edits, close in ((program, True), ({"half": program["half"]}, False)):
        seen = []
        pipe.generate(
            PROMPT,
            programs=edits,
            height=8 * ROWS,
            width=8 * COLS,
            latents=noise,
            output="latent",
            on_step=lambda i, t, x, seen=seen: seen.append(x.clone()),
            **SETTINGS,
        )
        first = (seen[0][:, known] - path[1]).abs().max()
        assert (first < 1e-4) == close


def test_without_new_tokens_it_is_the_encoded_image(pipe, image):
    for method in ("spacing", "half_steps", "aligned"):
        got = pipe.upscale(image, PROMPT, factor=1, method=method, output="latent", **SETTINGS)
        assert torch.equal(got, pipe.encode(image)[0])


def test_resized_is_the_enlarged_image_with_noise_sampled_from_until_on(pipe, image):
    """Against Euler steps written out, with the velocity of single steps of `generate`."""
    sigmas = pipe.schedule.times(2, 4 * ROWS * COLS)
    encoded = pipe.encode(enlarged(image[None], 2))[0]
    noise = pipe.family.noise([5], 4, 2 * ROWS, 2 * COLS, torch.float32)
    start, seen = (1 - sigmas[1]) * encoded + sigmas[1] * noise, []
    got = pipe.upscale(
        image,
        PROMPT,
        5,
        method="resized",
        until=sigmas[1],
        output="latent",
        on_step=lambda i, t, x: seen.append((i, x.clone())),
        **SETTINGS,
    )
    assert [i for i, _ in seen] == [1]

    def put(i, t, x):
        if i == 0:
            x.copy_(start)

    expected = pipe.generate(
        PROMPT, height=8 * ROWS, width=8 * COLS, latents=noise, output="latent", on_step=put, **SETTINGS
    )
    assert torch.equal(got, expected)
    assert torch.equal(pipe.upscale(image, PROMPT, method="resized", until=0, output="latent", **SETTINGS), encoded)


def test_enlarged_is_what_pillow_makes_of_the_image():
    pixels = np.random.default_rng(0).integers(80, 176, (8, 12, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC)) / 255
    got = enlarged(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, 2)[0].permute(1, 2, 0).numpy()
    assert (
        np.abs(got - expected).max() < 1.5 / 255
    )  # Pillow rounds, and cuts off what leaves 0 … 255, once for each axis


@pytest.mark.parametrize("method", ["spacing", "half_steps", "aligned"])
@pytest.mark.parametrize("axes_dim", [(4, 8, 8), (4, 4, 4, 4)])
def test_positions_of_queries_and_keys(method, axes_dim):
    """The row and column at which every query sees every key, against a table for the group of the query."""
    factor, text = 2, 3
    grid = (factor * ROWS, factor * COLS)
    context = sequence(grid=grid, text=text, axes_dim=axes_dim, double=1, single=1, heads=1, steps=2)
    compiled = compile_programs([arranged(known_tokens(grid, factor), factor, method)], context)
    places = [(0.0, 0.0)] * text + [(float(r), float(c)) for r in range(grid[0]) for c in range(grid[1])]
    for query, (row, col) in enumerate(places):
        known = query >= text and row % factor == 0 and col % factor == 0
        divided = method == "half_steps" or (method == "aligned" and known)
        by = factor if divided else 1
        keys = compiled.ids(1.0, 0, "keys", 0, query=query)[:, 1:3]
        queries = compiled.ids(1.0, 0, "queries", 0)[query, 1:3]
        assert torch.equal(keys, torch.tensor(places) / by)
        assert torch.equal(queries, torch.tensor((row, col)) / by)


def test_scores_of_aligned_positions_are_those_of_a_table_for_each_pair():
    """Against attention in numpy that turns every query and key by its own position, pair by pair."""
    from fluxlab.model.groups import attend_in_groups
    from fluxlab.model.rope import apply_rotary

    context = sequence(grid=(4, 4), text=2, axes_dim=(4, 8, 8), double=1, single=1, heads=1, steps=2)
    known = known_tokens((4, 4), 2)
    groups = compile_programs([arranged(known, 2, "aligned")], context).at(1.0, None, None).rotary[0]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 18, 20, generator=generator) for _ in range(3))
    queries, keys = groups
    got = attend_in_groups(apply_rotary(q, queries), k, v, keys)[0, 0]

    def turned(x, place):
        out, pair = x.astype(np.float64).copy(), 0
        for axis, width in enumerate((4, 8, 8)):
            for i in range(width // 2):
                angle = place[axis] * 10000 ** (-2 * i / width)
                a, b = x[2 * pair], x[2 * pair + 1]
                out[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
                out[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
                pair += 1
        return out

    places = [(0, 0, 0)] * 2 + [(0, r, c) for r, c in itertools.product(range(4), range(4))]
    for n in range(18):
        by = 2 if n >= 2 and known[n - 2] else 1
        here = turned(q[0, 0, n].numpy(), np.divide(places[n], by))
        scores = np.array([here @ turned(k[0, 0, m].numpy(), np.divide(places[m], by)) for m in range(18)]) / np.sqrt(
            20
        )
        weights = np.exp(scores - scores.max())
        expected = weights / weights.sum() @ v[0, 0].double().numpy()
        assert np.abs(got[n].numpy() - expected).max() < 1e-5


def test_known_tokens_of_a_large_grid():
    assert known_tokens((4, 6), 2).nonzero()[:, 0].tolist() == [0, 2, 4, 12, 14, 16]
    assert known_tokens((2, 2), 1).all()


def test_a_batch_gives_the_images_that_single_calls_give(pipe, image):
    others = [image, image.flip(1)]
    program = {"y": {"op": "yarn", "factor": 2}}
    both = pipe.upscale(
        others, ["a cat", "a dog"], [3, 4], method="aligned", programs=[None, program], output="latent", **SETTINGS
    )
    for n, (text, seed, edits) in enumerate([("a cat", 3, None), ("a dog", 4, program)]):
        one = pipe.upscale(others[n], text, seed, method="aligned", programs=edits, output="latent", **SETTINGS)
        assert (both[n] - one[0]).abs().max() < 1e-3


def test_spacing_with_interpolated_positions_is_half_steps(pipe, image):
    """Frequencies divided by 2 and positions 2 apart are usual frequencies and positions."""
    interpolated = {"p": {"op": "pi", "factor": 2}}
    one = pipe.upscale(image, PROMPT, method="spacing", programs=interpolated, output="latent", **SETTINGS)
    other = pipe.upscale(image, PROMPT, method="half_steps", output="latent", **SETTINGS)
    assert (one - other).abs().max() < 1e-3
    assert (one - pipe.upscale(image, PROMPT, method="spacing", output="latent", **SETTINGS)).abs().max() > 1e-2


def test_source_programs_act_in_the_inversion_alone(pipe, image):
    """With them, known tokens are elsewhere before the first step and at the image after the last."""
    known, ends = [large(n, 2) for n in range(ROWS * COLS)], []
    for given in ({}, {"source_programs": {"n": {"op": "ntk", "factor": 4}}}):
        seen = []
        pipe.upscale(
            image, PROMPT, on_step=lambda i, t, x, seen=seen: seen.append(x[:, known].clone()), **given, **SETTINGS
        )
        ends.append((seen[0], seen[-1]))
    assert not torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "third_steps"}, "method='third_steps': expected spacing, half_steps, aligned or resized"),
        ({"factor": 0}, "factor=0: expected a whole number from 1"),
        ({"factor": 1.5}, "factor=1.5: expected a whole number from 1"),
        ({"until": 1.0}, "until=1.0: expected a noise level, from 0 to below 1"),
        ({"until": "0.5"}, "until='0.5': expected a noise level"),
        ({"path": "sampled"}, "path='sampled': expected inverted or noised"),
        ({"known": "large"}, "known='large': expected small or enlarged"),
        ({"known": "enlarged", "method": "spacing"}, "known='enlarged': spacing inverts the small image"),
        ({"attention": "none"}, "attention='none': expected one_way or both_ways"),
        ({"image": np.zeros((10, 8, 3), np.uint8)}, "height=10: must be a multiple of 4"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts, 3 seeds"),
        ({"iterations": 0}, "iterations=0: expected at least 1"),
        ({"programs": {"a": {"op": "skale"}}}, "skale"),
    ],
)
def test_wrong_arguments(pipe, image, change, message):
    arguments = {"image": image, "prompt": PROMPT, "seed": 0, **SETTINGS, **change}
    with pytest.raises(UserError, match=message):
        pipe.upscale(**arguments)


def test_the_method_follows_from_the_size(pipe, image, monkeypatch):
    """Up to the model's own size it is spacing, beyond it half steps, and half steps for tokens of the enlargement."""
    options = {"output": "latent", **SETTINGS}
    by_name = {name: pipe.upscale(image, PROMPT, method=name, **options) for name in ("spacing", "half_steps")}
    assert torch.equal(pipe.upscale(image, PROMPT, **options), by_name["spacing"])
    enlarged_tokens = [pipe.upscale(image, PROMPT, method=m, known="enlarged", **options) for m in (None, "half_steps")]
    assert torch.equal(*enlarged_tokens)
    monkeypatch.setattr(pipe, "size", (8 * ROWS, 8 * COLS - 4))
    assert torch.equal(pipe.upscale(image, PROMPT, **options), by_name["half_steps"])
