"""Every op on a small grid, against results computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.model.groups import attend_in_groups
from fluxlab.model.rope import apply_rotary
from fluxlab.positions import OPS, Context, Layout, Program, attention_ops, compile_programs, ops

LAYOUT = Layout(text=2, grid=(2, 3))
TEXT = [(0, 0, 0), (0, 0, 0)]
GRID = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2)]


def context(layout=LAYOUT, dtype=torch.float32, **more) -> Context:
    ids = [(0, 0, 0)] * layout.text
    for k, (rows, cols) in enumerate(layout.grids):
        ids += [(k, r, c) for r in range(rows) for c in range(cols)]
    sizes = {"axes_dim": (4, 14, 14), "theta": 10000, "double": 2, "single": 2, "heads": 2}
    return Context(torch.tensor([ids], dtype=dtype), layout, **{**sizes, **more})


def edited(edit: dict, layout=LAYOUT, side="queries", **more) -> list[tuple]:
    """Return the ids after a program of one edit."""
    ids = compile_programs([Program.from_config({"a": edit})], context(layout, **more)).ids(side=side)
    return [tuple(round(x, 5) + 0.0 for x in row) for row in ids.tolist()]


def image(edit: dict, **more) -> list[tuple]:
    ids = edited(edit, **more)
    assert ids[:2] == TEXT, "text ids changed"
    return ids[2:]


BY_HAND = {
    "zero": ({}, [(0, 0, 0)] * 6),
    "zero_rows": ({"op": "zero", "axes": "row"}, [(0, 0, c) for _, _, c in GRID]),
    "scale": ({"factor": 2}, [(0, 0, 0), (0, 0, 2), (0, 0, 4), (0, 2, 0), (0, 2, 2), (0, 2, 4)]),
    "scale_axes": ({"op": "scale", "factor": {"col": 0.5}}, [(0, r, c / 2) for _, r, c in GRID]),
    "scale_pair": ({"op": "scale", "factor": [3, 1]}, [(0, 3 * r, c) for _, r, c in GRID]),
    "scale_centre": (
        {"op": "scale", "factor": 2, "origin": "centre"},
        [(0, -0.5, -1), (0, -0.5, 1), (0, -0.5, 3), (0, 1.5, -1), (0, 1.5, 1), (0, 1.5, 3)],
    ),
    "scale_point": ({"op": "scale", "factor": 0, "origin": [0, 1, 2]}, [(0, 1, 2)] * 6),
    "scale_ominicontrol": (
        {"op": "scale", "factor": 2, "origin": [-0.5, -0.5]},
        [(0, 2 * r + 0.5, 2 * c + 0.5) for _, r, c in GRID],
    ),
    "offset": ({"by": [3, -2.5, 7]}, [(3, r - 2.5, c + 7) for _, r, c in GRID]),
    "offset_one": ({"op": "offset", "by": 1}, [(1, r + 1, c + 1) for _, r, c in GRID]),
    "set": ({"value": [1, 4, 4]}, [(1, 4, 4)] * 6),
    "set_index": ({"op": "set", "value": 1, "axes": "index"}, [(1, r, c) for _, r, c in GRID]),
    "set_mapping": ({"op": "set", "value": {"index": 1}}, [(1, r, c) for _, r, c in GRID]),
    "shuffle": ({"seed": 0}, None),  # below
    "mirror": ({}, [(0, 0, 2), (0, 0, 1), (0, 0, 0), (0, 1, 2), (0, 1, 1), (0, 1, 0)]),
    "mirror_row": ({"op": "mirror", "axis": "row"}, [(0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 0, 0), (0, 0, 1), (0, 0, 2)]),
    "mirror_axes": ({"op": "mirror", "axes": ["row", "col"]}, GRID[::-1]),
    "transpose": ({}, [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 1, 1), (0, 2, 1)]),
    # counter-clockwise: the left column becomes the bottom row
    "rotate": (
        {"degrees": 90},
        [(0, 1.5, 0.5), (0, 0.5, 0.5), (0, -0.5, 0.5), (0, 1.5, 1.5), (0, 0.5, 1.5), (0, -0.5, 1.5)],
    ),
    "rotate_half": ({"op": "rotate", "degrees": 180}, GRID[::-1]),
    "rotate_corner": (
        {"op": "rotate", "degrees": -90, "about": "corner"},
        [(0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, -1), (0, 1, -1), (0, 2, -1)],
    ),
    "warp": (
        {"field": [[[0, 0], [0, 2]], [[1, 0], [1, 2]]]},
        [(0, 0, 0), (0, 0, 2), (0, 0, 4), (0, 2, 0), (0, 2, 2), (0, 2, 4)],
    ),
    "warp_whole": ({"op": "warp", "field": [[[0.5, -1]]]}, [(0, r + 0.5, c - 1) for _, r, c in GRID]),
    "restart": ({"parts": {"col": 2}}, [(0, r, c % 2) for _, r, c in GRID]),  # bands of ⌈3 / 2⌉ columns
    "restart_both": ({"op": "restart", "parts": [2, 3]}, [(0, 0, 0)] * 6),
    "restart_whole": ({"op": "restart", "parts": 1}, GRID),
    "jitter": ({"std": 0}, GRID),
    "quantize": ({"to": 2}, [(0, 0, 0), (0, 0, 0), (0, 0, 2), (0, 0, 0), (0, 0, 0), (0, 0, 2)]),  # half to even
    "centre": ({}, [(0, -1, -2), (0, -1, -1), (0, -1, 0), (0, 0, -2), (0, 0, -1), (0, 0, 0)]),
    "relocate": ({"to": [5, 6]}, [(0, 5, 6)] * 6),
    "relocate_index": ({"op": "relocate", "to": [2, 5, 6]}, [(2, 5, 6)] * 6),
    "relocate_box": (
        {"op": "relocate", "to": {"box": [0, 0, 1, 1], "unit": "fraction"}},
        GRID,  # the box is the image itself, so nothing moves
    ),
    "relocate_half": (
        {"op": "relocate", "to": {"box": [0, 0, 1, 1.5]}},
        [(0, r, c) for r in (-0.25, 0.25) for c in (-0.25, 0.25, 0.75)],
    ),
    "relocate_box_point": ({"op": "relocate", "to": {"box": [0, 1, 2, 3]}, "spread": "point"}, [(0, 0.5, 1.5)] * 6),
    "relocate_box_line": (
        {"op": "relocate", "to": {"box": [0, 0, 2, 3]}, "spread": "line"},
        [(0, 0.5, c / 2 - 0.25) for c in range(6)],
    ),
    "relocate_line": (
        {"op": "relocate", "to": {"line": [[0, 0], [10, 5]]}},
        [(0, 2 * i, i) for i in range(6)],
    ),
    "relocate_pixels": ({"op": "relocate", "to": {"point": [8, 24], "unit": "pixels"}}, [(0, 0, 1)] * 6),
    "relocate_mask": (
        {"op": "relocate", "to": {"mask": ["#..", "..#"]}},
        [(0, 0, 0)] * 3 + [(0, 1, 2)] * 3,
    ),
    "relocate_mask_point": ({"op": "relocate", "to": {"mask": ["#..", "..#"]}, "spread": "point"}, [(0, 0.5, 1)] * 6),
}


@pytest.mark.parametrize("name", [name for name, (_, result) in BY_HAND.items() if result is not None])
def test_by_hand(name):
    edit, result = BY_HAND[name]
    assert image({"op": name, **edit}) == [tuple(map(float, row)) for row in result]


def test_every_op_has_a_test():
    shown = {edit.get("op", name) for name, (edit, _) in BY_HAND.items()}
    own_files = ("frequencies", "activations", "size", "windows", "scores", "heads", "text")
    elsewhere = {name for name, op in OPS.items() if op.acts_on in own_files}
    assert shown | elsewhere | {"layout", "text_line", "mask", "temperature", "drop", "place"} >= set(OPS)


def test_shuffle_exchanges_positions():
    shuffled = [image({"op": "shuffle", "seed": seed}) for seed in (0, 0, 1)]
    assert sorted(shuffled[0]) == sorted(tuple(map(float, row)) for row in GRID)
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert image({"op": "shuffle", "axes": "col"})[0][1] == 0  # rows stay


def test_jitter_depends_on_the_seed():
    a, b, c = (image({"op": "jitter", "std": [0, 0.5, 2], "seed": seed}) for seed in (3, 3, 4))
    drawn = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([0, 0.5, 2])
    assert a == b != c
    assert torch.allclose(torch.tensor(a), torch.tensor(GRID) + drawn, atol=1e-5)


def test_quantize_rounds_to_bfloat16():
    ids = torch.arange(512.0)[:, None].expand(-1, 3)
    rounded = ops.quantize(ids, None, "bfloat16")
    assert len(rounded[:, 0].unique()) == 385
    assert torch.equal(rounded[:257], ids[:257])


def test_text_line():
    assert edited({"op": "text_line", "axis": "row"})[:2] == [(0, 0, 0), (0, 1, 0)]
    assert edited({"op": "text_line", "axis": 0, "start": 1})[:2] == [(1, 0, 0), (2, 0, 0)]
    assert edited({"op": "text_line", "axis": "col"})[2:] == [tuple(map(float, row)) for row in GRID]


def test_text_is_relocated():
    """The second experiment of the article, written in two ways."""
    for edit in ({"op": "set", "value": [0, 4, 4]}, {"op": "relocate", "to": [4, 4]}):
        assert edited({**edit, "tokens": "text"})[:2] == [(0, 4, 4)] * 2
    two = {"op": "relocate", "tokens": "text", "to": {"box": [0, 1, 2, 2]}}
    assert edited(two)[:2] == [(0, 0, 1), (0, 1, 1)]


LAYOUTS = {
    # of 2 text tokens, a 2 × 3 image and a 1 × 2 reference, as the models' own code numbers them
    "flux": ([(0, 0, 0)] * 2, GRID, [(1, 0, 0), (1, 0, 1)]),
    "flux2": ([(0, 0, 0), (1, 0, 0)], GRID, [(10, 0, 0), (10, 0, 1)]),
    "lumina2": ([(0, 0, 0), (1, 0, 0)], [(2, r, c) for _, r, c in GRID], [(2, 0, 0), (2, 0, 1)]),
    "z_image": ([(1, 0, 0), (2, 0, 0)], [(3, r, c) for _, r, c in GRID], [(3, 0, 0), (3, 0, 1)]),
    "qwen": ([(1, 1, 1), (2, 2, 2)], [(0, r - 1, c - 2) for _, r, c in GRID], [(1, -1, -1), (1, -1, 0)]),
}


@pytest.mark.parametrize("like", LAYOUTS)
def test_layouts_of_other_models(like):
    layout = Layout(text=2, grid=(2, 3), references=((1, 2),))
    moved = edited({"op": "layout", "like": like}, layout, "keys")
    assert moved == [tuple(map(float, row)) for part in LAYOUTS[like] for row in part]
    scattered = compile_programs(
        [Program.from_config({"a": {"op": "jitter", "std": 9}, "b": {"op": "layout", "like": like}})], context(layout)
    )
    assert [tuple(row) for row in scattered.ids().tolist()] == moved  # whatever the ids were before


@pytest.mark.parametrize(("like", "other"), [("flux1", "flux"), ("lumina", "lumina2"), ("zimage", "z_image")])
def test_other_spellings_of_layouts(like, other):
    """They are one program: the digest is that of the name which stores have."""
    first, second = (Program.from_config({"a": {"op": "layout", "like": name}}) for name in (like, other))
    assert first == second
    assert first.digest == second.digest
    assert first.to_config()["a"]["like"] == other


def test_a_layout_on_another_axis():
    assert edited({"op": "layout", "like": "z_image", "axis": "col"})[:2] == [(0, 0, 1), (0, 0, 2)]
    assert edited({"op": "layout", "like": "flux2", "tokens": "text"})[2:] == [tuple(map(float, row)) for row in GRID]


def test_centre_matches_qwen_image():
    layout = Layout(text=2, grid=(2, 3), references=((1, 2),))
    ids = edited({"op": "centre", "tokens": "all"}, layout)
    assert ids[:2] == [(1, 1, 1), (2, 2, 2)]
    assert ids[2:5] == [(0, -1, -2), (0, -1, -1), (0, -1, 0)]
    assert ids[8:] == [(1, -1, -1), (1, -1, 0)]


def test_drop_removes_the_rotation():
    """cos is 1 and sin is 0 on the dropped axis, even if a later edit changes its ids."""
    program = {"a": {"op": "drop", "axes": "row", "side": "keys"}, "b": {"op": "offset", "by": 5, "tokens": "all"}}
    (queries, keys), *_ = compile_programs([Program.from_config(program)], context()).at(1.0).rotary
    assert (keys.cos[0, 0, 2:, 2:9] == 1).all()
    assert (keys.sin[0, 0, 2:, 2:9] == 0).all()
    assert torch.equal(keys.cos[0, 0, :, 9:], queries.cos[0, 0, :, 9:])
    assert torch.equal(keys.cos[0, 0, :2], queries.cos[0, 0, :2])  # text keeps its rotation
    half = {"a": {"op": "drop", "strength": 0.5}}
    assert image(half["a"]) == [(0, r / 2, c / 2) for _, r, c in GRID]


def test_temperature_scales_the_queries():
    edit = {"op": "temperature", "factor": 3, "tokens": {"indices": [1, 2]}}
    (queries, keys), *_ = compile_programs([Program.from_config({"a": edit})], context()).at(1.0).rotary
    expected = torch.ones(8)
    expected[3:5] = 3
    assert torch.allclose(queries.cos, keys.cos * expected[:, None])
    assert torch.allclose(queries.sin, keys.sin * expected[:, None])


def test_temperature_of_keys_that_some_queries_see():
    """TACA: the scores of image queries with text keys are multiplied, in a model's attention too."""
    edit = {"op": "temperature", "factor": 1.7, "tokens": "text", "side": "keys", "seen_by": "image"}
    compiled = compile_programs([Program.from_config({"a": edit})], context())
    queries, keys = compiled.at(1.0).rotary[0]
    own = compile_programs([Program()], context()).at(1.0).rotary
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 32)
    scores = apply_rotary(q, own) @ apply_rotary(k, own).mT / math.sqrt(32)
    scores[..., 2:, :2] *= 1.7
    expected = scores.softmax(-1) @ v
    assert torch.allclose(attend_in_groups(apply_rotary(q, queries), k, v, keys), expected, atol=1e-6)
    everywhere = compile_programs([Program.from_config({"a": {**edit, "seen_by": None}})], context()).at(1.0)
    assert torch.equal(everywhere.rotary[0][0].cos, own.cos)
    assert torch.allclose(everywhere.rotary[0][1].cos[0, 0, :2], 1.7 * own.cos[0, 0, :2])
    assert compiled.scales().tolist() == [1] * 8  # of queries


def test_mask_by_hand():
    no, ok = True, False
    tokens = torch.tensor([True, True, False, False])
    to = torch.tensor([False, False, False, True])
    assert attention_ops.mask(tokens, to).tolist() == [[ok, ok, ok, no]] * 2 + [[ok] * 4] * 2
    assert attention_ops.mask(tokens, to, "only").tolist() == [[no, no, no, ok]] * 2 + [[ok] * 4] * 2
    both = attention_ops.mask(tokens, to, both_ways=True).tolist()
    assert both == [[ok, ok, ok, no]] * 2 + [[ok] * 4, [no, no, ok, ok]]


def test_mask_strength_multiplies_the_odds():
    bias = [
        compile_programs(
            [Program.from_config({"a": {"op": "mask", "from": "image", "to": "text", "strength": s}})], context()
        )
        .at(1.0)
        .mask
        for s in (1, 0.75, 0)
    ]
    assert torch.isneginf(bias[0][0][0, 0, 2:, :2]).all()
    assert (bias[0][0][0, 0, :2] == 0).all()
    assert (bias[0][0][0, 0, :, 2:] == 0).all()
    assert torch.allclose(bias[1][0][0, 0, 2:, :2], torch.tensor(math.log(0.25)))
    assert bias[2] is None


numbers = st.floats(-50, 50, allow_nan=False, width=32)
factors = st.floats(0.25, 4, allow_nan=False, width=32)
axes3 = st.lists(numbers, min_size=3, max_size=3)


def run(edits: list[dict], ids: torch.Tensor | None = None) -> torch.Tensor:
    ctx = context(dtype=torch.float64)
    if ids is not None:
        ctx = Context(**{**vars(ctx), "ids": ids})
    return compile_programs([Program.from_config({str(i): edit for i, edit in enumerate(edits)})], ctx).ids()


SOME = [
    {"op": "scale", "factor": 1.7, "origin": "centre"},
    {"op": "offset", "by": [1, -2, 3]},
    {"op": "rotate", "degrees": 33},
    {"op": "mirror"},
    {"op": "transpose"},
    {"op": "shuffle", "seed": 5},
    {"op": "quantize", "to": 0.5},
    {"op": "restart", "parts": [1, 2]},
    {"op": "jitter", "std": 0.3},
    {"op": "zero", "axes": "col"},
    {"op": "relocate", "to": {"box": [0, 0, 1, 1]}},
]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(SOME), max_size=4), st.integers(0, 4))
def test_order_of_composition(edits, cut):
    """A program equals its first part followed by its second part."""
    assert torch.equal(run(edits), run(edits[cut:], run(edits[:cut])[None]))


@settings(deadline=None, max_examples=40)
@given(axes3, axes3)
def test_offsets_add_up(a, b):
    assert torch.allclose(
        run([{"op": "offset", "by": a}, {"op": "offset", "by": b}]),
        run([{"op": "offset", "by": [x + y for x, y in zip(a, b, strict=True)]}]),
    )


def test_order_matters():
    edits = [{"op": "scale", "factor": 2}, {"op": "offset", "by": 1}]
    assert not torch.equal(run(edits), run(edits[::-1]))


@settings(deadline=None, max_examples=40)
@given(factors, axes3, st.floats(-720, 720, width=32), st.sampled_from(["corner", "centre"]))
def test_inverse_pairs(factor, by, degrees, origin):
    pairs = [
        [{"op": "scale", "factor": f, "origin": origin} for f in (factor, 1 / factor)],
        [{"op": "offset", "by": b} for b in (by, [-x for x in by])],
        [{"op": "rotate", "degrees": d, "about": origin} for d in (degrees, -degrees)],
        [{"op": "mirror", "axis": "row"}] * 2,
        [{"op": "transpose"}] * 2,
    ]
    if (
        origin == "centre"
    ):  # turned about its centre a rectangle's extent has another middle: only corner and points invert
        pairs[2] = [{"op": "rotate", "degrees": d, "about": [0.5, 1]} for d in (degrees, -degrees)]
    for pair in pairs:
        assert torch.allclose(run(pair), run([]), atol=1e-9), pair


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SOME), st.floats(0, 1))
def test_strength_interpolates(edit, s):
    whole, none, some = run([edit]), run([]), run([{**edit, "strength": s}])
    assert torch.allclose(some, none + s * (whole - none), atol=1e-12)
    assert torch.equal(run([{**edit, "strength": 0}]), none)
    assert torch.equal(run([{**edit, "strength": 1}]), whole)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (lambda ids, x: ops.scale(ids, None, x, "centre"), torch.tensor([1.5, 0.7, 2.0])),
        (lambda ids, x: ops.offset(ids, None, x), torch.tensor([1.0, 2.0, -3.0])),
        (lambda ids, x: ops.set_to(ids, None, x) + ids, torch.tensor([1.0, 2.0, -3.0])),
        (lambda ids, x: ops.rotate(ids, None, x), torch.tensor(31.0)),
        (lambda ids, x: ops.restart(ids * x, None, [1, 2]), torch.tensor([1.0, 1.0, 1.0])),
        (lambda ids, x: ops.jitter(ids, None, x), torch.tensor([0.1, 0.2, 0.3])),
        (lambda ids, x: ops.warp(ids, LAYOUT.scope(torch.arange(2, 8)), x), torch.randn(3, 2, 2)),
    ],
)
def test_differentiable_in_ids_and_arguments(function, argument):
    torch.manual_seed(0)
    ids = (torch.tensor(GRID) + 0.1 + 0.2 * torch.rand(6, 3)).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (ids, argument.double().requires_grad_()))


def test_ops_take_plain_values_in_python():
    ids = torch.tensor(GRID, dtype=torch.float32)
    assert torch.equal(ops.scale(ids, None, 2), 2 * ids)
    assert torch.equal(ops.offset(ids, None, [0, 1, 2]), ids + torch.tensor([0, 1, 2]))
    assert torch.equal(ops.relocate(ids, LAYOUT.scope(torch.arange(2, 8)), [4, 4])[:, 1:], torch.full((6, 2), 4.0))
