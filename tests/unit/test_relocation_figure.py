"""The figure of relocated phrases: its numbers on images in which the thing's place is known."""

import csv

import numpy as np
import pytest
from PIL import Image

import fluxlab
from experiments import relocation, relocationtable
from fluxlab import scenes
from tests import stores

PROMPTS = ("a red fox holding a sign that says open",)
PHRASE = {"words": ["red fox"]}
SIDES = ((0.0, 0.4), (0.6, 1.0))
BOXES = [{"box": [a, c, b, d], "unit": "fraction"} for a, b in SIDES for c, d in SIDES]
EARLY = {"steps": {"fraction": [0, 0.5]}}


def variants():
    made = {}
    for i, box in enumerate(BOXES):
        move = {"op": "relocate", "tokens": PHRASE, "to": box}
        mask = {"op": "mask", "from": {"outside": box}, "to": PHRASE}
        made |= {f"move_{i}": {"a": move}, f"mask_{i}": {"m": mask}, f"both_{i}": {"a": move, "m": mask}}
        made[f"early_mask_{i}"] = {"m": {**mask, **EARLY}}
    return made | {"shifted": {"a": {"op": "offset", "by": 3}}}


def start(cell) -> np.ndarray:
    """The thing's centre in the baseline, in pixels."""
    return np.array([26, 34]) + 4 * cell.seed


def drawn(cell, size=(64, 64)):
    """both: the thing follows. mask: half the way, and a smaller one is added. move: it stays. early: there is none."""
    condition, _, number = cell.variant.rpartition("_")
    centre = start(cell)
    if condition in ("both", "mask"):
        target = 64 * np.array([sum(SIDES[int(number) // 2]) / 2, sum(SIDES[int(number) % 2]) / 2])
        centre = target if condition == "both" else 32 + (target - 32) / 2
    row, col = (float(np.clip(2 * round(x / 2), 12, 52)) for x in centre)
    things = () if condition == "early_mask" else (scenes.Thing("fox", "red", None, row, col, 24),)
    if condition == "mask":
        things += (scenes.Thing("fox", "red", None, row, (col + 32) % 64, 20),)
    return Image.fromarray(scenes.render(scenes.Scene(size, "sand", things)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "picture", drawn)
        path = tmp_path_factory.mktemp("runs") / "run"
        return fluxlab.read_run(stores.make_store(path, variants(), PROMPTS, seeds=(0, 1), name="relocation"))


@pytest.fixture(scope="module")
def rows(run):
    return {row["condition"]: row for row in relocationtable.conditions(run, relocationtable.targets(run))}


def test_which_variants_have_a_box(run):
    found = relocationtable.targets(run)
    assert {name: (len(of), of[0].what, of[0].steps) for name, of in found.items()} == {
        "move": (4, "positions", "all"),
        "mask": (4, "mask", "all"),
        "both": (4, "positions + mask", "all"),
        "early_mask": (4, "mask", (0.0, 0.5)),
    }
    assert [target.centre for target in found["mask"]] == [(0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)]


def test_slopes_are_those_of_the_things(rows):
    assert rows["both"]["slope"] == pytest.approx(1, abs=0.05)
    assert rows["mask"]["slope"] == pytest.approx(0.5, abs=0.05)
    assert rows["move"]["slope"] == rows["move"]["slope_high"] == 0
    assert np.isnan(rows["early_mask"]["slope"])
    assert rows["mask"]["seeds_low"] == pytest.approx(0.5, abs=0.05)
    assert rows["mask"]["seeds_low"] <= rows["mask"]["slope"] <= rows["mask"]["seeds_high"]
    assert rows["both"]["chance_low"] < 0 < rows["both"]["chance_high"] < 0.9


def test_shares_and_distances(rows):
    assert {name: (row["object"], row["shape"], row["n"]) for name, row in rows.items()} == {
        "move": (1, 1, 8),
        "mask": (1, 1, 8),
        "both": (1, 1, 8),
        "early_mask": (0, 0, 8),
    }
    assert [rows[name]["in_box"] for name in ("move", "mask", "both", "early_mask")] == [0, 1, 1, 0]
    assert [rows[name]["single"] for name in ("move", "mask", "both", "early_mask")] == [1, 0, 1, 0]
    assert rows["both"]["in_box_gain"] == 1
    assert rows["both"]["distance"] < 0.03
    # the fox's centre of mass is not the middle of its box, so that the distances are known to about 1 px
    middle = np.array([[26, 34], [30, 38]]) / 64
    away = np.mean(
        [np.hypot(*(np.array(t) - m)) for t in [(a, b) for a in (0.2, 0.8) for b in (0.2, 0.8)] for m in middle]
    )
    assert rows["move"]["distance"] == pytest.approx(away, abs=0.02)
    assert rows["move"]["distance_gain"] == pytest.approx(0)
    assert rows["both"]["letters"] == 0  # the scenes have no sign


def test_slope_is_least_squares_with_a_constant_for_each_pair():
    """An independent computation: one constant per pair and axis, one common slope, on data with gaps."""
    rng = np.random.default_rng(1)
    wanted = rng.random((25, 2))
    at = 0.3 * wanted + rng.normal(size=(6, 1, 2)) + rng.normal(0, 0.1, (6, 25, 2))
    at[rng.random((6, 25)) < 0.3] = np.nan
    above, below = relocationtable._products(wanted, at)
    pair, box, axis = np.nonzero(np.isfinite(at))
    constants = (2 * pair + axis)[:, None] == np.arange(12)
    design = np.column_stack([wanted[box, axis], constants])
    solved = np.linalg.lstsq(design, at[pair, box, axis], rcond=None)[0]
    assert above.sum() / below.sum() == pytest.approx(solved[0], rel=1e-9)


def test_an_effect_of_the_seed_alone_has_no_slope():
    wanted = np.array([(r, c) for r in (0.2, 0.5, 0.8) for c in (0.2, 0.5, 0.8)])
    at = np.random.default_rng(0).random((7, 1, 2)).repeat(9, axis=1)
    above, below = relocationtable._products(wanted, at)
    assert abs(above.sum() / below.sum()) < 1e-12


@pytest.mark.parametrize("width", ["column", "page"])
def test_the_figure_shows_these_numbers(run, rows, width):
    found = relocationtable.targets(run)
    places = relocationtable.by_box(run, found)
    panels = [
        axes for axes in relocation.draw(found, list(rows.values()), places, width).axes if axes.get_title("left")
    ]
    assert [axes.get_title("left") for axes in panels] == ["positions", "mask", "positions + mask", "mask"]
    assert panels[0].get_xlabel().split() == ["slope", "0.00", "[0.00,", "0.00]"]
    joined, boxes, things, before = (panels[2].lines[i].get_xydata() for i in range(4))
    assert boxes.tolist() == [[0.2, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.8]]
    assert np.abs(boxes - things).max() < 0.03
    assert joined[0::3].tolist() == boxes.tolist()
    assert joined[1::3].tolist() == things.tolist()
    assert before == pytest.approx(np.array([[36, 28]]) / 64, abs=0.02)


def test_files_are_equal_in_every_run(run, tmp_path):
    files = [relocation.make(run, tmp_path / name, ["column"]) for name in "ab"]
    assert [file.name.removeprefix("relocation-moved") for file in files[0]] == [
        *("-column.pdf", "-column.png", ".txt", ".csv", "-boxes.csv"),
    ]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    text = files[0][2].read_text()
    assert "both (positions + mask, all steps), n = 8 images of 2 pairs:" in text
    assert "  thing in the box: 1 [1, 1]" in text
    with open(files[0][4], newline="") as table:
        first = next(row for row in csv.DictReader(table) if row["variant"] == "both_3")
    assert float(first["moved_row"]) == pytest.approx(0.8 - 28 / 64, abs=0.03)
    assert float(first["box_from_row"]) == pytest.approx(float(first["moved_row"]), abs=0.03)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no variant moves words to a box in fractions"),
        ({"move_0": {"a": {"op": "relocate", "tokens": PHRASE, "to": BOXES[0]}}}, "its model is not one of scenes"),
    ],
)
def test_runs_that_it_cannot_draw(given, message, tmp_path, capsys):
    model = fluxlab.config.ModelRow("tiny", "fluxlab/assets/tiny", scenes=not given)
    path = stores.make_store(tmp_path / "run", {**given, "a": {}}, PROMPTS, model=model)
    assert relocation.main([str(path), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
