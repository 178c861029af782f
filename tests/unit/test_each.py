"""`each` in variants: one variant for each value of a list."""

import pytest

import fluxlab
from fluxlab.errors import UserError
from fluxlab.experiment.each import expanded

BOXES = [{"box": [0, 0, 0.4, 0.4], "unit": "fraction"}, {"box": [0.6, 0, 1, 0.4], "unit": "fraction"}]


def test_one_variant_per_value():
    given = {
        "offset": {"a": {"op": "offset", "by": {"row": {"each": [1, 2]}}}, "b": {"op": "mirror"}},
        "half": {"a": {"op": "scale", "factor": 0.5}},
    }
    assert expanded(given, 0) == {
        "offset_0": {"a": {"op": "offset", "by": {"row": 1}}, "b": {"op": "mirror"}},
        "offset_1": {"a": {"op": "offset", "by": {"row": 2}}, "b": {"op": "mirror"}},
        "half": given["half"],
    }


def test_lists_of_a_variant_are_read_together():
    move = {"op": "relocate", "tokens": "text", "to": {"each": BOXES}}
    far = {"op": "mask", "from": ["text", {"mask": {"each": [["#."], [".#"]]}}], "to": "text"}
    found = expanded({"both": {"a": move, "m": far}}, 0)
    assert list(found) == ["both_0", "both_1"]
    for i, drawn in enumerate((["#."], [".#"])):
        assert found[f"both_{i}"]["a"]["to"] == BOXES[i]
        assert found[f"both_{i}"]["m"]["from"] == ["text", {"mask": drawn}]


def test_lists_and_blocks_give_all_pairs():
    given = {"x": {"a": {"op": "offset", "by": {"each": [1, 2]}, "blocks": "each"}}}
    found = expanded(given, 3)
    assert list(found) == [f"x_{i}_{block}" for i in range(2) for block in range(3)]
    assert found["x_1_2"] == {"a": {"op": "offset", "by": 2, "blocks": 2}}


def test_an_experiment_has_the_variants():
    given = {"x": {"a": {"op": "scale", "factor": {"each": [0.5, 2]}}}}
    assert list(fluxlab.make_experiment("a cat", given, identify=False).variants) == ["baseline", "x_0", "x_1"]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            {"x": {"a": {"op": "scale", "factor": {"each": 2}}}},
            "variants.x.a.factor.each: 2; expected a list of values, one for each variant",
        ),
        ({"x": {"a": {"op": "scale", "factor": {"each": []}}}}, r"variants.x.a.factor.each: \[\]; expected a list"),
        (
            {"x": {"a": {"op": "offset", "by": {"row": {"each": [1]}, "col": {"each": [1, 2]}}}}},
            "variants.x.a.by.col.each: has 2 values and variants.x.a.by.row.each has 1; they are read together",
        ),
        (
            {"x": {"a": {"op": "scale", "factor": {"each": [1]}}}, "x_0": {}},
            "variants.x: each makes a variant 'x_0', which exists; rename one",
        ),
    ],
)
def test_errors_name_the_key(variants, message):
    with pytest.raises(UserError, match=message):
        expanded(variants, 0)
