"""Notes on programs: each finding by an example and a counterexample, and against the tables themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.positions import Program, compile_programs, lint
from fluxlab.positions.at_step import sequence

SHARE = "share their position with another"
BELOW, ABOVE, SPAN = "a spacing of 1", "above π", "positions span"


def context(**more):
    sizes = {"grid": (8, 8), "text": 6, "double": 1, "single": 2, "heads": 2, "steps": 4, "trained": (8, 8)}
    return sequence(**{**sizes, "prompt": "a cat says hello", **more})


def notes(*edits, **more):
    program = Program.from_config(dict(zip("abcdefgh", edits, strict=False)))
    return [str(note) for note in lint(program, context(**more))]


def scaled(factor, **more):
    return {"op": "scale", "factor": factor, **more}


def by(n, **more):
    return {"op": "offset", "by": n, **more}


REGION = {"op": "regions", "prompts": ["a fox"], "where": [{"box": [0, 0, 4, 8]}]}

FOUND = [
    ([{"op": "zero"}], {}, f"64 of 64 image tokens {SHARE}"),
    ([{"op": "zero", "tokens": {"indices": [0, 1, 2]}}], {}, f"3 of 64 image tokens {SHARE}"),
    ([by(299), scaled(0.9)], {}, "image tokens share their position in bfloat16"),
    ([scaled(0.5)], {}, f"neighbouring image tokens are down to 0.5 apart; models are trained with {BELOW}"),
    ([scaled(3.5)], {}, f"neighbouring image tokens are up to 3.5 apart, {ABOVE}"),
    ([scaled(2)], {}, "positions span 15 × 15 tokens, the model was trained on 8 × 8"),
    ([by(9)], {}, "positions span 17 × 17 tokens"),  # from the text, which stays
    ([], {"grid": (9, 8)}, "positions span 9 × 8 tokens"),
    ([scaled(1)], {}, "a: changes nothing: its factor is 1"),
    ([{"op": "pi", "factor": 1}], {}, "a: changes nothing: its factor is 1"),
    ([{"op": "zero", "tokens": "text"}], {}, "a: changes nothing"),
    ([{"op": "gain", "factor": 1}], {}, "a: changes nothing: its factor is 1"),
    ([{"op": "temperature", "factor": 1}], {}, "a: changes nothing: its factor is 1"),
    ([by(1, strength=[[0.5, 1], [0.4, 0]], steps=[3])], {}, "a: changes nothing: its strength is 0 at every step"),
    ([{"op": "dype"}], {}, "a: changes nothing: its factor is 1, since the image is not larger than the 8 × 8 tokens"),
    ([{"op": "imax"}], {}, "a: changes nothing: its factor is 1, since the image is not larger"),
    ([{"op": "riflex"}], {}, "a: changes nothing: its factor is 1, since the image is not larger"),
    ([{"op": "windows"}], {}, "a: changes nothing: its size is 1, since the image is not larger than the 8 × 8 tokens"),
    ([{"op": "distance", "factor": 1}], {}, "a: changes nothing: its factor is 1"),
    (
        [{"op": "distance", "factor": 2, "beyond": [7, 7]}],
        {},
        "a: changes nothing: no query that it selects is that far",
    ),
    ([scaled(0.5), {"op": "distance", "factor": 2}], {}, "b: changes nothing: no query that it selects is that far"),
    ([{"op": "distance", "factor": 2, "strength": 0}], {}, "a: changes nothing: its strength is 0"),
    ([{"op": "mask", "from": "image", "to": "text", "strength": 0}], {}, "a: changes nothing: its strength is 0"),
    ([{"op": "ablate", "what": "mlp", "strength": 0}], {}, "a: changes nothing: its strength is 0"),
    ([REGION | {"strength": 0}], {}, "a: changes nothing: its strength is 0"),
    ([REGION | {"where": [{"mask": ["#"]}]}], {}, "a.where[0]: selects all 64 image tokens"),
    ([{"op": "distance", "factor": 2, "to": {"mask": ["#"]}}], {}, "a.to: selects all 64 image tokens"),
    ([{"op": "concentrate", "factor": 1, "to": 1}], {}, "a: changes nothing: its factor is 1"),
    ([{"op": "mask", "from": "text", "to": "all", "rule": "only"}], {}, "a: changes nothing: no query selected"),
    ([by(1), {"op": "set", "value": [0, 2, 2]}], {}, "a: has no effect: a later edit overwrites what it changes"),
    ([by(3), by(-3)], {}, "a: has no effect: b undoes it"),
    ([{"op": "mirror"}, {"op": "temperature", "factor": 2}, {"op": "mirror"}], {}, "a: has no effect: c undoes it"),
    ([{"op": "ntk"}, scaled(2)], {}, "a: measures the image before b changes its extent; write it last"),
    ([by(1, tokens={"box": [0, 0, 1, 1], "unit": "fraction"})], {}, "a.tokens: selects all 64 image tokens"),
    ([by(1, tokens={"indices": [0, 1, 2, 3, 4, 5], "of": "text"})], {}, "a.tokens: selects all 6 text tokens"),
    ([{"op": "mask", "from": {"mask": ["#"]}, "to": "text"}], {}, "a.from: selects all 64 image tokens"),
    ([by(1, side="keys", seen_by={"mask": ["##"]})], {}, "a.seen_by: selects all 64 image tokens"),
    ([by(1, steps={"sigma": [0, 1]})], {}, "a.steps: selects all 4 steps"),
    ([by(1, blocks="0-2")], {}, "a.blocks: selects all 3 blocks"),
    ([by(1, heads=[0, 1])], {}, "a.heads: selects all 2 heads"),
]


@pytest.mark.parametrize(("edits", "sizes", "expected"), FOUND)
def test_findings(edits, sizes, expected):
    found = notes(*edits, **sizes)
    assert any(expected in note for note in found), found


QUIET = [
    [],
    [{"op": "mirror"}],
    [{"op": "rotate", "degrees": 90}],
    [{"op": "set", "value": 1, "axes": "index"}],
    [{"op": "mask", "from": "image", "to": {"words": ["cat"]}}],
    [{"op": "temperature", "factor": 1.5, "tokens": {"words": ["hello"]}, "steps": [0, 1], "blocks": "double"}],
    [{"op": "relocate", "tokens": {"words": ["cat"]}, "to": [2, 3]}],
    [{"op": "gain", "factor": 1.2, "side": "keys"}],
    [REGION],
    [{"op": "distance", "factor": 2, "beyond": [6, 6]}],
    [{"op": "distance", "factor": 2, "beyond": [7, 6]}],
    [{"op": "mirror", "steps": [0]}, {"op": "mirror", "steps": [1]}],  # not undone: they never act together
]


@pytest.mark.parametrize("edits", QUIET)
def test_usual_programs_have_no_notes(edits):
    assert notes(*edits) == []


def test_factors_of_scores_and_windows_are_no_change_of_extent():
    assert notes({"op": "distance", "factor": 2}, {"op": "concentrate"}) == []
    (found,) = notes({"op": "ntk"}, {"op": "windows"}, grid=(16, 16))
    assert SHARE in found


def test_dropped_rotation_is_no_smaller_image():
    assert notes({"op": "ntk"}, {"op": "drop", "strength": 0.5}, grid=(12, 8)) == []


def test_a_prompt_without_padding_is_noted():
    assert notes(by(1, tokens="padding"), text=4) == ["a: changes nothing: this prompt has none of its tokens"]
    assert notes(by(1, tokens="padding")) == []


def test_a_larger_image_with_a_method_has_no_note():
    assert notes({"op": "ntk"}, grid=(12, 8)) == []
    assert notes({"op": "band", "periods": [0, 50]}, grid=(12, 8)) == []
    assert SPAN in notes({"op": "riflex", "length": 1}, grid=(12, 8))[-1]  # which raises a frequency


def test_extremes_of_steps_blocks_sides_and_queries_are_seen():
    for where in ({"steps": [3]}, {"blocks": [2]}, {"side": "keys"}, {"side": "keys", "seen_by": {"words": ["cat"]}}):
        assert any(SHARE in note for note in notes({"op": "zero", **where})), where
    fading = notes(scaled(9, strength={"from": 0, "to": 1}), steps=100)
    assert any("up to 8.92 apart" in note for note in fading)  # at the last step


SOME = [
    scaled(2),
    scaled(0.5),
    scaled(1),
    by([0, 1, -2]),
    by([0, -1, 2]),
    {"op": "mirror"},
    {"op": "mirror", "side": "keys", "heads": [0]},
    {"op": "zero", "axes": "row", "blocks": "single"},
    {"op": "set", "value": [0, 1, 1], "steps": [1, 2]},
    {"op": "ntk"},
    {"op": "pi", "factor": 2},
    {"op": "pi", "factor": 0.5},
    {"op": "drop", "strength": {"from": 1, "to": 0}},
    {"op": "temperature", "factor": 2},
    {"op": "zero", "side": "keys", "seen_by": "text"},
]


AXES = st.sampled_from([{}, {"axes_dim": (32,) * 4, "theta": 2000}])  # of FLUX.1, and of FLUX.2


def all_tables(edits, axes):
    ctx = context(**axes)
    compiled = compile_programs([Program.from_config({str(i): e for i, e in enumerate(edits)})], ctx)
    for t in ctx.sigmas[:-1]:
        rotary = compiled.at(t).rotary
        for queries, keys in [(rotary, rotary)] * 3 if hasattr(rotary, "cos") else rotary:
            ctx_tables = keys.tables if hasattr(keys, "tables") else (keys,)
            order = torch.cat(keys.queries).argsort() if hasattr(keys, "tables") else None
            sizes = [len(q) for q in keys.queries] if order is not None else [ctx.layout.tokens]
            heads = [table.cos.expand(-1, 2, -1, -1) for table in ctx_tables]
            seen = torch.cat([h[:, :, None].expand(-1, -1, n, -1, -1) for h, n in zip(heads, sizes, strict=True)], 2)
            yield queries.cos.expand(-1, 2, -1, -1), seen if order is None else seen[:, :, order]


def equal(a, b, axes):
    for one, other in zip(all_tables(a, axes), all_tables(b, axes), strict=True):
        if not all(torch.equal(x, y) for x, y in zip(one, other, strict=True)):
            return False
    return True


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(SOME), min_size=1, max_size=3), AXES)
def test_an_edit_is_noted_as_without_effect_exactly_if_the_tables_say_so(edits, axes):
    found = notes(*edits, **axes)
    for n, edit in enumerate(edits):
        noted = any(
            note.startswith(("abc"[n] + ": changes nothing", "abc"[n] + ": has no effect: a")) for note in found
        )
        assert noted == equal(edits, edits[:n] + edits[n + 1 :], axes), (edit, axes, found)
