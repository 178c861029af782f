"""Programs on FLUX.2's four axes (t, h, w, l): names, roles, the order of text, and what stays as on FLUX.1."""

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fluxlab.batching import context as context_of
from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.model import Flux2Params, FluxParams
from fluxlab.positions import Layout, Program, compile_programs
from fluxlab.positions.at_step import program_at_step
from fluxlab.positions.window_ops import windows
from fluxlab.select.arguments import across, per_axis

FLUX1_SIZES = FluxParams(16, 16, 24, 32, 64, 4.0, 2, 2, 2, (4, 14, 14), 10000, True, False)
FLUX2_SIZES = Flux2Params(16, 16, 48, 64, 3.0, 2, 2, 3, (8, 8, 8, 8), 2000, False)
TEXT, GRID, REFERENCE = 5, (3, 4), (2, 2)
PRESETS = config_folder() / "op"


def context(sizes=FLUX2_SIZES, references=()):
    layout = Layout(TEXT, GRID, tuple(references))
    dtype, device = torch.float32, torch.device("cpu")
    return context_of(sizes, layout, (1.0, 0.5, 0.0), None, device, dtype, (64, 64), 512)


def ids_after(config, **given) -> torch.Tensor:
    """Return the ids after a program of one edit, `(N, 4)`."""
    return program_at_step(Program.from_config({"a": config}), context(**given)).after


def unchanged(**given) -> torch.Tensor:
    return context(**given).ids[0]


def test_the_ids_of_a_sequence():
    ids = unchanged(references=[REFERENCE, REFERENCE])
    assert ids[:TEXT].tolist() == [[0, 0, 0, i] for i in range(TEXT)]
    assert ids[TEXT : TEXT + 12].tolist() == [[0, r, c, 0] for r in range(3) for c in range(4)]
    assert ids[-8:-4].tolist() == [[10, r, c, 0] for r in range(2) for c in range(2)]
    assert ids[-4:].tolist() == [[20, r, c, 0] for r in range(2) for c in range(2)]


SAME = [
    ({"axes": "t"}, {"axes": "index"}),
    ({"axes": "kind"}, {"axes": 0}),
    ({"axes": ["w", "h"]}, {"axes": ["row", "col"]}),
    ({"axes": "plane"}, {"axes": [1, 2]}),
    ({"axes": "l"}, {"axes": "order"}),
    ({"axes": ["t", "plane", "l"]}, {"axes": "all"}),
    ({"axes": ["kind", "plane", 3]}, {}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_names_and_roles_are_one_axis(one, other):
    base = {"op": "offset", "by": 2, "tokens": "all"}
    first, second = (Program.from_config({"a": {**base, **more}}) for more in (one, other))
    assert first.digest == second.digest
    assert Program.from_config(first.to_config()).digest == first.digest


def test_three_of_four_axes():
    """[t, h, w] leaves the order of text alone, [index, row, col] is all of FLUX.1's axes."""
    moved = ids_after({"op": "offset", "by": 2, "tokens": "all", "axes": ["t", "h", "w"]}) - unchanged()
    assert moved.unique(dim=0).tolist() == [[2, 2, 2, 0]]
    moved = ids_after({"op": "offset", "by": 2, "tokens": "all", "axes": ["index", "row", "col"]}) - unchanged()
    assert moved.unique(dim=0).tolist() == [[2, 2, 2, 2]]
    program = Program.from_config({"a": {"op": "zero", "axes": ["w", "t", "h"]}})
    assert Program.from_config(program.to_config()).digest == program.digest


BY_HAND = {
    "scale": ({"op": "scale", "factor": 2, "tokens": "text"}, [0, 2, 4, 6, 8]),
    "offset": ({"op": "offset", "by": {"l": 3}, "tokens": "text"}, [3, 4, 5, 6, 7]),
    "offset by four": ({"op": "offset", "by": [0, 0, 0, 3], "tokens": "text"}, [3, 4, 5, 6, 7]),
    "mirror": ({"op": "mirror", "axis": "l", "tokens": "text"}, [4, 3, 2, 1, 0]),
    "zero": ({"op": "zero", "tokens": "text"}, [0, 0, 0, 0, 0]),
    "set": ({"op": "set", "value": {"order": 7}, "tokens": "text"}, [7, 7, 7, 7, 7]),
    "text_line": ({"op": "text_line", "axis": "l", "start": 2}, [2, 3, 4, 5, 6]),
    "layout": ({"op": "layout", "like": "flux2"}, [0, 1, 2, 3, 4]),
    "layout of FLUX.1": ({"op": "layout", "like": "flux"}, [0, 0, 0, 0, 0]),
    "layout of Z-Image on l": ({"op": "layout", "like": "z_image", "axis": "l"}, [1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_order_of_text(name):
    config, expected = BY_HAND[name]
    ids = ids_after(config)
    assert ids[:TEXT, 3].tolist() == expected
    assert not ids[:TEXT, :3].any()
    if "layout" not in name:
        assert torch.equal(ids[TEXT:], unchanged()[TEXT:])


def test_shuffled_text():
    ids = ids_after({"op": "shuffle", "seed": 3, "tokens": "text"})
    assert ids[:TEXT, 3].tolist() != list(range(TEXT))
    assert sorted(ids[:TEXT, 3].tolist()) == list(range(TEXT))


def test_relocated_text_keeps_its_order():
    ids = ids_after({"op": "relocate", "to": [1, 2], "tokens": "text"})
    assert ids[:TEXT].tolist() == [[0, 1, 2, i] for i in range(TEXT)]


def test_the_layout_of_flux2_changes_nothing_here():
    given = {"references": [REFERENCE, REFERENCE]}
    assert torch.equal(ids_after({"op": "layout", "like": "flux2"}, **given), unchanged(**given))


ON_THE_PLANE = [
    {"op": "scale", "factor": 1.2},
    {"op": "scale", "factor": 0.5, "origin": "centre"},
    {"op": "offset", "by": [0, 2, -1]},
    {"op": "set", "value": {"index": 1}},
    {"op": "zero"},
    {"op": "relocate", "to": {"box": [0, 0, 2, 2]}},
    {"op": "shuffle", "seed": 1},
    {"op": "mirror"},
    {"op": "transpose"},
    {"op": "rotate", "degrees": 30},
    {"op": "warp", "field": [[[0, 0], [1, 0]], [[0, 1], [1, 1]]]},
    {"op": "quantize", "to": 2},
    {"op": "centre"},
    {"op": "layout", "like": "qwen"},
    {"op": "layout", "like": "lumina2"},
    {"op": "place", "arrangement": "diagonal", "index": 0},
]


@pytest.mark.parametrize("config", ON_THE_PLANE, ids=lambda config: config["op"])
def test_images_move_as_on_flux1(config):
    """The same edit gives image and reference tokens the same index, row and column on both families."""
    given = {"references": [REFERENCE]}
    ids, before = ids_after(config, **given), unchanged(**given)
    other = ids_after(config, sizes=FLUX1_SIZES, **given)
    start = TEXT + GRID[0] * GRID[1]
    assert torch.equal(ids[TEXT:start, :3], other[TEXT:start])
    assert torch.equal(ids[start:, 1:3], other[start:, 1:])
    assert not ids[TEXT:, 3].any()
    if config["op"] not in ("layout",):
        assert torch.equal(ids[:TEXT], before[:TEXT])


FREQUENCIES = [
    {"op": "pi", "factor": 2},
    {"op": "ntk", "factor": [2, 3]},
    {"op": "yarn", "factor": 2},
    {"op": "theta", "value": 10000},
    {"op": "band", "pairs": [0, 1]},
    {"op": "gain", "factor": 1.1, "axes": "l"},
]


@pytest.mark.parametrize("config", FREQUENCIES, ids=lambda config: config["op"])
def test_ops_on_frequencies_compile(config):
    programs = [Program.from_config({"a": config}), Program()]
    cos, own = (compile_programs([program], context()).at(0.75).rotary.cos[0, 0] for program in programs)
    assert cos.shape == own.shape == (TEXT + 12, 16)
    changed = (cos != own).any(0).reshape(4, 4).any(1).tolist()
    if config["op"] in ("pi", "ntk", "yarn"):  # rows and columns only
        assert changed == [False, True, True, False]
    elif "axes" in config:
        assert changed == [False, False, False, True]
    else:
        assert any(changed)


WINDOWS = [{}, {"size": 2}, {"size": {"w": 2}}, {"axes": "h"}, {"axes": "plane", "size": [1, 2, 3]}]


@pytest.mark.parametrize("given", WINDOWS, ids=str)
def test_windows_are_those_of_flux1_and_keep_the_order_of_text(given):
    edit = Program.from_config({"a": {"op": "windows", **given}}).edits[0]
    layout = Layout(TEXT, (6, 8))
    scope = layout.scope(torch.arange(TEXT, TEXT + 48), edit.where["axes"] if "axes" in given else None)
    three = torch.cat((torch.zeros(48, 1), torch.cartesian_prod(torch.arange(6.0), torch.arange(8.0))), dim=1)
    four = torch.cat((three, torch.arange(48.0)[:, None]), dim=1)
    one, two = (windows(ids, scope, (3, 4), **edit.arguments) for ids in (three, four))
    assert len(one) > 1
    assert torch.equal(two[..., :3], one)
    assert torch.equal(two[..., 3], four[None, :, 3].expand(len(two), -1))


def test_every_op_compiles_on_four_axes():
    """With the arguments of its preset. What an op does there is tested op by op."""
    presets = sorted(PRESETS.glob("*.yaml"))
    assert len(presets) > 40
    for file in presets:
        config = yaml.safe_load(file.read_text())
        needs_reference = config.get("tokens") == "reference" or config["op"] == "place"
        words = str(config.get("tokens", "")) + str(config.get("to", "")) + str(config.get("from", ""))
        if config["op"] in ("resample", "inject", "ablate", "restart") or "words" in words or "???" in str(config):
            continue
        given = {"references": [REFERENCE]} if needs_reference else {}
        compile_programs([Program.from_config({"a": config})], context(**given)).at(0.75)


LACKING = [
    {"op": "offset", "by": 1, "axes": "l"},
    {"op": "offset", "by": {"order": 1}},
    {"op": "mirror", "axis": 3},
    {"op": "text_line", "axis": "l"},
]


@pytest.mark.parametrize("config", LACKING, ids=lambda config: config["op"])
def test_flux1_has_no_order_of_text(config):
    with pytest.raises(UserError, match="no axis for the order of text"):
        ids_after(config, sizes=FLUX1_SIZES)


def test_digests_of_flux1_programs_stay():
    """Written down before there were four axes."""
    config = {"a": {"op": "scale", "factor": [1, 1.2, 1.2], "axes": ["row", "col"]}, "b": {"op": "offset", "by": 5}}
    program = Program.from_config(config)
    assert program.to_config()["a"]["factor"] == [1, 1.2, 1.2]
    assert program.to_config()["b"]["by"] == 5


NUMBERS = st.one_of(st.none(), st.floats(-10, 10))


@given(st.lists(NUMBERS, min_size=4, max_size=4))
def test_four_numbers_mean_themselves(numbers):
    """The canonical form gives a model of four axes what was written."""
    if all(n is None for n in numbers):
        return
    assert across(per_axis(numbers, "a"), 4) == [None if n is None else n + 0.0 for n in numbers]


@pytest.mark.parametrize("value", [{"row": 1, "h": 2}, {"plane": 1, "w": 2}])
def test_an_axis_given_twice(value):
    with pytest.raises(UserError, match="given twice"):
        per_axis(value, "a")
