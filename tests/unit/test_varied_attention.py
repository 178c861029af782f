"""windows, distance and concentrate against attention written out in fp64, in batches, and where they act."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxlab
from fluxlab.errors import UserError
from fluxlab.families import family_of
from fluxlab.model import Flux, Flux2, layers
from fluxlab.positions import Program, compile_programs, noise_floor
from fluxlab.positions.at_step import sequence
from fluxlab.positions.registry import OPS, op
from fluxlab.probes import Probe
from fluxlab.probes.stream import attention_weights, tokens
from fluxlab.select.tokens import parse_tokens
from tests import families
from tests.unit.test_positions_model import (
    GRID,
    PARAMS,
    PARAMS2,
    TEXT,
    call,
    context,
    inputs,
    of_size,
    rotated,
    velocity,
)

N = TEXT + GRID[0] * GRID[1]
TRAINED = (3, 3)
MORE = {"trained": TRAINED}


@pytest.fixture(scope="module", params=[PARAMS, PARAMS2], ids=families.NAMES)
def flux(request) -> Flux | Flux2:
    return of_size(request.param)


@pytest.fixture(scope="module")
def double(flux) -> Flux | Flux2:
    return of_size(flux.params).double()


def grid_ids() -> list[list[float]]:
    """Index, row and column of all tokens."""
    return [[0.0] * 3] * TEXT + [[0.0, float(r), float(c)] for r in range(GRID[0]) for c in range(GRID[1])]


def ids_of(placed: list[list[float]], p) -> torch.Tensor:
    """Return the ids of tokens at these places. FLUX.2 has the order of the text besides."""
    order = [[float(i)] if i < TEXT else [0.0] for i in range(N)] if family_of(p).name == "flux2" else [[]] * N
    return torch.tensor([[*place, *last] for place, last in zip(placed, order, strict=True)]).double()


# An independent derivation: positions and factors one token and one pair of tokens at a time, with plain numbers.
def bundled(x, n, s):
    return 0 if x < n else math.ceil((x + 1 - n) / s)


def windows_of(ids, rows, cols, shift=0.0):
    """HRDiT's positions: the first boundary slides along rows, then along columns."""
    starts = [(rows, cols)] + [(n, cols) for n in range(1, rows)] + [(rows, m) for m in range(1, cols)]
    return [
        ids[:TEXT] + [[i, bundled(r, n, rows) + shift, bundled(c, m, cols) + shift] for i, r, c in ids[TEXT:]]
        for n, m in starts
    ]


def far(a, b, bound, over=0.0):
    """The share of a factor at the largest distance in rows or columns."""
    beyond = max(abs(a[1] - b[1]) - bound[0], abs(a[2] - b[2]) - bound[1])
    return min(max(beyond / over, 0), 1) if over else float(beyond > 0)


def between(ids, factor, bound, over=0.0, rows=range(TEXT, N), cols=range(TEXT, N)):
    by = [[1.0] * N for _ in range(N)]
    for i in rows:
        for j in cols:
            by[i][j] = 1 + (factor - 1) * far(ids[i], ids[j], bound, over)
    return torch.tensor(by, dtype=torch.float64)


def entropy(p, size):
    """Entropy between groups of `size` tokens, mean over groups of queries, of `(N, N)`."""
    groups = [range(i, min(i + size, N)) for i in range(0, N, size)]
    total = 0.0
    for a in groups:
        shares = [sum(float(p[i, j]) for i in a for j in b) / len(a) for b in groups]
        total -= sum(x * math.log(x) for x in shares if x > 0)
    return total / len(groups)


def sharpness(h, factor, to, low, high, power):
    z = min(max((h - low) / (high - low), 0), 1)
    return to + (factor - to) * (1 - z) ** power


GIVEN = grid_ids()
HALF = tuple(n / 2 for n in TRAINED)
GIVES = {"factor": 2.0, "to": 0.5, "low": 0.3, "high": 1.2, "power": 1.5}

# name: (program, windows, [(factor, positive only, heads)], (sharpness, group, heads) or None)
CASES = {
    "windows": ({"a": {"op": "windows", "size": 2}}, windows_of(GIVEN, 2, 2), [], None),
    "windows of rows": ({"a": {"op": "windows", "size": [3, 1]}}, windows_of(GIVEN, 3, 1), [], None),
    "windows that fit": ({"a": {"op": "windows"}}, windows_of(GIVEN, 2, 1), [], None),
    "windows, shifted": (
        {"s": {"op": "offset", "by": [0, 0.5, 0.5]}, "a": {"op": "windows", "size": 2}},
        windows_of(GIVEN, 2, 2, 0.5),
        [],
        None,
    ),
    "positive": ({"a": {"op": "distance", "factor": 0.4}}, [GIVEN], [(between(GIVEN, 0.4, HALF), True, (0, 1))], None),
    "all": (
        {"a": {"op": "distance", "factor": 0.4, "scores": "all", "beyond": 1, "strength": 0.5}},
        [GIVEN],
        [(between(GIVEN, 0.7, (1, 1)), False, (0, 1))],
        None,
    ),
    "over": (
        {"a": {"op": "distance", "factor": 3, "beyond": [0, 1], "over": 2, "heads": 1, "from": "text", "to": "all"}},
        [GIVEN],
        [(between(GIVEN, 3, (0, 1), 2, range(TEXT), range(N)), True, (1,))],
        None,
    ),
    "concentrate": (
        {"a": {"op": "concentrate", "group": 4, **GIVES}},
        [GIVEN],
        [],
        (lambda h: sharpness(h, *GIVES.values()), 4, (0, 1)),
    ),
    "together": (
        {
            "a": {"op": "windows", "size": 2},
            "b": {"op": "distance", "factor": 0.3, "beyond": 1},
            "c": {"op": "concentrate", "group": 5, **GIVES, "heads": 0},
            "d": {"op": "mask", "from": "text", "to": "image"},
        },
        windows_of(GIVEN, 2, 2),
        [(between(GIVEN, 0.3, (1, 1)), True, (0, 1))],
        (lambda h: sharpness(h, *GIVES.values()), 5, (0,)),
    ),
}
MASKED = torch.zeros(N, N, dtype=torch.float64)
MASKED[:TEXT, TEXT:] = -math.inf


def written_out(flux, name, monkeypatch, seen=None):
    """The model's output, with the attention of a case computed one score at a time. seen: gets p of blocks, heads."""
    program, windows, factors, sharpen = CASES[name]
    mask = MASKED if "d" in program else torch.zeros(N, N, dtype=torch.float64)

    def attention(q, k, v, keys, _, tap):
        out = torch.empty_like(v)
        for h in range(flux.params.num_heads):
            raw = []
            for placed in windows:
                ids = ids_of(placed, flux.params)
                raw.append(rotated(q[0, h], ids, flux.params) @ rotated(k[0, h], ids, flux.params).T / 4)
            if sharpen and h in sharpen[2]:
                measured = [entropy((s + mask).softmax(-1), sharpen[1]) for s in raw]
                raw = [s * sharpen[0](sum(measured) / len(measured)) for s in raw]
            p = 0
            for s in raw:
                for by, positive, heads in factors:
                    if h in heads:
                        s = torch.where((s > 0) | torch.tensor(not positive), s * by, s)
                p = p + (s + mask).softmax(-1) / len(raw)
            out[0, h] = p @ v[0, h]
            if seen is not None:
                seen.append(p)
        return out

    def unrotated(qkvs, norms, heads, tables):
        qkvs = [qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for qkv in qkvs]
        q = torch.cat([norm.query_norm(qkv[0]) for qkv, norm in zip(qkvs, norms, strict=True)], 2)
        k = torch.cat([norm.key_norm(qkv[1]) for qkv, norm in zip(qkvs, norms, strict=True)], 2)
        return q, k, torch.cat([qkv[2] for qkv in qkvs], 2)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "query_key_value", unrotated)
        patch.setattr(layers, "joint_attention", attention)
        return velocity(flux, [{}], dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_against_attention_written_out(double, name, monkeypatch):
    with torch.no_grad():
        expected = written_out(double, name, monkeypatch)
        found = velocity(double, [CASES[name][0]], dtype=torch.float64, **MORE)
        plain = velocity(double, [{}], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-9)
    assert (found - plain).abs().max() > 1e-2 * plain.std()


@pytest.mark.parametrize("name", [name for name in CASES if "windows" not in name and name != "together"])
@pytest.mark.parametrize("first", [{}, {"a": {"op": "zero", "side": "keys", "seen_by": "text", "strength": 0.5}}])
def test_probes_see_the_factors(double, name, first, monkeypatch):
    """p of the sample, in a batch with another program (in groups of queries), is that of the attention written out."""
    p = double.params
    seen, expected, whole = [], [], tokens(torch.arange(N))
    with torch.no_grad():
        written_out(double, name, monkeypatch, expected)
        programs = [Program.from_config(program) for program in (first, CASES[name][0])]
        rotary, mask = compile_programs(programs, context(torch.float64, p, **MORE)).at(0.6)

        def tap(attended):
            found = torch.zeros(p.num_heads, N, N, dtype=torch.float64)
            for part, which in attention_weights(attended, 1, None, whole, whole):
                found[:, which if isinstance(which, slice) else which.on_host] = part
            seen.append(found)

        call(double, inputs(2, torch.float64), rotary=rotary, mask=mask, taps=[tap] * 4)
    found = torch.stack(seen).unflatten(0, (4, -1)).sum(1)
    assert torch.allclose(found.flatten(0, 1), torch.stack(expected), atol=1e-9)


def test_windows_are_not_captured():
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    programs, more = [None, {"a": {"op": "windows", "size": 2}}], {"steps": 1, "output": "latent"}
    for request in ({"kind": "entropy"}, {"kind": "activation", "site": "queries"}):
        with pytest.raises(
            UserError, match=r"^programs\[1\].a: windows has several tables, .* leave the capture of mine out"
        ):
            pipe.generate("a cat", [0], programs, probe=Probe({"mine": request}), **more)
    probe = Probe({"mine": {"kind": "activation", "site": "attention", "average": ["tokens", "blocks", "heads"]}})
    with_probe = pipe.generate("a cat", [0], programs, probe=probe, **more)
    assert torch.equal(with_probe, pipe.generate("a cat", [0], programs, **more))


PROGRAMS = [
    {},
    *(case[0] for case in CASES.values()),
    {"a": {"op": "scale", "factor": 0.5, "side": "keys", "seen_by": "text"}},
    {
        "a": {"op": "zero", "side": "keys", "seen_by": {"box": [0, 0, 2, 3]}},
        "b": {"op": "windows", "size": 2, "side": "keys"},
        "c": {"op": "distance", "factor": 0.5, "beyond": 1},
    },
    {
        "a": {"op": "offset", "by": [0, 2, 0], "side": "keys", "seen_by": "text"},
        "b": {"op": "distance", "factor": 0.5, "beyond": 1, "from": "all"},
        "c": {"op": "concentrate", "group": 4, "factor": 2},
    },
    {"a": {"op": "windows", "size": 2, "heads": 1, "blocks": "double", "strength": 0.5}},
]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "recording"])
def test_a_batch_equals_single_samples(flux, grad):
    with torch.set_grad_enabled(grad):
        together = velocity(flux, PROGRAMS, **MORE)
        for sample, program in zip(together, PROGRAMS, strict=True):
            alone = velocity(flux, [program], **MORE)[0]
            assert (sample - alone).abs().max() <= 2e-5 * alone.std()
    for i, a in enumerate(together):
        for b in together[:i]:
            assert (a - b).abs().max() > 1e-3 * a.std()


def test_plain_samples_do_not_change_in_a_batch_of_others(flux):
    """The bits of a program without these ops do not depend on the other samples of its batch."""
    with torch.no_grad():
        together = velocity(flux, [{}, CASES["together"][0], {}], **MORE)
        assert torch.equal(together[::2], velocity(flux, [{}, {}], **MORE))


SOME = {name: CASES[name][0]["a"] for name in ("windows", "positive", "concentrate")}


@pytest.mark.parametrize("edit", SOME.values(), ids=SOME)
def test_blocks_steps_heads_and_strength(flux, edit):
    ctx = context(p=flux.params, **MORE)

    def tables(where, t=0.6):
        return compile_programs([Program.from_config({"a": {**edit, **where}})], ctx).at(t).rotary

    varied = [hasattr(keys, "variations") for _, keys in tables({"blocks": [1, 3]})]
    assert varied == [False, True, False, True]
    assert not isinstance(tables({"steps": [1]}, 1.0), list)
    assert isinstance(tables({"steps": [1]}, 0.6), list)
    plain = velocity(flux, [{}], **MORE)
    assert torch.equal(velocity(flux, [{"a": {**edit, "strength": 0}}], **MORE), plain)
    change = [(velocity(flux, [{"a": {**edit, "strength": s}}], **MORE) - plain).abs().max() for s in (1e-3, 0.1, 1)]
    assert change[0] < change[1] < change[2]
    assert change[0] < 0.02 * change[2]
    one, both = (velocity(flux, [{"a": {**edit, **where}}], **MORE) for where in ({"heads": 0}, {"heads": [0, 1]}))
    assert torch.equal(both, velocity(flux, [{"a": edit}], **MORE))
    assert not torch.equal(one, both)


def test_factors_of_one_change_nothing(flux):
    plain = velocity(flux, [{}], **MORE)
    for edit in (
        {"op": "distance", "factor": 1},
        {"op": "concentrate", "factor": 1, "to": 1},
        {"op": "windows", "size": 1},
        {"op": "distance", "factor": 0.5, "beyond": 100},
    ):
        assert (velocity(flux, [{"a": edit}], **MORE) - plain).abs().max() <= 1e-5 * plain.std(), edit


@pytest.mark.parametrize("name", CASES)
def test_noise_floor(flux, name):
    """A shift of all ids changes only the last digits, so positions are counted from the image's corner."""
    program = Program.from_config(CASES[name][0])
    assert noise_floor(lambda p: velocity(flux, [p], **MORE), program) < 1e-4
    shift = {"first": {"op": "offset", "by": [3, -2.5, 7], "tokens": "all"}}
    moved = velocity(flux, [{**shift, **CASES[name][0]}], **MORE)
    plain = velocity(flux, [CASES[name][0]], **MORE)
    assert (moved - plain).abs().max() < 1e-4 * plain.std()


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(1, 9), st.integers(1, 9))
def test_windows_share_positions_in_order(rows, s, m):
    """Neighbours keep their order, at most `size` share a position, and the boundary slides."""
    ctx = sequence(grid=(rows, 3), text=1, trained=(4, 4), double=1, single=0)
    compiled = compile_programs([Program.from_config({"a": {"op": "windows", "size": [s, m]}})], ctx)
    placed = [compiled._placed(0, (0,), window) for window in range(s + m - 1) if compiled.at(1.0)]
    assert {p.windows for p in placed} == {s + m - 1}
    for p in placed:
        x = p.ids[1:, 1].reshape(rows, 3)[:, 0]
        assert ((x.diff() == 0) | (x.diff() == 1)).all()
        assert x.unique(return_counts=True)[1].max() <= s


def test_gradients(double):
    """Through positions and scores: the factor of a head and the ramp of a distance are smooth."""
    edits = {
        "s": {"op": "scale", "factor": 1.1},
        "b": {"op": "distance", "factor": 0.5, "beyond": 0.3, "over": 9, "scores": "all"},
        "c": {"op": "concentrate", "group": 4, **GIVES, "high": 3},
        "w": {"op": "windows", "size": 1},
    }

    def out(shift):
        ctx = context(torch.float64, double.params, **MORE)
        ids = ctx.ids + 0.1 * shift * torch.rand(ctx.ids.shape, generator=torch.Generator().manual_seed(1)).double()
        ctx = type(ctx)(**{**vars(ctx), "ids": ids})
        rotary, mask = compile_programs([Program.from_config(edits)], ctx).at(0.6)
        return call(double, inputs(dtype=torch.float64), rotary=rotary, mask=mask)

    assert torch.autograd.gradcheck(out, (torch.tensor(0.7, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "windows", "size": 0}, "a.size: 0, expected whole numbers from 1"),
        ({"op": "windows", "size": 1.5}, "a.size: 1.5, expected whole numbers from 1"),
        ({"op": "windows", "size": 40}, "a.size: 40 and 40 make 79 windows, expected at most 31"),
        ({"op": "distance"}, "a.factor: missing"),
        ({"op": "distance", "factor": -1}, "a.factor: -1"),
        ({"op": "distance", "factor": 2, "tokens": "text"}, "a.tokens"),
        ({"op": "concentrate", "low": 7}, "a.high: 6.0, expected more than low, 7.0"),
        ({"op": "concentrate", "group": 0}, "a.group: 0"),
    ],
)
def test_errors(edit, message):
    with pytest.raises(UserError, match=message):
        compile_programs([Program.from_config({"a": edit})], context(**MORE))


def test_two_windows_in_one_block():
    edits = {"a": {"op": "windows", "size": 2}, "b": {"op": "windows", "size": 2}}
    with pytest.raises(UserError, match="b: a second edit of windows in the same step and block"):
        compile_programs([Program.from_config(edits)], context(**MORE))
    edits = {"a": {**edits["a"], "blocks": [0]}, "b": {**edits["b"], "blocks": [1]}}
    compile_programs([Program.from_config(edits)], context(**MORE))


def test_a_long_sequence_is_tried_with_some_of_its_tokens():
    """The factors of all 16,640 tokens of twice FLUX's size are 1 GB, and were computed by every check of a program."""
    sizes = []

    @op("traced", {"from": parse_tokens, "to": parse_tokens}, acts_on="scores")
    def traced(queries, keys, trained, axes, from_=None, to=None):
        """Fail where a query has the position of a key."""
        sizes.append((len(queries), len(from_), int(from_.sum())))
        return 1 + 0 * (queries[:, None] - keys[None]).square().sum(-1).reciprocal()

    try:
        context = sequence(grid=(128, 128), text=256)
        edit = {"op": "traced", "from": "image", "to": "image"}
        with pytest.raises(UserError, match=r"gave NaN or inf for 1024 of them, first for text token 0"):
            compile_programs([Program.from_config({"a": edit})], context)
    finally:
        del OPS["traced"]
    assert sizes == [(1024, 1024, 1008)]
