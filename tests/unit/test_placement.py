"""Placements of reference images, against each method's own procedure written out with loops."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.positions import Layout
from tests.unit.test_ops import edited

GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
LAYOUTS = st.builds(
    lambda image, references: Layout(2, image, tuple(references)), GRIDS, st.lists(GRIDS, min_size=1, max_size=4)
)


def tokens(height, width):
    return [(r, c) for r in range(height) for c in range(width)]


def kontext(layout):
    return [(1, r, c) for size in layout.references for r, c in tokens(*size)]


def kontext_several(layout):
    """ComfyUI's "offset", in latent pixels, of which a token has two a side."""
    ids, h, w = [], 0, 0
    for rows, cols in layout.references:
        height, width = 2 * rows, 2 * cols
        h_offset, w_offset = (0, w) if height + h > width + w else (h, 0)
        h, w = max(h, height + h_offset), max(w, width + w_offset)
        ids += [(1, r + h_offset // 2, c + w_offset // 2) for r, c in tokens(rows, cols)]
    return ids


def uno(layout):
    ids = []
    for k, size in enumerate(layout.references):
        before = layout.grids[: k + 1]
        ids += [(0, r + sum(h for h, _ in before), c + sum(w for _, w in before)) for r, c in tokens(*size)]
    return ids


def ominicontrol(layout):
    return [(0, r, c - width) for height, width in layout.references for r, c in tokens(height, width)]


def ominicontrol_scaled(layout):
    return [(0, 2 * r + 0.5, 2 * c + 0.5) for size in layout.references for r, c in tokens(*size)]


def easycontrol(layout):
    height, width = layout.grid
    return [(0, r * height / h, c * width / w) for h, w in layout.references for r, c in tokens(h, w)]


PROCEDURES = (kontext, kontext_several, uno, ominicontrol, ominicontrol_scaled, easycontrol)


def preset(name):
    return yaml.safe_load((config_folder() / f"op/{name}.yaml").read_text())


@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.__name__)
@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS)
def test_presets(procedure, layout):
    """Each preset places references as the method does, and leaves the image and the text where they are."""
    ids = edited(preset(procedure.__name__), layout)
    start = layout.range(2)[0]
    assert ids[:start] == [(0, 0, 0)] * 2 + [(0, r, c) for r, c in tokens(*layout.grid)]
    for found, expected in zip(ids[start:], procedure(layout), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(layout=LAYOUTS)
def test_tokens_never_share_a_position(layout):
    """Placements of several references keep all image tokens apart; Kontext's own puts references on one another."""
    for name in ("kontext_several", "uno"):
        ids = edited(preset(name), layout)[2:]
        assert len(set(ids)) == len(ids)


def test_several_are_placed_one_by_one():
    """A part of the references, one axis, a strength, and a scale on top of a shift, in OminiControl's order."""
    layout = Layout(2, (2, 2), ((1, 2), (1, 1)))
    only = {"op": "place", "arrangement": "diagonal", "index": 4, "tokens": "reference[1]"}
    assert edited(only, layout)[6:] == [(1, 0, 0), (1, 0, 1), (4, 3, 4)]
    assert edited({"op": "place", "arrangement": "diagonal", "axes": "row"}, layout)[6:] == [
        (1, 2, 0),
        (1, 2, 1),
        (2, 3, 0),
    ]
    assert edited({"op": "place", "arrangement": "left", "scale": 2}, layout)[6:8] == [(1, 0.5, -3.5), (1, 0.5, -1.5)]
    assert edited({"op": "place", "strength": 0.5, "index": 0}, layout)[6:] == [(0.5, 0, 0), (0.5, 0, 1), (1, 0, 0)]


@pytest.mark.parametrize("tokens", ["all", "image", ["text", "reference"]])
def test_only_references(tokens):
    with pytest.raises(UserError, match="place moves reference images, expected a selection of reference tokens only"):
        edited({"op": "place", "tokens": tokens}, Layout(2, (2, 2), ((1, 2),)))
    with pytest.raises(UserError, match="there are no reference images"):
        edited({"op": "place"})
