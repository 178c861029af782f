"""Frequency ops against an independent derivation of every formula, and as parts of programs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.checkpoints.stored import stored
from fluxlab.config import find_row
from fluxlab.errors import UserError
from fluxlab.loading import pipeline_without_weights
from fluxlab.positions import Program, Waves, compile_programs, frequency_ops, op, tables
from fluxlab.positions.at_step import sequence
from fluxlab.positions.registry import OPS
from fluxlab.positions.waves import spectrum, unchanged

AXES_DIM, THETA, TEXT = (16, 56, 56), 10000.0, 3
GRID = (9, 8)
TIMES = (1.0, 0.5, 0.1)


# An independent derivation, one axis and one pair at a time, with NumPy and math in fp64.
def omega(i, d, theta=THETA):
    return 1.0 / theta ** (2.0 * i / d)


def correction(r, d, trained, theta=THETA):
    return math.inf if r == 0 else d * math.log(trained / (r * 2 * math.pi)) / (2 * math.log(theta))


def ramp_ends(a, b, d, trained):
    low = min(max(correction(a, d, trained), 0), d // 2)
    high = min(max(correction(b, d, trained), 0), d // 2)
    return math.floor(low), math.ceil(high)


def ramp(i, a, b, d, trained):
    low, high = ramp_ends(a, b, d, trained)
    return min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0)


def yarn(i, d, s, trained, beta=(1.25, 0.75), gamma=(16.0, 2.0)):
    if s <= 1:
        return omega(i, d)
    ntk = omega(i, d, THETA * s ** (d / (d - 2)))
    linear = omega(i, d) / s
    m = ramp(i, *beta, d, trained)
    first = ntk * (1 - m) + linear * m
    m = ramp(i, *gamma, d, trained)
    return omega(i, d) * (1 - m) + first * m


def times(pair, factor):
    return tuple(x * factor for x in pair)


def power(pair, exponent):
    return tuple(x**exponent for x in pair)


def nearest_pair(d, length):
    return min(range(d // 2), key=lambda i: abs(2 * math.pi / omega(i, d) - length))


METHODS = {
    # name: (edit, frequency of pair i of an axis of width d at stretch s = n/L and time t, gain)
    "pi": ({"op": "pi"}, lambda i, d, n, L, t: omega(i, d) / max(n / L, 1), None),
    "pi 3": ({"op": "pi", "factor": 3}, lambda i, d, n, L, t: omega(i, d) / 3, None),
    "ntk": (
        {"op": "ntk"},
        lambda i, d, n, L, t: omega(i, d, THETA * max(n / L, 1) ** (d / (d - 2))),
        None,
    ),
    "yarn": (
        {"op": "yarn"},
        lambda i, d, n, L, t: yarn(i, d, n / L, L),
        lambda n, L: 1 + 0.1 * math.log(max(n / L, 1)),
    ),
    "dype": (
        {"op": "dype"},
        lambda i, d, n, L, t: yarn(i, d, n / L, L, times((1.25, 0.75), t**2), times((16, 2), t**2)),
        lambda n, L: 1 + 0.1 * math.log(max(n / L, 1)),
    ),
    "dype, other exponent and scale": (
        {"op": "dype", "exponent": 1, "scale": 0.7},
        lambda i, d, n, L, t: yarn(i, d, n / L, L, times((1.25, 0.75), 0.7 * t), times((16, 2), 0.7 * t)),
        lambda n, L: 1 + 0.1 * math.log(max(n / L, 1)),
    ),
    "dype comfyui": (
        {"op": "dype", "variant": "comfyui"},
        lambda i, d, n, L, t: yarn(i, d, n / L, L, power((1.25, 0.75), t**2), power((16, 2), t**2)),
        lambda n, L: 1 + 0.1 * math.log(max(n / L, 1)) / math.sqrt(max(n / L, 1)),
    ),
    "dype ntk": (
        {"op": "dype", "method": "ntk"},
        lambda i, d, n, L, t: omega(i, d, THETA * max(1, max(n / L, 1) ** (d / (d - 2) * 2 * t**2))),
        None,
    ),
    "dype pi": ({"op": "dype", "method": "pi"}, lambda i, d, n, L, t: omega(i, d) / max(n / L, 1) ** t**2, None),
    "riflex": (
        {"op": "riflex"},
        lambda i, d, n, L, t: 0.9 * 2 * math.pi / n if i == nearest_pair(d, L) and n > L else omega(i, d),
        None,
    ),
    "ultraimage": (
        {"op": "riflex", "pair": 9, "share": 0.85, "length": 225},
        lambda i, d, n, L, t: 0.85 * 2 * math.pi / 225 if i == 9 else omega(i, d),
        None,
    ),
}


def reference(name, grid, trained, t, text=TEXT):
    """Return (cos, sin) `(N, d/2)` in fp64: frequencies of rows and columns by the method, the index unchanged."""
    _, frequency, gain = METHODS[name]
    rows, cols = grid
    positions = np.zeros((text + rows * cols, 3))
    positions[text:, 1], positions[text:, 2] = np.divmod(np.arange(rows * cols), cols)
    columns = []
    for axis, d in enumerate(AXES_DIM):
        for i in range(d // 2):
            if axis == 0:
                w, m = omega(i, d), 1.0
            else:
                n, L = grid[axis - 1], trained[axis - 1]
                w, m = frequency(i, d, n, L, t), 1.0 if gain is None else gain(n, L)
            angle = positions[:, axis] * w
            columns.append((m * np.cos(angle), m * np.sin(angle)))
    return tuple(np.stack(parts, 1) for parts in zip(*columns, strict=True))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("grid", "trained"), [((80, 97), (64, 64)), ((32, 90), (64, 32)), ((20, 30), (64, 64))])
def test_tables_equal_the_formula(name, t, grid, trained):
    found = tables({"a": METHODS[name][0]}, *grid, TEXT, AXES_DIM, THETA, trained, t)
    for part, expected in zip(found, reference(name, grid, trained, t), strict=True):
        assert part.dtype == torch.float32
        assert np.abs(part.numpy() - expected).max() <= 1e-6


@pytest.mark.parametrize(
    ("t", "to_ntk", "to_pi"), [(1.0, (0, 5), (6, 8)), (0.5, (2, 10), (10, 13)), (0.1, (12, 19), (20, 22))]
)
def test_ramps_of_dype(t, to_ntk, to_pi):
    """The ramps of DyPE for d = 56 and L = 64: here and in the op."""
    assert ramp_ends(*times((16, 2), t**2), 56, 64) == to_ntk
    assert ramp_ends(*times((1.25, 0.75), t**2), 56, 64) == to_pi
    seen = spectrum(sequence(grid=(80, 80), text=0).ids[0], sequence(grid=(80, 80), text=0), None, t)
    for ends, (low, high) in ((times((16, 2), t**2), to_ntk), (times((1.25, 0.75), t**2), to_pi)):
        found = frequency_ops._ramp(ends, seen)[8:36]
        assert (found[: low + 1] == 0).all()
        assert (found[high:] == 1).all()
        assert ((found[low + 1 : high] > 0) & (found[low + 1 : high] < 1)).all()


def same_as_unchanged(program, t=1.0, grid=(40, 64), **more):
    found = tables(program, *grid, TEXT, t=t, **more)
    return all(torch.equal(a, b) for a, b in zip(found, tables({}, *grid, TEXT), strict=True))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pi 3", "ultraimage")] + ["imax"])
def test_nothing_changes_up_to_the_trained_size(name):
    edit = {"op": "imax"} if name == "imax" else METHODS[name][0]
    assert same_as_unchanged({"a": edit})
    shifted = {"a": {"op": "offset", "by": 100}, "b": edit}  # shifting the ids does not make the image larger
    plain = tables({"a": shifted["a"]}, 40, 64, TEXT)
    assert all(torch.equal(a, b) for a, b in zip(tables(shifted, 40, 64, TEXT), plain, strict=True))


@pytest.mark.parametrize("method", ["yarn", "ntk", "pi"])
def test_dype_fades_to_the_models_own_frequencies(method):
    context = sequence(grid=(100, 100), text=0, steps=1000)
    compiled = compile_programs([Program.from_config({"a": {"op": "dype", "method": method}})], context)
    own = unchanged(context).frequency
    distance = [float((compiled.waves(t).frequency / own - 1).abs().max()) for t in (1.0, 0.5, 0.1, 0.001)]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-5
    zero = {"a": {"op": "dype", "method": method}, "g": {"op": "gain", "factor": 1 / (1 + 0.1 * math.log(100 / 64))}}
    if method == "yarn":  # the gain of YaRN does not fade
        zero["g"]["axes"] = ["row", "col"]
        cos, _ = tables(zero, 100, 100, t=0.0)
        assert torch.allclose(cos, tables({}, 100, 100)[0], atol=1e-7)
    else:
        assert same_as_unchanged({"a": zero["a"]}, t=0.0, grid=(100, 100))


def test_imax():
    rows, cols, text = 80, 97, 512
    s = math.sqrt(rows * cols / 64**2)
    score = math.sqrt(math.log(rows * cols + text, 4608))
    positions = np.zeros((text + rows * cols, 3))
    positions[text:, 1], positions[text:, 2] = np.divmod(np.arange(rows * cols), cols)
    angles = np.concatenate(
        [
            positions[:, axis, None]
            * np.array([max((10 * THETA) ** (-2 * i / d), omega(i, d) / s) for i in range(d // 2)])
            for axis, d in enumerate(AXES_DIM)
        ],
        1,
    )
    for side, factor in (("keys", 1), ("queries", score)):
        cos, sin = tables({"a": {"op": "imax"}}, rows, cols, text, side=side)
        assert np.abs(cos.numpy() - factor * np.cos(angles)).max() <= 1e-6
        assert np.abs(sin.numpy() - factor * np.sin(angles)).max() <= 1e-6


def test_the_extent_is_that_of_the_edited_image_ids():
    """Twice the distances are an image of almost twice the size; text far away does not count."""
    wide = {"a": {"op": "scale", "factor": 2}, "b": {"op": "ntk"}}
    explicit = {"a": {"op": "scale", "factor": 2}, "b": {"op": "ntk", "factor": [127 / 64, 95 / 64]}}
    assert all(torch.equal(a, b) for a, b in zip(tables(wide, 64, 48), tables(explicit, 64, 48), strict=True))
    away = {"a": {"op": "set", "value": [0, 500, 500], "tokens": "text"}, "b": {"op": "pi"}}
    plain = tables({"a": away["a"]}, 64, 64, TEXT)
    assert all(torch.equal(a, b) for a, b in zip(tables(away, 64, 64, TEXT), plain, strict=True))
    early = {"b": {"op": "ntk"}, "a": {"op": "scale", "factor": 2}}  # measured before the image grows
    assert torch.equal(tables(early, 64, 48)[0], tables({"a": early["a"]}, 64, 48)[0])


def waves_of(edits, t=1.0, **where):
    context = sequence(grid=GRID, text=TEXT, double=2, single=2, heads=4, steps=10, trained=(7, 5))
    program = Program.from_config({str(i): edit for i, edit in enumerate(edits)})
    return compile_programs([program], context).waves(t, **where), unchanged(context)


def test_theta_band_and_gain():
    (frequency, gain, _), own = waves_of([{"op": "theta", "value": 500}])
    assert torch.allclose(frequency[0, 8:36], torch.tensor([500 ** (-2 * i / 56) for i in range(28)]).double())
    assert (gain == 1).all()

    (frequency, _, _), own = waves_of([{"op": "band", "pairs": "0-3", "rule": "drop", "axes": "row"}])
    expected = own.frequency.clone()
    expected[0, 8:12] = 0
    assert torch.equal(frequency, expected)
    (frequency, _, _), _ = waves_of([{"op": "band", "periods": [8, 40]}])
    period = 2 * math.pi / own.frequency
    assert torch.equal(frequency, torch.where((period >= 8) & (period <= 40), own.frequency, 0.0))

    (_, gain, _), _ = waves_of([{"op": "gain", "factor": 1.3, "to": 0.7, "power": 2, "axes": "col"}])
    assert (gain[0, :36] == 1).all()
    assert torch.allclose(gain[0, 36:], torch.tensor([1.3 - 0.6 * (i / 27) ** 2 for i in range(28)]).double())
    (_, gain, _), _ = waves_of([{"op": "gain", "factor": 2, "pairs": [1]}])
    assert gain[0].nonzero()[:, 0].tolist() == list(range(64))
    assert (gain[0] == 2).nonzero()[:, 0].tolist() == [1, 9, 37]


def test_gain_on_keys_leaves_queries_alone():
    edit = {"op": "gain", "factor": 1.5, "side": "keys", "tokens": "image"}
    keys, queries = (tables({"a": edit}, 4, 5, TEXT, side=side) for side in ("keys", "queries"))
    own = tables({}, 4, 5, TEXT)
    assert torch.equal(queries[0], own[0])
    assert torch.equal(keys[0][:TEXT], own[0][:TEXT])
    assert torch.allclose(keys[0][TEXT:], 1.5 * own[0][TEXT:])


SOME = [
    {"op": "pi", "factor": 2},
    {"op": "ntk"},
    {"op": "yarn"},
    {"op": "dype"},
    {"op": "riflex"},
    {"op": "imax"},
    {"op": "theta", "value": 300},
    {"op": "band", "pairs": [0, 2], "rule": "drop"},
    {"op": "gain", "factor": 1.2, "to": 0.8},
    {"op": "pi", "tokens": "text", "factor": 3},
    {"op": "scale", "factor": 1.5},
    {"op": "mirror"},
]
COMMUTING = [edit for edit in SOME if edit["op"] in ("pi", "ntk", "yarn", "dype", "gain")]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SOME), st.floats(0, 1), st.sampled_from([1.0, 0.6, 0.2]))
def test_strength_interpolates(edit, s, t):
    whole, none = (tables_waves([e] if e else [], t) for e in (edit, None))
    some = tables_waves([{**edit, "strength": s}], t)
    for a, b, c in zip(whole, none, some, strict=True):
        assert torch.allclose(c, b + s * (a - b), atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(tables_waves([{**edit, "strength": 0}], t), none, strict=True))


def tables_waves(edits, t):
    return waves_of(edits, t=t)[0]


@settings(deadline=None, max_examples=30)
@given(st.permutations(COMMUTING), st.sampled_from([1.0, 0.3]))
def test_methods_that_multiply_commute(edits, t):
    for a, b in zip(tables_waves(edits, t), tables_waves(COMMUTING, t), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(SOME), max_size=4))
def test_round_trip_and_description(edits):
    program = Program.from_config({str(i): edit for i, edit in enumerate(edits)})
    assert Program.from_config(program.to_config()) == program
    assert Program.from_config(program.to_config()).digest == program.digest
    assert all(edit["op"] in program.describe() for edit in edits)


def test_a_band_that_is_kept_and_dropped_leaves_nothing():
    (frequency, _, _), _ = waves_of([{"op": "band", "pairs": "0-3"}, {"op": "band", "pairs": "0-3", "rule": "drop"}])
    assert (frequency == 0).all()


@pytest.mark.parametrize("where", [{"axes": "row"}, {"tokens": "text"}, {"heads": [1]}, {"blocks": [2]}])
def test_where_an_edit_acts(where):
    edit = {"op": "pi", "factor": 2, **where}
    (frequency, _, _), own = waves_of([edit], head=1, block=2)
    changed = (frequency != own.frequency).expand(TEXT + GRID[0] * GRID[1], -1)
    expected = torch.zeros_like(changed)
    expected[:, 8 : 36 if where.get("axes") == "row" else 64] = True
    if "tokens" in where:
        expected[TEXT:] = False
    assert torch.equal(changed, expected)
    if "heads" in where or "blocks" in where:
        (elsewhere, _, _), _ = waves_of([edit], head=0, block=1)
        assert torch.equal(elsewhere, own.frequency)


def test_tables_change_at_each_step_only_where_the_method_says_so():
    context = sequence(grid=(80, 80), text=TEXT, double=1, single=1, heads=2, steps=4)
    for edit, moves in (({"op": "dype"}, True), ({"op": "yarn"}, False)):
        compiled = compile_programs([Program.from_config({"a": edit})], context)
        first, second = compiled.at(1.0), compiled.at(0.75)
        assert (first is not second) == moves
        assert compiled.at(0.75) is second


def test_a_batch_has_the_table_of_each_program():
    context = sequence(grid=(80, 70), text=TEXT, double=1, single=1, heads=2, steps=4)
    programs = [Program.from_config({"a": edit}) for edit in SOME[:8]] + [Program()]

    def sides(rotary):
        return (rotary, rotary) if hasattr(rotary, "cos") else rotary[1]

    together = sides(compile_programs(programs, context).at(0.5).rotary)
    for b, program in enumerate(programs):
        alone = sides(compile_programs([program], context).at(0.5).rotary)
        for whole, part in zip(together, alone, strict=True):
            for x, y in zip(whole, part, strict=True):
                assert torch.equal(x[min(b, len(x) - 1)], y[0])


def test_an_edit_that_changes_nothing_shares_the_models_table():
    context = sequence(grid=(30, 30), text=TEXT, double=1, single=1)
    programs = [
        Program(),
        *(Program.from_config({"a": {"op": name}}) for name in ("pi", "ntk", "yarn", "dype", "imax")),
    ]
    rotary = compile_programs(programs, context).at(1.0).rotary
    assert rotary.cos.shape[0] == 1


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "dype"])
def test_differentiable_in_factors_and_ids(name):
    context = sequence(grid=(3, 4), text=1, axes_dim=(4, 6, 6), trained=(2, 2))
    ids = context.ids[0].double() + 0.1 * torch.rand(13, 3, generator=torch.Generator().manual_seed(0)).double()

    def frequencies_of(factor, positions):
        seen = spectrum(positions, context, None, 0.7)
        first = OPS[name].function(unchanged(context), seen, factor=factor)
        second = OPS[name].function(first, seen)
        return second.frequency, second.gain

    factor = torch.tensor([1.5, 1.3, 2.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frequencies_of, (factor, ids.clone().requires_grad_()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "pi", "factor": 0}, "a.factor: 0, expected numbers above 0"),
        ({"op": "theta"}, "a.value: missing"),
        ({"op": "theta", "value": 1}, "a.value: 1, expected a number above 1"),
        ({"op": "dype", "method": "yarm"}, "did you mean yarn"),
        ({"op": "band"}, "a.pairs: missing, band needs pairs or periods"),
        ({"op": "band", "pairs": [1], "periods": [1, 2]}, "a.periods: .* not both"),
        ({"op": "band", "pairs": [99]}, r"a.pairs: \[99\], none of this model's pairs: index 0-7, row 0-27, col 0-27"),
        ({"op": "band", "periods": [1, 2]}, r"a.periods: .* none of this model's pairs"),
        ({"op": "band", "periods": [3, 2]}, r"a.periods: .* low <= high"),
        ({"op": "riflex", "pair": 40}, "a.pair: 40, none of this model's pairs: row 0-27, col 0-27"),
        ({"op": "gain", "factor": -1}, "a.factor: -1"),
        ({"op": "gain", "factor": 1e38, "to": 1e38}, None),
    ],
)
def test_errors(edit, message):
    if message is None:
        tables({"a": edit}, 4, 4)
        return
    with pytest.raises(UserError, match=message):
        tables({"a": edit}, 4, 4)


def test_an_op_of_ones_own():
    @op("halved", acts_on="frequencies", tokens="all")
    def halved(waves, spectrum):
        """Halve every frequency."""
        return waves._replace(frequency=waves.frequency / 2)

    @op("wrong_shape", acts_on="frequencies", tokens="all")
    def wrong_shape(waves, spectrum):
        """A bug."""
        return waves._replace(frequency=waves.frequency[:, :2])

    try:
        assert torch.equal(
            tables({"a": {"op": "halved"}}, 9, 9)[0], tables({"a": {"op": "scale", "factor": 0.5}}, 9, 9)[0]
        )
        with pytest.raises(TypeError, match=r"op wrong_shape .* returned frequency"):
            tables({"a": {"op": "wrong_shape"}}, 4, 4)
    finally:
        del OPS["halved"], OPS["wrong_shape"]


def test_riflex_needs_a_length_on_the_index():
    (frequency, _, _), own = waves_of([{"op": "riflex", "axes": "all", "length": 100}])
    assert torch.equal(frequency[0, :8], own.frequency[0, :8])
    assert int((frequency != own.frequency).sum()) == 2


def test_the_trained_extent_is_the_models():
    """The embedded model was trained on 16 × 16 tokens: 24 × 16 are 1.5 times its rows."""
    row = find_row("tiny")
    pipe = pipeline_without_weights(row, stored(row), None, torch.device("cpu"))
    context = pipe.context(None, 24, (24, 16), (1.0, 0.0))
    assert (context.trained, context.trained_text) == ((16, 16), 24)
    waves = compile_programs([Program.from_config({"a": {"op": "pi"}})], context).waves()
    index, rows = (width // 2 for width in context.axes_dim[:2])
    ratio = (waves.frequency / unchanged(context).frequency)[0]
    assert torch.allclose(ratio[index : index + rows], torch.tensor(1 / 1.5).double())
    assert (ratio[:index] == 1).all()
    assert (ratio[index + rows :] == 1).all()
    assert isinstance(waves, Waves)
