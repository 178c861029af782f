"""Programs without a model: parsing, writing, hashing, selections, and the messages of errors."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fluxlab.positions
from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.positions import (
    OPS,
    Context,
    Layout,
    Program,
    Prompt,
    compile_programs,
    find_word,
    ops_table,
    where_table,
)
from fluxlab.positions.picked import example
from fluxlab.positions.registry import WHERE
from fluxlab.select.arguments import number
from fluxlab.select.tokens import parse_tokens, resolve_tokens
from fluxlab.select.where import parse_steps, parse_strength, resolve_steps, strength_at

SIZES = {"axes_dim": (4, 14, 14), "theta": 10000, "double": 2, "single": 3, "heads": 4}
CAT = "A cat on the mat, a red Cat says hello world"
WORDS = Prompt(CAT, (*((i, i + 1) if c.strip() else (0, 0) for i, c in enumerate(CAT)), (0, 0)))  # a token a letter


def context(layout: Layout | None = None, **more) -> Context:
    layout = layout or Layout(text=len(WORDS.spans), grid=(4, 4), references=((2, 2),))
    ids = torch.arange(layout.tokens * 3, dtype=torch.float32).reshape(1, -1, 3)
    return Context(ids, layout, **{**SIZES, "sigmas": (1.0, 0.9, 0.7, 0.4, 0.0), "prompts": [WORDS], **more})


def program(**edit) -> Program:
    return Program.from_config({"a": {"op": "zero", **edit}})


def selected(tokens, **more) -> list[int]:
    ctx = context(**more)
    return resolve_tokens(parse_tokens(tokens, "t"), ctx, 0, "t").tolist()


EVERYTHING = {
    "half": {"op": "scale", "factor": 0.5, "origin": [0, 1, 2], "tokens": ["text", {"words": ["cat#2"]}]},
    "keys": {
        "op": "drop",
        "axes": ["row", 2],
        "side": "keys",
        "blocks": {"double": "0-1", "single": [2]},
        "heads": "1-2",
    },
    "seen": {"op": "offset", "by": 1, "side": "keys", "seen_by": "text", "steps": {"sigma": [0.7, 1]}},
    "fade": {"op": "rotate", "degrees": 10, "strength": {"from": 1, "to": 0}, "steps": [0, "1-2"]},
    "box": {"op": "shuffle", "tokens": {"box": [0, 0, 0.5, 1], "unit": "fraction"}, "blocks": "double"},
    "mask": {"op": "mask", "from": {"mask": ["##", ".."]}, "to": {"indices": [0, 1], "of": "text"}, "rule": "only"},
    "move": {"op": "relocate", "tokens": "text", "to": {"line": [[0, 0], [3, 3]]}, "blocks": [0, "2-3"]},
    "warm": {"op": "temperature", "factor": 1.5, "strength": [[1, 0], [0.5, 1]]},
    "curve": {"op": "warp", "field": [[[0, 0], [1, 1]]], "tokens": {"reference": 0}},
}


def test_round_trip():
    whole = Program.from_config(EVERYTHING)
    again = Program.from_config(whole.to_config())
    assert again == whole
    assert again.digest == whole.digest
    assert again.to_config() == whole.to_config()
    assert OmegaConf.to_container(OmegaConf.create(whole.to_config())) == whole.to_config()  # plain values
    assert Program.from_config(OmegaConf.create(EVERYTHING)) == whole
    assert compile_programs([whole], context()).at(1.0)


def test_identity():
    for config in (None, {}, Program()):
        assert Program.from_config(config) == Program()
    assert Program().to_config() == {}
    assert Program().describe() == "identity"
    assert not Program()


SAME = [
    ({"op": "scale", "factor": 1}, {"factor": 1.0, "op": "scale"}),
    ({"op": "scale", "factor": 2}, {"op": "scale", "factor": [2, 2, 2], "origin": "corner"}),
    (
        {"op": "zero"},
        {
            "op": "zero",
            "tokens": "image",
            "axes": "all",
            "steps": "all",
            "blocks": "all",
            "heads": "all",
            "side": "both",
            "strength": 1.0,
            "seen_by": None,
        },
    ),
    ({"op": "zero", "axes": [1, 2]}, {"op": "zero", "axes": ["col", "row"]}),
    ({"op": "zero", "steps": [0, 1, 2]}, {"op": "zero", "steps": "0-2"}),
    ({"op": "zero", "blocks": "1, 3-4"}, {"op": "zero", "blocks": [4, 3, 1]}),
    ({"op": "zero", "strength": {"from": 1, "to": 0}}, {"op": "zero", "strength": [[0, 0], [1, 1]]}),
    ({"op": "offset", "by": {"row": 3}}, {"op": "offset", "by": [None, 3, None]}),
    ({"op": "relocate", "to": [1, 2]}, {"op": "relocate", "to": {"point": [1.0, 2], "unit": "tokens"}, "spread": None}),
    ({"op": "mask", "from": "text", "to": "image"}, {"op": "mask", "to": "image", "from": ["text"], "rule": "block"}),
    ({"op": "offset", "by": 0}, {"op": "offset", "by": -0.0}),
]


@pytest.mark.parametrize(("spelling", "other"), SAME)
def test_spelling_does_not_change_the_digest(spelling, other):
    a, b = Program.from_config({"a": spelling}), Program.from_config({"other": other}, "variants.x")
    assert a.digest == b.digest
    assert a == b
    assert hash(a) == hash(b)


def test_meaning_changes_the_digest():
    edits = [
        {"op": "scale", "factor": 2},
        {"op": "scale", "factor": 2.0000001},
        {"op": "scale", "factor": 2, "origin": "centre"},
        {"op": "scale", "factor": 2, "axes": "row"},
        {"op": "scale", "factor": 2, "tokens": "text"},
        {"op": "scale", "factor": 2, "blocks": [0]},
        {"op": "scale", "factor": 2, "blocks": {"single": [0]}},
        {"op": "scale", "factor": 2, "side": "keys"},
        {"op": "scale", "factor": 2, "side": "keys", "seen_by": "text"},
        {"op": "scale", "factor": 2, "strength": 0.5},
        {"op": "scale", "factor": 2, "steps": {"fraction": [0, 0.5]}},
        {"op": "scale", "factor": 2, "steps": {"sigma": [0, 0.5]}},
        {"op": "offset", "by": 2},
    ]
    programs = [Program.from_config({"a": edit}) for edit in edits]
    programs += [
        Program.from_config({"a": edits[0], "b": edits[-1]}),
        Program.from_config({"b": edits[-1], "a": edits[0]}),
    ]
    assert len({p.digest for p in programs}) == len(programs)
    assert len({p.describe() for p in programs}) == len(programs)


def test_digests_are_stable():
    """Cells are stored by digest, so a change here needs a new SCHEMA."""
    assert Program().digest[:16] == "d404011c4cd31390"
    assert Program.from_config({"a": {"op": "scale", "factor": 1.2}}).digest[:16] == "d2488e60742a1c9b"


def test_describe():
    assert Program.from_config(EVERYTHING).describe() == (
        "scale factor 0.5, origin [0, 1, 2] on text + words 'cat#2'; "
        "then drop on image (row, col), double blocks 0–1 + single blocks 2, heads 1–2, keys; "
        "then offset by 1 on image, σ 0.7–1, keys, as text sees them; "
        "then rotate degrees 10 on image, steps 0–2, strength 1 → 0; "
        "then shuffle on box [0, 0, 0.5, 1] fraction, double blocks; "
        "then mask from mask of 2 × 2, to text tokens 0–1, rule only; "
        "then relocate to line [[0, 0], [3, 3]] tokens on text, blocks 0, 2–3; "
        "then temperature factor 1.5 on image, strength 0 at σ 1, 1 at σ 0.5; "
        "then warp field [[[0, 0], [1, 1]]] on reference 0"
    )


def test_changing_a_config_afterwards_does_not_change_the_program():
    config = {"a": {"op": "offset", "by": [1, 2, 3]}}
    p = Program.from_config(config)
    digest = p.digest
    config["a"]["by"][0] = 9
    p.to_config()["a"]["by"][0] = 9
    assert p.digest == digest


def test_adding_programs():
    p = Program.from_config({"a": {"op": "zero"}}) + Program.from_config({"a": {"op": "offset", "by": 1}})
    assert p.to_config() == {"a": {"op": "zero"}, "a_2": {"op": "offset", "by": 1}}
    assert Program.from_config(p.to_config()) == p


TEXT, IMAGE, REFERENCE = len(WORDS.spans), 16, 4
FIRST = TEXT  # of the image


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("text", range(TEXT)),
        ("image", range(FIRST, FIRST + 16)),
        ("reference", range(FIRST + 16, FIRST + 20)),
        ("all", range(FIRST + 20)),
        ({"reference": 0}, range(FIRST + 16, FIRST + 20)),
        ({"box": [1, 2, 3, 4]}, [FIRST + i for i in (6, 7, 10, 11)]),
        ({"box": [16, 32, 48, 64], "unit": "pixels"}, [FIRST + i for i in (6, 7, 10, 11)]),
        ({"box": [0.25, 0.5, 0.75, 1], "unit": "fraction"}, [FIRST + i for i in (6, 7, 10, 11)]),
        ({"box": [0.4, 0, 1.6, 1]}, [FIRST, FIRST + 4]),  # tokens whose middle lies inside
        ({"mask": ["#...", "....", "....", "...#"], "unit": "tokens"}, [FIRST, FIRST + 15]),
        ({"mask": [[0, 1], [0, 0]]}, [FIRST + i for i in (2, 3, 6, 7)]),
        ({"mask": torch.tensor([[False, True], [False, False]])}, [FIRST + i for i in (2, 3, 6, 7)]),
        ({"indices": [0, -1]}, [FIRST, FIRST + 15]),
        ({"indices": 3, "of": "text"}, [3]),
        ({"indices": [TEXT], "of": "all"}, [FIRST]),
        ([{"indices": [2], "of": "text"}, {"indices": [0]}, {"box": [0, 0, 1, 1]}], [2, FIRST]),
        ({"words": ["mat"]}, range(13, 16)),
        ({"words": "hello  WORLD"}, [*range(33, 38), *range(39, 44)]),
        ({"words": ["cat#1", "cat#2"]}, [2, 3, 4, 24, 25, 26]),
    ],
)
def test_tokens(tokens, expected):
    assert selected(tokens) == sorted(expected)


def test_a_mask_from_an_image_file(tmp_path):
    from PIL import Image

    image = Image.new("L", (64, 64))
    image.paste(255, (32, 0, 64, 32))
    image.save(tmp_path / "mask.png")
    assert selected({"mask": str(tmp_path / "mask.png")}) == [FIRST + i for i in (2, 3, 6, 7)]
    a, b = (
        program(tokens={"mask": m}) for m in (str(tmp_path / "mask.png"), [[0] * 32 + [1] * 32] * 32 + [[0] * 64] * 32)
    )
    assert a == b  # the pixels count, not the path


def active(**edit) -> list[bool]:
    """Return for each step whether the program changes ids."""
    ctx = context()
    compiled, base = compile_programs([program(**edit)], ctx), ctx.ids[0]
    return [not torch.equal(compiled.ids(t), base) for t in ctx.sigmas[:-1]]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("all", [1, 1, 1, 1]),
        (0, [1, 0, 0, 0]),
        ([1, -1], [0, 1, 0, 1]),
        ("1-2", [0, 1, 1, 0]),
        ({"fraction": [0, 0.5]}, [1, 1, 0, 0]),
        ({"fraction": [0.5, 1]}, [0, 0, 1, 1]),
        ({"sigma": [0.7, 0.9]}, [0, 1, 0, 0]),  # the step at 0.7 belongs to [0, 0.7]
        ({"sigma": [0, 0.7]}, [0, 0, 1, 1]),
        ({"sigma": [1, 0.95]}, [1, 0, 0, 0]),
    ],
)
def test_steps(steps, expected):
    assert active(steps=steps) == [bool(x) for x in expected]


LEVELS = st.lists(st.floats(0.01, 0.999), min_size=1, max_size=8, unique=True)


@settings(deadline=None, max_examples=100)
@given(LEVELS, st.floats(0.01, 0.99))
def test_two_windows_of_noise_levels_share_no_step(levels, bound):
    sigmas = (1.0, *sorted(levels, reverse=True), 0.0)
    late = parse_steps({"sigma": [0, bound]}, "s")
    early = parse_steps({"sigma": [bound, 1]}, "s")
    early_acts = resolve_steps(early, sigmas, "s")
    late_acts = resolve_steps(late, (*sigmas[:-1], 0.001, 0.0), "s")[:-1]  # a step that is always late
    assert all(low != high for low, high in zip(late_acts, early_acts, strict=True))


@pytest.mark.parametrize("sigma", [0.83202, 0.49996, 0.0123456, 0.99952])
@pytest.mark.parametrize("digits", [3, 4, 5])
def test_a_bound_copied_from_a_message_means_that_step(sigma, digits):
    """A message prints 0.832 for 0.83202: as a high bound it includes that step, as a low bound it does not."""
    sigmas, copied = (1.0, sigma, 0.001, 0.0), float(f"{sigma:.{digits}g}")
    if copied < 1:
        assert resolve_steps({"sigma": [0, copied]}, sigmas, "s") == (False, True, True)
        assert resolve_steps({"sigma": [copied, 1]}, sigmas, "s") == (True, False, False)
    assert resolve_steps({"sigma": [0, 1]}, sigmas, "s") == (True, True, True)


def test_the_copied_bound_means_the_nearest_of_several_steps():
    sigmas = (1.0, 0.8323, 0.8319, 0.8317, 0.0)
    assert resolve_steps({"sigma": [0, 0.832]}, sigmas, "s") == (False, False, True, True)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", {0, 1, 2, 3, 4}),
        ("double", {0, 1}),
        ("single", {2, 3, 4}),
        ("1-2", {1, 2}),
        (3, {3}),
        ([0, "3-4"], {0, 3, 4}),
        ({"double": 1, "single": "0-1"}, {1, 2, 3}),
        ({"single": "all", "through": [0]}, {0, 2, 3, 4}),
        (["double", 4], {0, 1, 4}),
    ],
)
def test_blocks(blocks, expected):
    compiled, base = compile_programs([program(blocks=blocks)], context()), context().ids[0]
    assert {k for k in range(5) if not torch.equal(compiled.ids(block=k), base)} == expected


@pytest.mark.parametrize(
    ("strength", "sigma", "expected"),
    [
        (0.3, 0.5, 0.3),
        ({"from": 1, "to": 0}, 0.25, 0.25),
        ({"from": 0.5, "to": 1}, 1, 0.5),
        ([[0.8, 1], [0.4, 0]], 0.9, 1),
        ([[0.4, 0], [0.8, 1]], 0.6, 0.5),
        ([[0.8, 1], [0.4, 0]], 0.1, 0),
    ],
)
def test_strength(strength, sigma, expected):
    assert strength_at(parse_strength(strength, ""), sigma) == pytest.approx(expected)


def test_tables_are_shared():
    """Equal tables are one object across blocks, sides, heads, samples and steps."""
    base = compile_programs([Program()], context()).at(1.0)
    assert type(base.rotary).__name__ == "Rotary"
    assert base.mask is None
    assert base.rotary.cos.shape == (1, 1, context().layout.tokens, 16)

    keys = compile_programs([program(blocks=[1, 3], side="keys")], context(prompts=None)).at(1.0).rotary
    assert len({id(q) for q, _ in keys}) == 1
    assert keys[0][0] is keys[0][1]
    assert keys[1][1] is keys[3][1] is not keys[0][1]
    assert keys[0][1] is keys[2][1] is keys[4][1]

    nothing = Program.from_config({"a": {"op": "scale", "factor": 1}, "b": {"op": "zero", "strength": 0}})
    rotary = compile_programs([nothing], context()).at(1.0).rotary
    assert torch.equal(rotary.cos, base.rotary.cos)
    assert torch.equal(rotary.sin, base.rotary.sin)


def test_tables_are_reused_across_steps():
    compiled = compile_programs(
        [
            Program.from_config(
                {
                    "still": {"op": "zero", "blocks": [0]},
                    "fading": {"op": "zero", "blocks": [1], "strength": {"from": 1, "to": 0}},
                }
            )
        ],
        context(),
    )
    first, again, second = compiled.at(1.0), compiled.at(1.0), compiled.at(0.9)
    assert first is again
    assert first.rotary[0][0] is second.rotary[0][0]
    assert first.rotary[2][0] is second.rotary[2][0]
    assert first.rotary[1][0] is not second.rotary[1][0]
    window = compile_programs([program(steps=[1])], context())
    assert window.at(0.7) is window.at(0.4)


def test_old_tables_are_dropped():
    compiled = compile_programs(
        [program(strength={"from": 1, "to": 0})], context(sigmas=[1 - i / 100 for i in range(101)])
    )
    for i in range(100):
        compiled.at(1 - i / 100)
    assert sum(len(part) for part in (compiled._cache._current, compiled._cache._previous)) < 10


def test_a_batch_has_the_table_of_each_sample():
    programs = [Program(), program(), program(heads=[1]), program(side="keys")]
    both = compile_programs(programs, context()).at(1.0).rotary
    for b, p in enumerate(programs):
        alone = compile_programs([p], context()).at(1.0).rotary
        alone = [(alone, alone)] * 5 if hasattr(alone, "cos") else alone
        for block in range(5):
            for side in (0, 1):
                for part in (0, 1):
                    table = both[block][side][part]
                    assert table.shape == (4, 4 if side == 1 or side == 0 else 1, context().layout.tokens, 16)
                    assert torch.equal(table[b : b + 1], alone[block][side][part].expand_as(table[b : b + 1]))


def test_equal_programs_share_tables():
    compiled = compile_programs([program(), Program.from_config({"b": {"op": "zero"}})], context())
    assert compiled.at(1.0).rotary.cos.shape[0] == 1
    words = program(tokens={"words": ["hello"]})
    other = Prompt("say hello", ((0, 3), (4, 9)))
    apart = compile_programs([words], context(prompts=[WORDS, other]))
    assert apart.at(1.0).rotary.cos.shape[0] == 2


def test_edits_of_words_do_nothing_to_a_negative_prompt():
    edits = {
        "a": {"op": "zero", "tokens": {"words": ["cat#1"]}},
        "b": {"op": "mask", "from": "image", "to": {"words": ["mat"]}, "rule": "only"},
        "c": {"op": "offset", "by": 1, "tokens": [{"words": ["mat"]}, {"indices": [0]}]},
    }
    compiled = compile_programs([Program.from_config(edits)], context(prompts=[None]))
    changed = (compiled.ids() != context().ids[0]).any(1).nonzero()[:, 0].tolist()
    assert changed == [FIRST]
    assert compiled.at(1.0).mask is None


def test_key_groups():
    edit = {"op": "zero", "side": "keys", "seen_by": {"box": [0, 0, 1, 4]}}
    ctx = context()
    pair = compile_programs([Program.from_config({"a": edit})], ctx).at(1.0).rotary[0]
    base = compile_programs([Program()], ctx).at(1.0).rotary
    groups = pair[1]
    assert torch.equal(pair[0].cos, base.cos)
    assert torch.cat(groups.queries).sort()[0].tolist() == list(range(ctx.layout.tokens))
    seeing = [set(q.tolist()) for q in groups.queries]
    g = seeing.index(set(range(FIRST, FIRST + 4)))
    assert (groups.tables[g].sin[0, 0, FIRST : FIRST + 16] == 0).all()
    assert torch.equal(groups.tables[1 - g].cos, base.cos)


BAD = [
    # (edit, path after variants.half, value shown, accepted, nearest)
    ({"a": {"op": "scael", "factor": 2}}, "a.op", "'scael'", "one of ablate, band, centre, concentrate", "scale"),
    ({"a": {"factor": 2}}, "a.op", "missing", "one of ablate, band, centre", None),
    ({"a": {"op": 3}}, "a.op", "3", "one of ablate, band, centre", None),
    ({"a": {"op": "scale", "facter": 2}}, "a.facter", "2", "factor, origin, tokens", "factor"),
    ({"a": {"op": "scale"}}, "a.factor", "missing", "scale needs it", None),
    ({"a": {"op": "scale", "factor": "big"}}, "a.factor", "'big'", "a number", None),
    ({"a": {"op": "scale", "factor": True}}, "a.factor", "True", "a number", None),
    ({"a": {"op": "scale", "factor": float("nan")}}, "a.factor", "nan", "finite", None),
    ({"a": {"op": "scale", "factor": [1, float("inf"), 1]}}, "a.factor[1]", "inf", "finite", None),
    ({"a": {"op": "scale", "factor": [1, 2, 3, 4, 5]}}, "a.factor", "[1, 2, 3, 4, 5]", "[index, row, col]", None),
    ({"a": {"op": "scale", "factor": {"rows": 2}}}, "a.factor.rows", "2", "index, row, col", "row"),
    ({"a": {"op": "scale", "factor": {}}}, "a.factor", "{}", "a mapping such as", None),
    ({"a": {"op": "scale", "factor": 2, "origin": "center"}}, "a.origin", "'center'", "corner, centre", "centre"),
    ({"a": {"op": "zero", "_target_": "os.system"}}, "a._target_", "'os.system'", "tokens, axes", None),
    (
        {"a": {"op": "zero", "tokens": "imgae"}},
        "a.tokens",
        "'imgae'",
        "image, text, all, reference, padding, or",
        "image",
    ),
    ({"a": {"op": "zero", "tokens": {"word": ["cat"]}}}, "a.tokens.word", "['cat']", "words, box", "words"),
    ({"a": {"op": "zero", "tokens": {"words": []}}}, "a.tokens.words", "[]", "a word or phrase", None),
    ({"a": {"op": "zero", "tokens": {"words": [3]}}}, "a.tokens.words[0]", "3", "a word or phrase", None),
    ({"a": {"op": "zero", "tokens": {"box": [0, 0, 1]}}}, "a.tokens.box", "[0, 0, 1]", "[top, left", None),
    ({"a": {"op": "zero", "tokens": {"box": [2, 0, 1, 1]}}}, "a.tokens.box", "[2, 0, 1, 1]", "top < bottom", None),
    ({"a": {"op": "zero", "tokens": {"box": [0, 0, 1, 1], "unit": "px"}}}, "a.tokens.unit", "'px'", "pixels", None),
    (
        {"a": {"op": "zero", "tokens": {"box": [0, 0, 1, 1], "units": "pixels"}}},
        "a.tokens.units",
        "'pixels'",
        "unit",
        "unit",
    ),
    ({"a": {"op": "zero", "tokens": {"box": [0, 0, 1, 1], "words": "a"}}}, "a.tokens", "box", "exactly one of", None),
    ({"a": {"op": "zero", "tokens": {"mask": ["#.", "#"]}}}, "a.tokens.mask", "'#.'", "equal length", None),
    ({"a": {"op": "zero", "tokens": {"mask": "no.png"}}}, "a.tokens.mask", "no.png", "an image file", None),
    ({"a": {"op": "zero", "tokens": {"indices": []}}}, "a.tokens.indices", "[]", "at least one", None),
    ({"a": {"op": "zero", "tokens": {"indices": [0.5]}}}, "a.tokens.indices[0]", "0.5", "index", None),
    ({"a": {"op": "zero", "tokens": []}}, "a.tokens", "[]", "image, text", None),
    ({"a": {"op": "zero", "axes": "column"}}, "a.axes", "'column'", "index, row, col", "col"),
    ({"a": {"op": "zero", "axes": [0, 4]}}, "a.axes[1]", "4", "0 … 3", None),
    ({"a": {"op": "zero", "axes": []}}, "a.axes", "[]", "at least one axis", None),
    ({"a": {"op": "zero", "steps": "first"}}, "a.steps", "'first'", "{fraction", None),
    ({"a": {"op": "zero", "steps": "5-2"}}, "a.steps", "'5-2'", "{fraction", None),
    ({"a": {"op": "zero", "steps": []}}, "a.steps", "[]", "{fraction", None),
    ({"a": {"op": "zero", "steps": {"sigmas": [0, 1]}}}, "a.steps.sigmas", "[0, 1]", "fraction, sigma", "sigma"),
    ({"a": {"op": "zero", "steps": {"sigma": [0, 2]}}}, "a.steps.sigma", "[0, 2]", "from 0 to 1", None),
    ({"a": {"op": "zero", "blocks": "doubel"}}, "a.blocks", "'doubel'", "all, double, single", "double"),
    ({"a": {"op": "zero", "blocks": {"singel": [0]}}}, "a.blocks.singel", "[0]", "double, single", "single"),
    ({"a": {"op": "zero", "blocks": {}}}, "a.blocks", "{}", "all, double, single", None),
    ({"a": {"op": "zero", "heads": "some"}}, "a.heads", "'some'", "heads such as", None),
    ({"a": {"op": "zero", "side": "key"}}, "a.side", "'key'", "both or queries or keys", "keys"),
    ({"a": {"op": "zero", "strength": 2}}, "a.strength", "2", "from 0 to 1", None),
    ({"a": {"op": "zero", "strength": {"from": 1}}}, "a.strength", "{'from': 1}", "{from: 1, to: 0}", None),
    ({"a": {"op": "zero", "strength": [[1, 0], [1, 1]]}}, "a.strength", "[[1, 0], [1, 1]]", "different sigma", None),
    ({"a": {"op": "zero", "seen_by": "text"}}, "a.seen_by", "'text'", "side: keys", None),
    ({"a": {"op": "temperature", "factor": 0}}, "a.factor", "0", "above 0", None),
    ({"a": {"op": "temperature", "factor": 2, "axes": "row"}}, "a.axes", "'row'", "factor, tokens, steps", None),
    ({"a": {"op": "mask", "from": "text"}}, "a.to", "missing", "mask needs it", None),
    ({"a": {"op": "mask", "from": "text", "to": "image", "rule": "deny"}}, "a.rule", "'deny'", "block or only", None),
    ({"a": {"op": "mask", "from": "text", "to": "image", "tokens": "text"}}, "a.tokens", "'text'", "from, to", None),
    ({"a": {"op": "shuffle", "seed": -1}}, "a.seed", "-1", "0 or more", None),
    ({"a": {"op": "shuffle", "seed": 1.5}}, "a.seed", "1.5", "a whole number", None),
    ({"a": {"op": "relocate", "to": {"points": [1, 2]}}}, "a.to.points", "[1, 2]", "point, box", "point"),
    ({"a": {"op": "relocate", "to": {"line": [[1, 2]]}}}, "a.to.line", "[[1, 2]]", "[[row, col], [row, col]]", None),
    ({"a": {"op": "warp", "field": [[1, 2]]}}, "a.field[0][0]", "1", "[row, col]", None),
    ({"a": {"op": "text_line", "axis": 4}}, "a.axis", "4", "index, row, col", None),
    ({"a": {"op": "quantize", "to": "bfloat"}}, "a.to", "'bfloat'", "bfloat16", "bfloat16"),
    ({"a": {"op": "zero", "tokens": {"words": [True]}}}, "a.tokens.words[0]", "True", "in quotes", None),
    ({"a": {"op": "zero", "tokens": {"words": 1.5}}}, "a.tokens.words", "1.5", "in quotes", None),
    ({"a": {"op": "set", "value": 1e39}}, "a.value", "1e+39", "at most 3.4e38", None),
    ({"a": {"op": "set", "value": 10**400}}, "a.value", "1000000000", "at most 3.4e38", None),
    ({"a": {"op": "set", "value": [0, -(10**5000), 0]}}, "a.value[1]", "thousands of digits", "at most 3.4e38", None),
    ({"a": {"op": "jitter", "std": 1, "seed": 2**64}}, "a.seed", "18446744073709551616", "below 2^63", None),
    ({"a": {"op": "jitter", "std": 1, "seed": 10**5000}}, "a.seed", "thousands of digits", "below 2^63", None),
    ({"a": {"op": "jitter", "std": 1, "seed": 1e300}}, "a.seed", "1e+300", "below 2^63", None),
    ({"a": {"op": "zero", "steps": [10**400]}}, "a.steps[0]", "00 … 00", "below 2^63", None),
    ({"a": {"op": "zero", "tokens": {"indices": -(2**63)}}}, "a.tokens.indices", "-9223372", "below 2^63", None),
    ({"a": {"op": "zero", "strength": 10**400}}, "a.strength", "00 … 00", "from 0 to 1", None),
    ({"a": {"op": "zero", "tokens": "x" * 9999}}, "a.tokens", "xxx … xxx", "image, text", None),
    ({"a": {"op": "zero", "x" * 9999: 1}}, "a.xxxxx", "xxx … xxx", "unknown key of zero", None),
    ({True: {"op": "zero"}}, "True", "True", "the name of an edit in quotes, such as 'True'", None),
    ({0.5: {"op": "zero"}}, "0.5", "0.5", "the name of an edit in quotes, such as '0.5'", None),
    ({None: {"op": "zero"}}, "None", "None", "the name of an edit in quotes", None),
    ({"": {"op": "zero"}}, "", "''", "the name of an edit", None),
    ({"a\nb": {"op": "zero"}}, "", "'a\\nb'", "printable", None),
    ({"x" * 300: {"op": "zreo"}}, "xxx", "'zreo'", "one of ablate, band, centre", "zero"),
    ({"a": "zero"}, "a", "'zero'", "{op: scale", None),
    ({"op": "zero"}, "", "{'op': 'zero'}", "{a: {…}}", None),
    ("zero", "", "'zero'", "a mapping of edits", None),
    ([], "", "[]", "a mapping of edits", None),
]


def check_message(error, path, value, accepted, nearest):
    message = str(error.value)
    assert message.startswith(f"variants.half.{path}{'' if 'xxx' in path else ': '}".replace(".:", ":")), message
    assert value in message, message
    assert accepted in message, message
    assert "\n" not in message
    assert len(message) < 500
    assert nearest is None or message.endswith(f"did you mean {nearest}?"), message


@pytest.mark.parametrize(("config", "path", "value", "accepted", "nearest"), BAD)
def test_bad_config(config, path, value, accepted, nearest):
    with pytest.raises(ValueError) as error:
        Program.from_config(config, "variants.half")
    check_message(error, path, value, accepted, nearest)


BAD_FOR_CONTEXT = [
    ({"op": "zero", "tokens": "reference"}, "a.tokens", "reference", "no reference images", None, Layout(2, (4, 4))),
    ({"op": "zero", "tokens": {"reference": 1}}, "a.tokens.reference", "1", "one of 1 references", None, None),
    ({"op": "zero", "tokens": {"words": ["hat"]}}, "a.tokens.words", "'hat'", "A, cat, on", "mat", None),
    ({"op": "zero", "tokens": {"words": ["cat"]}}, "a.tokens.words", "'cat'", "cat#1 (…A cat on", None, None),
    ({"op": "zero", "tokens": {"words": ["cat#3"]}}, "a.tokens.words", "'cat#3'", "occurs 2 times", None, None),
    ({"op": "zero", "tokens": {"box": [0, 0, 5, 4]}}, "a.tokens.box", "5", "within [0, 0, 4, 4]", None, None),
    ({"op": "zero", "tokens": {"box": [0, 0, 0.2, 0.2]}}, "a.tokens", "0.2", "selects none of", None, None),
    ({"op": "zero", "tokens": {"mask": ["...", "...", "..."]}}, "a.tokens", "...", "selects none of", None, None),
    (
        {"op": "zero", "tokens": {"mask": ["#"], "unit": "tokens"}},
        "a.tokens.mask",
        "1 × 1",
        "expected 4 × 4 tokens",
        None,
        None,
    ),
    ({"op": "zero", "tokens": {"indices": [16]}}, "a.tokens.indices", "16", "below 16 (the image tokens)", None, None),
    ({"op": "zero", "steps": [4]}, "a.steps", "4", "0 … 3", None, None),
    ({"op": "zero", "steps": {"sigma": [0.1, 0.2]}}, "a.steps", "0.1", "none of the 4 steps", None, None),
    ({"op": "zero", "blocks": [5]}, "a.blocks", "5", "0-4 through: 2 double, 3 single", None, None),
    ({"op": "zero", "blocks": {"double": [2]}}, "a.blocks", "2", "a double block below 2", None, None),
    ({"op": "zero", "heads": [4]}, "a.heads", "4", "a head below 4", None, None),
    ({"op": "text_line", "axis": "row", "tokens": "image"}, "a.tokens", "text_line", "of text tokens only", None, None),
    ({"op": "relocate", "to": {"box": [0, 0, 9, 9]}}, "a.to.box", "9", "within [0, 0, 4, 4]", None, None),
    ({"op": "relocate", "to": [1, 1], "spread": "grid"}, "a.spread", "'grid'", "point", None, None),
    ({"op": "mask", "from": "text", "to": "all"}, "a", "", "nothing to attend to", None, None),
]


@pytest.mark.parametrize(("edit", "path", "value", "accepted", "nearest", "layout"), BAD_FOR_CONTEXT)
def test_config_that_does_not_fit_the_context(edit, path, value, accepted, nearest, layout):
    """Errors that depend on grid, prompt, schedule or model are raised when compiling, before anything runs."""
    p = Program.from_config({"a": edit}, "variants.half")
    with pytest.raises(ValueError) as error:
        compile_programs([p], context(layout))
    check_message(error, path, value, accepted, nearest)


def test_masks_that_leave_nothing_together():
    """The second one is named. At other steps, in other blocks or below full strength, they do not act together."""
    where = context(Layout(10, (4, 4)))
    first = {"op": "mask", "from": "text", "to": "text", "steps": [0], "blocks": [1]}
    for other in ({"steps": [1]}, {"blocks": [2]}, {"strength": 0.9}):
        compile_programs([Program.from_config({"a": first, "b": {**first, "to": "image", **other}})], where)
    with pytest.raises(UserError, match=r"^b: leaves some tokens nothing to attend to"):
        compile_programs([Program.from_config({"a": first, "b": {**first, "to": "image"}})], where)


def test_words_need_a_prompt():
    with pytest.raises(ValueError, match=r"a.tokens.words: \['cat'\], but no prompt was given"):
        compile_programs([program(tokens={"words": "cat"})], context(prompts=None))


def test_a_word_that_was_cut_off():
    message = "'hello' was cut off or is ignored: it lies beyond the last of the 10 text tokens"
    with pytest.raises(UserError, match=message):
        find_word(Prompt(CAT, WORDS.spans[:10]), "hello", "t")


def test_presets():
    """Every op has a preset of its name. Each preset is a complete program, except for `to` of relocate.

    No preset of an op has a mapping: Hydra merges mappings, so another form could not override it. Presets of published
    methods may name blocks of FLUX.1, of which this model has the first ones.
    """
    files = {file.stem: file for file in (config_folder() / "op").glob("*.yaml")}
    ops = {name for name, op in OPS.items() if op.function.__module__.startswith("fluxlab.")}
    assert set(files) >= ops
    for name, file in files.items():
        edit = OmegaConf.to_container(OmegaConf.load(file))
        assert edit["op"] == name if name in ops else edit["op"] in ops
        assert len(file.read_text().splitlines()) <= 15
        assert name not in ops or not any(isinstance(value, dict) for value in edit.values())
        assert [key for key, value in edit.items() if value == "???"] == (["to"] if name == "relocate" else [])
        edit = {key: [1, 1] if value == "???" else value for key, value in edit.items()}
        if name not in ops and isinstance(edit.get("blocks"), list):
            assert all(block < 57 for block in edit["blocks"])
            edit["blocks"] = [block for block in edit["blocks"] if block < 5]
        compile_programs([Program.from_config({"a": edit})], context())
        assert file.read_text().startswith("# "), f"{file} has no description"


def yaml_blocks(file: str) -> list[dict]:
    text = (Path(fluxlab.__file__).parents[1] / file).read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return [OmegaConf.to_container(OmegaConf.create(block)) for block in blocks]


def test_programs_in_the_docs_compile():
    first, *others = [Program.from_config(block) for block in yaml_blocks("docs/programs.md")]
    assert len(first.edits) == 4
    layout = Layout(text=len(WORDS.spans), grid=(8, 8))
    for program in (first, *others):
        compile_programs([example(program, layout)], context(layout))
    (experiment,) = yaml_blocks("README.md")
    for variant in experiment["variants"].values():
        assert Program.from_config(variant)


def test_the_op_of_the_docs_works(own_op):
    text = (Path(fluxlab.__file__).parents[1] / "docs/programs.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n# my_ops.py\n(.*?)```", text, re.DOTALL)
    exec(source.replace('"shear"', '"own"'), {})
    after = compile_programs([program(op="own", by=0.5)], context(Layout(0, (2, 3)), prompts=None)).ids()
    before = context(Layout(0, (2, 3))).ids[0]
    assert torch.equal(after[:, 2], before[:, 2] + 0.5 * before[:, 1])
    assert torch.equal(after[:, :2], before[:, :2])


def test_the_tables_of_the_docs_name_every_op_and_key():
    tables = ops_table() + where_table()
    assert all(f"| `{name}` |" in tables for name in (*OPS, *WHERE))
    assert "`factor`: a number, [row, col], [index, row, col] or {row: 2}<br>`origin`: corner, centre or" in tables
    assert "| `strength` | 1 | from 0" in tables


def test_every_op_is_documented():
    assert all(op.summary for op in OPS.values())


PLUGIN = '''
from fluxlab.positions import op
from fluxlab.select.arguments import number

@op("spiral", {"turns": number})
def spiral(ids, scope, turns=1.0):
    """Move every token along axis 0."""
    return ids + turns
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_spiral.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_spiral"
    OPS.pop("spiral", None)
    sys.modules.pop("my_spiral", None)


def test_plugins(plugin):
    with pytest.raises(ValueError, match="'spiral', expected one of"):
        program(op="spiral")
    fluxlab.positions.load_plugins([plugin])
    fluxlab.positions.load_plugins([plugin])
    p = program(op="spiral", turns=2)
    assert torch.equal(compile_programs([p], context()).ids()[FIRST:-4], context().ids[0, FIRST:-4] + 2)
    assert p.to_config() == {"a": {"op": "spiral", "turns": 2}}
    with pytest.raises(ValueError, match=r"unknown key of spiral.*did you mean turns"):
        program(op="spiral", turn=2)


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (["no_such_module_here"], r"plugins\[0\]: 'no_such_module_here', expected a module"),
        (["no_such.module"], r"plugins\[0\]: 'no_such.module', expected a module"),
        (["my_ops.py"], r"plugins\[0\]: 'my_ops.py', expected the name of a module without its ending: my_ops"),
        (["ops/mine"], r"plugins\[0\]: 'ops/mine', expected the name of a module, such as my_ops"),
        ([""], r"plugins\[0\]: '', expected the name of a module"),
        ([".ops"], r"plugins\[0\]: '.ops', expected the name of a module"),
        (3, "plugins: 3, expected a list"),
    ],
)
def test_bad_plugins(plugins, message):
    with pytest.raises(ValueError, match=message):
        fluxlab.positions.load_plugins(plugins)


def test_an_op_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="'zero' is taken by"):
        fluxlab.positions.op("zero")(lambda ids, scope: ids)


@pytest.fixture
def own_op():
    """Register a function as the op `own`, and remove it afterwards."""
    yield lambda function, *args, **kwargs: fluxlab.positions.op("own", *args, **kwargs)(function)
    OPS.pop("own", None)


def compiled(edit: dict):
    return compile_programs([Program.from_config({"a": edit}, "variants.half")], context()).at(1.0)


def test_an_op_that_gives_nan_is_named(own_op):
    own_op(lambda ids, scope, by: (ids - ids[1]) / (ids - ids[1]) * by, {"by": number})
    message = (
        r"^variants\.half\.a: op own with by 2\.0 on 16 tokens gave NaN or inf for 1 of them, "
        r"first for image token 1 \(row 0, col 1\)$"
    )
    with pytest.raises(UserError, match=message):
        compiled({"op": "own", "by": 2})


def test_numbers_that_overflow_are_named():
    twice = Program.from_config({name: {"op": "scale", "factor": 1e30} for name in "ab"})
    layout = Layout(1, (4, 4))
    with pytest.raises(UserError, match=r"^b: op scale with factor .* on 16 tokens gave NaN or inf for 16 of them"):
        compile_programs([twice], context(layout, prompts=None)).at(1.0)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("mine"), ZeroDivisionError(), AssertionError()])
def test_an_ops_own_exception_keeps_its_traceback(error, own_op):
    """Also a ValueError: it is a bug of the op, not a mistake of the user."""

    def mine(ids, scope, by=1.0):
        raise error

    own_op(mine, {"by": number})
    with pytest.raises(type(error)) as raised:
        compiled({"op": "own", "tokens": {"indices": [0, 3]}})
    assert raised.value is error
    assert not isinstance(error, UserError)
    assert error.__notes__ == ["in op own with by 1.0 on 2 tokens, edit variants.half.a"]
    assert raised.traceback[-1].name == "mine"


def test_an_ops_oserror_is_not_reported_as_the_users(own_op):
    """The command line shows an OSError in one line, so it becomes a RuntimeError."""
    own_op(lambda ids, scope: Path("/no/such/file").read_text())
    with pytest.raises(
        RuntimeError, match=r"FileNotFoundError.*in op own on 16 tokens, edit variants\.half\.a"
    ) as raised:
        compiled({"op": "own"})
    assert isinstance(raised.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda ids: ids[:, :2], r"\(16, 2\) torch\.float32"),
        (lambda ids: ids.double(), r"\(16, 3\) torch\.float64"),
        (lambda ids: ids.tolist(), "list"),
        (lambda ids: None, "NoneType"),
    ],
)
def test_a_result_of_another_type_is_a_bug_of_the_op(result, got, own_op):
    own_op(lambda ids, scope: result(ids))
    with pytest.raises(TypeError, match=rf"a: op own \(.*test_program\.py:\d+\) returned {got}, expected"):
        compiled({"op": "own"})


def test_an_attention_op_must_return_a_mask(own_op):
    own_op(lambda from_: from_.float(), {"from": parse_tokens}, acts_on="attention")
    with pytest.raises(TypeError, match=r"returned .* torch.float32, expected a tensor .* torch.bool"):
        compiled({"op": "own", "from": "image"})


def test_an_argument_type_that_breaks_is_a_bug_of_the_op(own_op):
    own_op(lambda ids, scope, by: ids, {"by": lambda value, path: value["x"]})
    with pytest.raises(TypeError) as error:
        compiled({"op": "own", "by": 3})
    assert "in argument types of op own" in error.value.__notes__[0]


def test_an_ops_usererror_names_the_edit(own_op):
    def mine(ids, scope):
        raise UserError("tokens: select fewer")

    own_op(mine)
    with pytest.raises(UserError, match=r"^variants\.half\.a\.tokens: select fewer$"):
        compiled({"op": "own"})


@pytest.mark.parametrize(
    ("text", "error", "note"),
    [
        ("import no_such_dependency", ModuleNotFoundError, True),
        ("from fluxlab.positions import no_such_name", ImportError, True),
        ("1 / 0", ZeroDivisionError, True),
        ("raise ValueError('mine')", ValueError, True),
        ("def f(:", SyntaxError, True),
        ("open('/no/such/file')", RuntimeError, False),
    ],
)
def test_a_plugins_own_error_keeps_its_traceback(text, error, note, tmp_path, monkeypatch):
    (tmp_path / "my_broken_ops.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error) as raised:
        fluxlab.positions.load_plugins(["my_broken_ops"])
    assert not isinstance(raised.value, UserError)
    said = raised.value.__notes__[-1] if note else str(raised.value)
    assert "while importing plugins[0]: my_broken_ops" in said


def test_tokens_of_reference_images():
    """They are offered, `reference[0]` is {reference: 0}, and a sequence without them says how to give some."""
    with pytest.raises(UserError, match="did you mean reference"):
        program(tokens="refrence")
    assert program(tokens="reference[0]").digest == program(tokens={"reference": 0}).digest
    assert program(tokens=["text", "reference[1]"]).digest == program(tokens=["text", {"reference": 1}]).digest
    for tokens in ("reference", "reference[0]", {"reference": 0}, {"indices": [0], "of": "reference"}):
        assert selected(tokens)
        with pytest.raises(UserError, match=r"but there are no reference images; give some with references="):
            selected(tokens, layout=Layout(2, (4, 4)))
    for wrong in ("reference[-1]", "reference[a]", "reference[]", "reference[0", "references[0]"):
        with pytest.raises(UserError, match="expected image, text, all, reference, padding, or one of"):
            program(tokens=wrong)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats()
    | st.sampled_from(
        [
            "all",
            "image",
            "text",
            "row",
            "keys",
            "double",
            "scale",
            "corner",
            "0-3",
            "cat",
            "",
            "…",
            "1e9",
        ]
    )
)
keys = st.sampled_from(
    [
        "op",
        "factor",
        "by",
        "to",
        "from",
        "tokens",
        "axes",
        "steps",
        "blocks",
        "heads",
        "side",
        "strength",
        "seen_by",
        "words",
        "box",
        "mask",
        "indices",
        "unit",
        "sigma",
        "fraction",
        "double",
        "row",
        "point",
        "line",
        "spread",
        "field",
        "x",
    ]
)
random_values = st.recursive(
    leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(keys, x, max_size=4), max_leaves=12
)
random_edits = st.dictionaries(keys, random_values, max_size=5).flatmap(
    lambda edit: st.sampled_from([*OPS, "nop"]).map(lambda name: {**edit, "op": name})
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("ab"), random_edits | random_values, max_size=2) | random_values)
def test_random_configs_are_accepted_or_refused_in_one_line(config):
    before = copy.deepcopy(config)
    try:
        p = Program.from_config(config, "v")
        p.describe()
        assert Program.from_config(p.to_config()) == p
        compile_programs([p], context()).at(1.0)
    except ValueError as error:
        message = str(error)
    else:
        message = "fine"
    assert message
    assert "\n" not in message
    assert repr(config) == repr(before)


def test_the_package_contains_no_networks():
    for file in Path(fluxlab.positions.__file__).parent.glob("*.py"):
        assert "nn.Module" not in file.read_text()


def test_padding_is_the_text_after_the_prompt():
    ctx = context(prompts=[Prompt("a cat", ((0, 1), (2, 5), (0, 0)))])  # two words and the end of the text
    assert resolve_tokens("padding", ctx, 0, "t").tolist() == list(range(3, TEXT))
    assert resolve_tokens([{"words": ["cat"]}, "padding"], ctx, 0, "t").tolist() == [1, *range(3, TEXT)]
    full = context(prompts=[Prompt("x", ((0, 1),) * TEXT)])
    for empty in (full, context(prompts=[None])):  # a prompt that fills all tokens, a negative prompt
        assert resolve_tokens("padding", empty, 0, "t").tolist() == []
        edits = {"a": {"op": "zero", "tokens": "padding"}, "b": {"op": "mask", "from": "all", "to": "padding"}}
        assert torch.equal(compile_programs([Program.from_config(edits)], empty).ids(), empty.ids[0])
    assert program(tokens="padding").names_words
    assert Program.from_config({"b": {"op": "mask", "from": "all", "to": "padding"}}).names_words
    assert program(tokens="padding").describe() == "zero on padding"
    with pytest.raises(UserError, match="padding, but no prompt was given"):
        resolve_tokens("padding", context(prompts=None), 0, "t")
    with pytest.raises(UserError, match=r"t\.of: 'padding', expected image or text"):
        parse_tokens({"indices": [0], "of": "padding"}, "t")
