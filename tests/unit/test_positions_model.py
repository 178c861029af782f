"""Programs in a model: in batches, blocks and steps, against dense attention; and gradients through them."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.families import family_of
from fluxlab.model import Flux, Flux2, Flux2Params, FluxParams
from fluxlab.model.groups import KeyGroups, attend_in_groups
from fluxlab.model.rope import rotary_table
from fluxlab.positions import Context, Layout, Program, Prompt, compile_programs, noise_floor
from fluxlab.sampling import euler
from tests import families

TEXT, GRID = 5, (4, 3)
PARAMS = FluxParams(8, 8, 12, 10, 32, 2.0, 2, 2, 2, (4, 6, 6), 10000, True, False)
PARAMS2 = Flux2Params(8, 8, 10, 32, 2.0, 2, 2, 2, (4, 4, 4, 4), 2000, False)
WORDS = Prompt("a cat says hi", ((0, 1), (2, 5), (6, 10), (11, 13), (0, 0)))


def sharp(flux: Flux | Flux2) -> Flux | Flux2:
    """Make attention sharper and stronger, since random weights hardly depend on positions."""
    with torch.no_grad():
        for name, weight in flux.named_parameters():
            weight.normal_(0, 0.3 if weight.ndim > 1 else 0.1)
            if name.endswith("norm.scale"):
                weight.add_(2)
    return flux.eval()


def of_size(params: FluxParams | Flux2Params) -> Flux | Flux2:
    """Return a model of this size with random weights."""
    torch.manual_seed(0)
    return sharp((Flux if isinstance(params, FluxParams) else Flux2)(params)).requires_grad_(False)


@pytest.fixture(scope="module", params=[PARAMS, PARAMS2], ids=families.NAMES)
def flux(request) -> Flux | Flux2:
    return of_size(request.param)


def inputs(batch: int = 1, dtype=torch.float32, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    n = GRID[0] * GRID[1]
    shapes = {"img": (n, 8), "txt": (TEXT, 10), "y": (12,)}
    drawn = {
        name: torch.randn(1, *shape, generator=g, dtype=dtype).expand(batch, *shape) for name, shape in shapes.items()
    }
    return {**drawn, "timesteps": torch.full((batch,), 0.6, dtype=dtype)}


def context(dtype=torch.float32, p=PARAMS, **more) -> Context:
    family = family_of(p)
    ids = torch.cat(family.ids(TEXT, [GRID]))[None].to(dtype)
    sizes = (p.axes_dim, p.theta, p.depth, p.depth_single_blocks, p.num_heads)
    return Context(ids, Layout(TEXT, GRID), *sizes, **{"sigmas": (1.0, 0.6, 0.2, 0.0), "prompts": [WORDS], **more})


def velocity(flux, programs, t=0.6, dtype=torch.float32, **more):
    programs = [Program.from_config(p) for p in programs]
    rotary, mask = compile_programs(programs, context(dtype, flux.params, **more)).at(t)
    return call(flux, inputs(len(programs), dtype), rotary=rotary, mask=mask)


def call(flux, x: dict, ids=None, **more):
    """Return the velocity of `inputs`. FLUX.2 has no pooled text."""
    ids = (None, None) if ids is None else (ids[:, TEXT:], ids[:, :TEXT])
    pooled = (x["y"],) if isinstance(flux, Flux) else ()
    return flux(x["img"], ids[0], x["txt"], ids[1], x["timesteps"], *pooled, **more)


PROGRAMS = {
    "identity": {},
    "double": {"a": {"op": "scale", "factor": 2}},
    "keys": {"a": {"op": "zero", "side": "keys", "blocks": [1, 3]}},
    "head": {"a": {"op": "rotate", "degrees": 40, "heads": [1]}, "b": {"op": "offset", "by": 0.3, "blocks": "single"}},
    "word": {"a": {"op": "relocate", "tokens": {"words": "cat"}, "to": [2, 1]}},
    "fading": {"a": {"op": "shuffle", "strength": {"from": 1, "to": 0}}},
    "temperature": {"a": {"op": "temperature", "factor": 2, "tokens": "all", "blocks": "double"}},
    "drop": {"a": {"op": "drop", "axes": "row", "side": "queries"}},
    "mask": {"a": {"op": "mask", "from": "image", "to": {"words": "cat"}, "blocks": [0, 2]}},
    "mask_head": {"a": {"op": "mask", "from": "text", "to": "image", "heads": 0, "strength": 0.9}},
    "group": {
        "a": {"op": "scale", "factor": 0.5, "side": "keys", "seen_by": {"box": [0, 0, 2, 3]}, "blocks": "single"}
    },
    "groups": {
        "a": {"op": "zero", "side": "keys", "seen_by": "text"},
        "b": {"op": "offset", "by": [0, 1, 1], "side": "keys", "seen_by": {"box": [0, 0, 4, 1]}, "heads": 1},
        "c": {"op": "mask", "from": "image", "to": {"indices": [0]}},
    },
}


def test_identity_is_bit_equal(flux):
    plain = call(flux, inputs(), context(p=flux.params).ids)
    nothing = {"a": {"op": "zero", "strength": 0}, "b": {"op": "scale", "factor": 1}, "c": {"op": "zero", "steps": [0]}}
    for program in ({}, nothing):
        assert torch.equal(velocity(flux, [program]), plain)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "recording"])
def test_a_batch_equals_single_samples(flux, grad):
    with torch.set_grad_enabled(grad):  # uses other kernels
        together = velocity(flux, PROGRAMS.values())
        for sample, program in zip(together, PROGRAMS.values(), strict=True):
            alone = velocity(flux, [program])[0]
            assert (sample - alone).abs().max() <= 1e-5 * alone.std()


def test_each_program_changes_the_output(flux):
    outputs = [velocity(flux, [program]) for program in PROGRAMS.values()]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-3 * a.std()


def block_outputs(flux, program, t=0.6) -> list:
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, tuple) else (out,)))
        for block in [*flux.double_blocks, *flux.single_blocks]
    ]
    try:
        velocity(flux, [program], t)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


EDITS = {
    "ids": {"op": "scale", "factor": 2},
    "keys": {"op": "zero", "side": "keys"},
    "mask": {"op": "mask", "from": "image", "to": "text"},
    "temperature": {"op": "temperature", "factor": 2},
    "group": {"op": "zero", "side": "keys", "seen_by": "text"},
}


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_a_block_changes_it_and_later_blocks(flux, k, edit):
    plain, changed = block_outputs(flux, {}), block_outputs(flux, {"a": {**edit, "blocks": [k]}})
    for block, (a, b) in enumerate(zip(plain, changed, strict=True)):
        assert all(map(torch.equal, a, b)) == (block < k), block


@pytest.mark.parametrize("s", range(3))
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_of_a_step_changes_it_and_later_steps(flux, s, edit):
    def path(program):
        ctx = context(p=flux.params)
        compiled, x, states = compile_programs([Program.from_config(program)], ctx), inputs(), []

        def field(img, t):
            rotary, mask = compiled.at(t)
            return call(flux, {**x, "img": img, "timesteps": torch.full((1,), t)}, rotary=rotary, mask=mask)

        euler(field, x["img"], ctx.sigmas, lambda i, t, img: states.append(img))
        return states

    plain, changed = path({}), path({"a": {**edit, "steps": [s]}})
    assert [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)] == [step < s for step in range(3)]


DOUBLE = [of_size(params).double() for params in (PARAMS, PARAMS2)]


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(DOUBLE),
    st.permutations(range(GRID[0] * GRID[1])),
    st.sampled_from(["double", "head", "drop", "fading"]),
)
def test_equivariance(flux, permutation, name):
    """If tokens and ids are permuted together, the output is permuted."""
    x, ctx = inputs(dtype=torch.float64), context(torch.float64, flux.params)
    ids = compile_programs([Program.from_config(PROGRAMS[name])], ctx).ids(0.6, head=1)[None]
    plain = call(flux, x, ids)
    order = torch.cat((torch.arange(TEXT), TEXT + torch.tensor(permutation)))
    moved = call(flux, {**x, "img": x["img"][:, permutation]}, ids[:, order])
    assert torch.allclose(moved, plain[:, permutation], atol=1e-10)


def rotated(x, ids, p=PARAMS):
    """RoPE written out: `(H, N, d)` rotated by the angles id · ω."""
    out = torch.empty_like(x)
    start = 0
    for a, dim in enumerate(p.axes_dim):
        for k in range(dim // 2):
            angle = ids[..., a] * p.theta ** (-2 * k / dim)
            x0, x1 = x[..., start + 2 * k], x[..., start + 2 * k + 1]
            out[..., start + 2 * k] = angle.cos() * x0 - angle.sin() * x1
            out[..., start + 2 * k + 1] = angle.sin() * x0 + angle.cos() * x1
        start += dim
    return out


def test_groups_against_dense_attention():
    """Every query has its own key positions, and all scores are computed one by one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 7, 16, generator=g, dtype=torch.float64) for _ in range(3))
    parts = (torch.tensor([5, 0, 3]), torch.tensor([1]), torch.tensor([2, 4, 6]))
    ids = [torch.randn(2, 7, 3, generator=g, dtype=torch.float64) * 5 for _ in parts]
    mask = torch.randn(2, 1, 7, 7, generator=g, dtype=torch.float64)
    groups = KeyGroups(parts, tuple(rotary_table(i, PARAMS.axes_dim, PARAMS.theta) for i in ids))
    expected = torch.empty_like(v)
    for queries, group_ids in zip(parts, ids, strict=True):
        for b in range(2):
            keys = rotated(k[b], group_ids[b])
            for n in queries.tolist():
                scores = (q[b, :, n, None] * keys).sum(-1) / 4 + mask[b, :, n]
                expected[b, :, n] = (scores.softmax(-1)[..., None] * v[b]).sum(1)
    assert torch.allclose(attend_in_groups(q, k, v, groups, mask), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_is_plain_attention(dtype):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 9, 16, generator=g) for _ in range(2))
    v = torch.randn(2, 2, 9, 16, generator=g).to(dtype)
    table = rotary_table(torch.randn(1, 9, 3, generator=g), PARAMS.axes_dim, PARAMS.theta)
    single = KeyGroups((torch.arange(9),), (table,))
    three = KeyGroups(tuple(torch.arange(9).split(4)), (table,) * 3)
    with torch.no_grad():
        a, b = (attend_in_groups(q, k, v, groups) for groups in (single, three))
    assert a.dtype == dtype
    assert torch.allclose(a.float(), b.float(), atol=1e-6 if dtype == torch.float32 else 1e-2)


def dense_model(flux, program, monkeypatch):
    """Run the model with an attention that takes the ids of each query, key and head from `Compiled`."""
    from fluxlab.model import layers

    p = flux.params
    compiled = compile_programs([Program.from_config(program)], context(torch.float64, p))
    block = iter(range(4))

    def attention(q, k, v, keys, mask, tap):
        n_block, out = next(block), torch.empty_like(v)
        for h in range(2):
            at = compiled.ids(0.6, n_block, "queries", h)
            scales = compiled.scales(0.6, n_block, h)
            for n in range(q.shape[2]):
                seen = rotated(k[0, h], compiled.ids(0.6, n_block, "keys", h, query=n), p)
                scores = (rotated(q[0, h, n], at[n], p) * scales[n] * seen).sum(-1) / 4
                if mask is not None:
                    scores = scores + mask.expand(1, 2, *mask.shape[2:])[0, h, n]
                out[0, h, n] = scores.softmax(-1) @ v[0, h]
        return out

    def unrotated(qkvs, norms, heads, tables):
        qkvs = [qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for qkv in qkvs]
        q = torch.cat([norm.query_norm(qkv[0]) for qkv, norm in zip(qkvs, norms, strict=True)], 2)
        k = torch.cat([norm.key_norm(qkv[1]) for qkv, norm in zip(qkvs, norms, strict=True)], 2)
        return q, k, torch.cat([qkv[2] for qkv in qkvs], 2)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "query_key_value", unrotated)
        patch.setattr(layers, "joint_attention", attention)
        return velocity(flux, [program], dtype=torch.float64)


@pytest.mark.parametrize("name", PROGRAMS)
def test_against_dense_attention(flux, name, monkeypatch):
    """The whole model against an attention with every score computed one by one, for every kind of program."""
    double = copy.deepcopy(flux).double()
    with torch.no_grad():
        expected = dense_model(double, PROGRAMS[name], monkeypatch)
        output = velocity(double, [PROGRAMS[name]], dtype=torch.float64)
    assert torch.allclose(output, expected, atol=1e-9)


def test_a_mask_hides(flux):
    """Image tokens do not depend on keys that are masked from them."""
    program = {"a": {"op": "mask", "from": "image", "to": "text"}}
    rotary, mask = compile_programs([Program.from_config(program)], context(p=flux.params)).at(0.6)
    x = inputs()
    outputs = [call(flux, {**x, "txt": txt}, rotary=rotary, mask=mask) for txt in (x["txt"], -x["txt"])]
    assert torch.equal(*outputs)
    assert not torch.equal(velocity(flux, [program]), velocity(flux, [{}]))


SMALL = [
    FluxParams(4, 4, 3, 3, 12, 1.0, 1, 1, 1, (4, 4, 4), 100, True, False),
    Flux2Params(4, 4, 3, 16, 1.0, 1, 1, 1, (4, 4, 4, 4), 100, False),
]


@pytest.mark.parametrize("small", SMALL, ids=families.NAMES)
def test_gradcheck(small):
    """Gradients flow through program, table and model."""
    flux, layout, family = of_size(small).double(), Layout(2, (2, 2)), family_of(small)
    ids = torch.cat(family.ids(2, [(2, 2)]))[None].double()
    ids = ids + 0.1 * torch.rand_like(ids)
    img, txt, y = torch.randn(1, 4, 4).double(), torch.randn(1, 2, 3).double(), torch.randn(1, 3).double()
    edits = {
        "a": {"op": "scale", "factor": 1.3, "origin": "centre", "strength": 0.7},
        "b": {"op": "rotate", "degrees": 20, "side": "keys", "blocks": [0]},
        "c": {"op": "warp", "field": [[[0, 0], [0, 1]], [[1, 0], [1, 1]]], "side": "keys", "seen_by": "text"},
        "d": {"op": "drop", "axes": "row", "blocks": [1], "strength": 0.5},
        "e": {"op": "temperature", "factor": 1.5},
    }

    def out(ids):
        ctx = Context(ids, layout, small.axes_dim, small.theta, 1, 1, 1)
        rotary, mask = compile_programs([Program.from_config(edits)], ctx).at(1.0)
        x = {"img": img, "txt": txt, "y": y, "timesteps": torch.ones(1).double()}
        return call(flux, x, rotary=rotary, mask=mask)

    assert torch.autograd.gradcheck(out, (ids.requires_grad_(),))


def test_a_position_found_by_gradient_descent(flux):
    """The position of a moved token is recovered by minimising the difference in the output."""
    more = [0.0] * (len(flux.params.axes_dim) - 3)

    def run(where):
        ctx = context(p=flux.params)
        ids = ctx.ids.index_put((torch.tensor([0]), torch.tensor([TEXT + 4])), where[None])
        rotary, _ = compile_programs([Program()], dataclasses.replace(ctx, ids=ids)).at(0.6)
        return call(flux, inputs(), rotary=rotary)

    target = run(torch.tensor([0.0, 1.5, 0.5, *more])).detach()
    where = torch.tensor([0.0, 1.0, 1.0, *more], requires_grad=True)
    optimiser = torch.optim.Adam([where], lr=0.05)
    losses = []
    for _ in range(80):
        loss = (run(where) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert (where.detach() - torch.tensor([0.0, 1.5, 0.5, *more])).abs().max() < 0.1


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "drop"])
def test_noise_floor(flux, name):
    """A shift of all ids changes only the last digits."""
    assert noise_floor(lambda program: velocity(flux, [program]), Program.from_config(PROGRAMS[name])) < 1e-4


def test_noise_floor_of_dropped_rotation(flux):
    """Keys without rotation do not shift with the others, so this program depends on absolute positions."""
    assert noise_floor(lambda program: velocity(flux, [program]), Program.from_config(PROGRAMS["drop"])) > 1e-3


@pytest.fixture(scope="module", params=families.NAMES)
def pipe(request):
    return families.load(request.param)


CALL = {
    "prompts": "a cat and a dog",
    "height": 16,
    "width": 24,
    "steps": 3,
    "max_sequence_length": 12,
    "output": "latent",
}


def test_generate_takes_a_program_per_sample(pipe):
    programs = [
        None,
        {"a": {"op": "scale", "factor": 2}},
        Program.from_config({"a": {"op": "zero", "tokens": {"words": ["cat"]}}, "b": {"op": "offset", "by": 1}}),
        {"a": {"op": "mask", "from": "image", "to": {"words": "dog"}, "steps": [1]}},
    ]
    together = pipe.generate(**CALL, programs=programs)
    for sample, program in zip(together, programs, strict=True):
        alone = pipe.generate(**CALL, programs=program)
        assert (sample - alone[0]).abs().max() <= 1e-5 * alone.std()
    assert torch.equal(pipe.generate(**CALL), pipe.generate(**CALL, programs=[{}]))
    assert pipe.generate(**{**CALL, "seeds": [1, 2, 3]}, programs=[programs[1]]).shape[0] == 3


def test_words_are_found_in_each_prompt(pipe):
    words = {"a": {"op": "relocate", "tokens": {"words": ["dog"]}, "to": [3, 3]}}
    call = {**CALL, "prompts": ["a cat and a dog", "the dog"], "seeds": [0, 0]}
    together = pipe.generate(**call, programs=[words])
    for i, prompt in enumerate(call["prompts"]):
        alone = pipe.generate(**{**call, "prompts": prompt, "seeds": 0}, programs=words)
        assert (together[i] - alone[0]).abs().max() <= 1e-5 * alone.std()
        assert not torch.equal(alone, pipe.generate(**{**call, "prompts": prompt, "seeds": 0}))


def test_true_guidance_with_words(pipe):
    words = {"a": {"op": "zero", "tokens": {"words": "dog"}, "axes": "row"}, "b": {"op": "offset", "by": 1}}
    assert pipe.generate(**CALL, programs=words, true_cfg=3.0, negative_prompts="a cat").isfinite().all()


def test_inversion_with_a_program(pipe):
    """Inverting at spacing 2 and sampling at spacing 2 returns the image; sampling at spacing 1 does not."""
    double = {"a": {"op": "scale", "factor": 2}}
    call = {**{k: v for k, v in CALL.items() if k != "output"}, "steps": 12}
    pipe.max_sequence_length, kept = CALL["max_sequence_length"], pipe.max_sequence_length
    image = pipe.generate(**call, output="pt", programs=double)
    noise = pipe.invert(image, CALL["prompts"], steps=12, programs=double, iterations=5)
    pipe.max_sequence_length = kept
    x, _, _ = pipe.encode(image)
    back, other = (pipe.generate(**call, output="latent", latents=noise, programs=p) for p in (double, None))
    assert (back - x).abs().mean() < 0.2 * (other - x).abs().mean()


def test_an_fp64_model_takes_fp64_tables(pipe):
    double = dataclasses.replace(pipe, transformer=copy.deepcopy(pipe.transformer).double(), _encoded={})
    program = {"a": {"op": "scale", "factor": 1.2}}
    a, b = (p.generate(**CALL, seeds=0, latents=torch.ones(1, 24, 16), programs=program) for p in (double, pipe))
    assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ({"a": {"op": "scael"}}, r"^programs\.a\.op: 'scael', .*did you mean scale\?$"),
        ([{}, {"a": {"op": "scale", "factor": "x"}}], r"^programs\[1\]\.a\.factor: 'x', expected a number"),
        (
            [{"a": {"op": "zero", "tokens": {"words": ["fox"]}}}],
            r"^programs\[0\]\.a\.tokens\.words: 'fox' is not in the prompt",
        ),
        ([{"a": {"op": "zero", "blocks": [9]}}], r"^programs\[0\]\.a\.blocks: 9, expected a block below [45]"),
        ([{"a": {"op": "zero", "steps": [3]}}], r"^programs\[0\]\.a\.steps: 3, expected a step of this run, 0 … 2"),
        ("scale", r"^programs: 'scale', expected a mapping of edits"),
        (3, r"^programs: 3, expected a mapping of edits"),
        ([], "0 programs: expected equal numbers"),
    ],
)
def test_errors_name_the_program_and_key(pipe, programs, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate(**CALL, programs=programs)


def test_numbers_of_seeds_and_programs_must_agree(pipe):
    with pytest.raises(ValueError, match="3 seeds, 2 programs: expected equal numbers"):
        pipe.generate(**{**CALL, "seeds": [1, 2, 3]}, programs=[{}, {}])
