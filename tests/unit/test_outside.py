"""`{outside: …}`: the image tokens that are not in a box or mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.errors import UserError
from fluxlab.select.layout import Context, Layout
from fluxlab.select.tokens import parse_tokens, resolve_tokens

LAYOUT = Layout(5, (6, 8), ((3, 4),))
CONTEXT = Context(torch.zeros(1, LAYOUT.tokens, 3), LAYOUT, (8, 28, 28), 10000, 1, 1, 1, [1.0, 0.0])


def tokens(selection) -> set[int]:
    return set(resolve_tokens(parse_tokens(selection, "tokens"), CONTEXT, 0, "tokens").tolist())


edges = st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(1, 6), st.integers(1, 8)).filter(
    lambda box: box[0] < box[2] and box[1] < box[3] and box != (0, 0, 6, 8)
)


@settings(max_examples=40, deadline=None)
@given(edges)
def test_a_box_and_what_is_outside_are_the_image(box):
    inside = {5 + 8 * r + c for r in range(box[0], box[2]) for c in range(box[1], box[3])}
    assert tokens({"box": list(box)}) == inside
    assert tokens({"outside": {"box": list(box)}}) == set(range(5, 5 + 48)) - inside
    assert tokens(["text", {"outside": {"box": list(box)}}]) == set(range(53)) - inside


def test_outside_of_several_areas_is_outside_of_all():
    areas = [{"box": [0, 0, 3, 8]}, {"mask": ["....", "...#"]}]
    assert tokens({"outside": areas}) == set(range(5, 53)) - tokens(areas)
    assert tokens({"outside": areas}) == tokens({"outside": areas[0]}) & tokens({"outside": areas[1]})


def test_the_canonical_form_is_read_back():
    canonical = parse_tokens({"outside": [{"box": [0, 0, 0.5, 1], "unit": "fraction"}]}, "tokens")
    assert canonical == {"outside": {"box": [0.0, 0.0, 0.5, 1.0], "unit": "fraction"}}
    assert parse_tokens(canonical, "tokens") == canonical


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"outside": "text"}, r"tokens.outside: 'text', expected {box} or {mask} of the image"),
        ({"outside": {"words": ["fox"]}}, "tokens.outside: .*expected {box} or {mask} of the image, or a list of them"),
        ({"outside": {"box": [0, 0, 6, 8]}}, "selects none of the 5 text and 6 × 8 image tokens"),
        ({"outside": {"box": [0, 0, 7, 8]}}, r"tokens.outside.box: .*expected a box within \[0, 0, 6, 8\]"),
    ],
)
def test_errors_name_the_key(selection, message):
    with pytest.raises(UserError, match=message):
        tokens(selection)
