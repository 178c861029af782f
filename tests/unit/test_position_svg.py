"""The position plot as SVG: its points against the ids, its order, and text that is not markup."""

import re
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from fluxlab.drawing.position_plot import EDGES, position_plot, program_at_step, sequence
from fluxlab.drawing.position_svg import CIVIDIS, _shade, positions_svg, svg_url
from fluxlab.drawing.style import MARKS
from fluxlab.select.layout import IMAGE, TEXT

AXIS0 = {"a": {"op": "set", "value": 1, "axes": "index"}}
PROGRAMS = [
    {},
    {"a": {"op": "scale", "factor": 0.5}},
    {"a": {"op": "rotate", "degrees": 30}},
    {"a": {"op": "offset", "by": [0, 1000, -2000]}},
    {"a": {"op": "zero"}, "b": {"op": "zero", "tokens": "text"}},
    AXIS0,
]


def drawn(program, **more):
    """Return the state of a program and the elements of its plot."""
    state = program_at_step(program, sequence(**{"grid": (4, 6), "text": 5, **more}))
    text, size = positions_svg(state)
    root = ElementTree.fromstring(text)
    assert (root.get("width"), root.get("height")) == tuple(map(str, size))
    return state, [element for element in root.iter() if element is not root]


def dots(elements, colour):
    """Return the places in px of all points of a colour, but for the legend's."""
    places = []
    for path in elements:
        if path.get("stroke-linecap") and path.get("stroke") == colour:
            x = y = 0.0
            for dx, dy in re.findall(r"m(-?[\d.]+),(-?[\d.]+)h0", path.get("d")):
                x, y = x + float(dx), y + float(dy)
                places.append((x, y))
    return places[: -1 if (places and places[-1] == (22, 0)) else None]


def scale_of(elements):
    """Return px of (col 0, row 0), and px per position, from the first and last tick of the axes."""
    labels = [e for e in elements if e.tag.endswith("text") and re.fullmatch(r"-?\d+", e.text)]
    cols = {int(e.text): float(e.get("x")) for e in labels if e.get("text-anchor") == "middle"}
    rows = {int(e.text): float(e.get("y")) - 4 for e in labels if e.get("text-anchor") == "end"}
    (a, xa), *_, (b, xb) = cols.items()
    (c, yc), *_, (d, yd) = rows.items()
    across, down = (xb - xa) / (b - a), (yd - yc) / (d - c)
    return (xa - a * across, yc - c * down), (across, down)


@pytest.mark.parametrize("program", PROGRAMS[:-1])
def test_points_are_the_ids(program):
    state, elements = drawn(program)
    (x0, y0), (across, down) = scale_of(elements)
    assert across == pytest.approx(down, rel=0.02)  # both axes have one scale
    expected = [(x0 + col * across, y0 + row * down) for _, row, col in state.after[5:].tolist()]
    found = dots(elements, MARKS[IMAGE][1])
    assert len(found) == len(expected) == 24
    for point, place in zip(found, expected, strict=True):
        assert point == pytest.approx(place, abs=1.5)  # labels are rounded to four digits
    assert len(dots(elements, "#bfbfbf")) == 29


def test_text_is_drawn_on_top():
    _, elements = drawn({"a": {"op": "zero"}})
    fills = [e.get("fill") for e in elements if e.tag.endswith("path") and e.get("fill") != "none"]
    assert fills[0] == MARKS[TEXT][1]
    order = [e.get("fill") if e.get("fill") != "none" else e.get("stroke") for e in elements if e.tag.endswith("path")]
    last_image = max(i for i, colour in enumerate(order[: order.index(MARKS[TEXT][1])]) if colour == MARKS[IMAGE][1])
    assert last_image < order.index(MARKS[TEXT][1])


def test_edges_show_a_mirrored_grid():
    _, elements = drawn({"a": {"op": "mirror"}})
    for name, colour in EDGES.items():
        line, legend = [e for e in elements if e.get("stroke") == colour]
        _, *steps = re.findall(r"(-?[\d.]+),(-?[\d.]+)", line.get("d"))
        axis = 0 if name.startswith("top") else 1
        assert all((float(step[axis]) < 0) == (axis == 0) for step in steps)
        assert legend.get("d").endswith("h22")


def test_axis_0_is_the_colour_if_it_varies():
    _, elements = drawn(AXIS0)
    assert len(dots(elements, "#fee838")) == 24  # index 1
    assert any(e.get("fill") == "#00224e" for e in elements)  # the text tokens have index 0
    assert "index (axis 0)" in [e.text for e in elements]
    assert "index (axis 0)" not in [e.text for e in drawn(PROGRAMS[1])[1]]


def test_shades_are_the_colour_map():
    colours = pytest.importorskip("matplotlib").colormaps["cividis"]
    for i in range(101):
        exact = [255 * c for c in colours(i / 100)[:3]]
        shade = [int(_shade(i / 100)[k : k + 2], 16) for k in (1, 3, 5)]
        assert shade == pytest.approx(exact, abs=9)
    assert [_shade(i / 10) for i in range(11)] == [f"#{colour}" for colour in CIVIDIS]


def test_the_legend_and_the_notes_are_those_of_the_figure():
    for program in PROGRAMS:
        _, elements = drawn(program)
        figure = position_plot(program, grid=(4, 6), text=5)
        texts = [e.text for e in elements if e.tag.endswith("text")]
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        notes = [text.get_text() for text in figure.axes[0].texts]
        assert set(legend + notes) <= set(texts), program


def test_texts_are_escaped():
    words = {"a": {"op": "zero", "tokens": {"words": ['<b> & "c"']}}}
    state, elements = drawn(words, prompt='a <b> & "c"')
    assert any("<b> &" in (e.text or "") for e in elements)
    url = svg_url(positions_svg(state)[0])
    assert not set(url) & set("<>\"'# \n&")
    assert unquote(url.removeprefix("data:image/svg+xml,")) == positions_svg(state)[0]
