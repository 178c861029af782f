"""Figures of a run folder: images, points and captions are the store's, for any store."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from experiments import article, dose, results, style
from fluxlab.drawing.pictures import fit_image
from fluxlab.experiment.reading import read_store
from fluxlab.measure.summary import CONTROLS
from fluxlab.positions import Program
from tests.stores import ARTICLE, make_store

ALL = ("baseline", "zero", "half", "axis0", *CONTROLS)
PROMPTS = ("A cat holding a sign that says hello world", "a red fox on the left holding a sign that says open cafe")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    kept = {name: ARTICLE[name] for name in ("zero", "half", "axis0")}
    return read_store(make_store(tmp_path_factory.mktemp("store") / "a", kept, PROMPTS, seeds=(0, 1), name="article"))


@pytest.fixture(scope="module")
def doses(tmp_path_factory):
    variants = {f"x{i}": {"a": {"op": "scale", "factor": 1 + i / 4}} for i in (3, 1, 2)}
    return read_store(make_store(tmp_path_factory.mktemp("store") / "d", variants, PROMPTS[:1], (0, 1), name="dose"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One seed, a prompt outside the grammar of scenes with signs that matplotlib interprets, images not square."""
    path = tmp_path_factory.mktemp("store") / "o"
    return read_store(
        make_store(path, {"half": ARTICLE["half"]}, ["$5 and $6_x, 100 %"], seeds=(7,), size=(96, 64), caption="")
    )


@pytest.mark.parametrize(("module", "store"), [(article, "run"), (dose, "doses")], ids=["article", "dose"])
def test_files(module, store, tmp_path, request):
    store, stem = request.getfixturevalue(store), {"run": "article", "doses": "dose-curve"}[store]
    first = {file.name: file.read_bytes() for file in module.make(store, tmp_path / "a")}
    assert sorted(first) == sorted(
        [f"{stem}.txt", *(f"{stem}-{w}.{end}" for w in ("column", "page") for end in ("pdf", "png"))]
    )
    again = module.make(store, tmp_path / "b", widths=["column"])
    assert len(again) == 3
    assert all(file.read_bytes() == first[file.name] for file in again)
    for width, inches in {"column": style.COLUMN, "page": style.PAGE}.items():
        assert Image.open(tmp_path / "a" / f"{stem}-{width}.png").width == round(300 * inches)
        pdf = first[f"{stem}-{width}.pdf"]
        assert b"CIDFontType2" in pdf  # text, not outlines
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf


def test_images_are_the_cells_dot_by_dot(run, tmp_path):
    places = [(PROMPTS[0], 1), (PROMPTS[1], 0), (PROMPTS[1], 1)]
    drawn = article.draw(run, run.variants, places, ["ssim"], "page")
    file = style.save(drawn, tmp_path / "f")[1]
    page = np.asarray(Image.open(file).convert("RGB"))
    at = article.sheet((64, 64), len(run.variants), places, 1, "page")
    assert page.shape[:2] == (at.height, at.width)
    assert at.cell == (320, 320)  # whole factors only
    for row, variant in enumerate(run.variants):
        top = round(at.middle(row) - at.cell[1] / 2)
        for left, place in zip(at.lefts, places, strict=True):
            enlarged = np.asarray(Image.open(run.image(variant, *place))).repeat(5, 0).repeat(5, 1)
            assert np.array_equal(page[top : top + 320, left : left + 320], enlarged), (variant, place)


def test_points_and_lines_are_the_summary_s(run):
    """SSIM compares with the baseline. Letters describe one image, so their effect is the paired difference."""
    panels = article.draw(run, run.variants, run.places, ["ssim", "letters"], "page").axes[1:]
    assert [panel.get_xlabel() for panel in panels] == [
        "SSIM to the baseline",
        "Δ letters right",
    ]
    rows = {(row["variant"], row["metric"]): row for row in run.summary}
    for panel, metric, paired in zip(panels, ("ssim", "letters"), ("", "paired_"), strict=True):
        expected = {name: [rows[name, metric][f"{paired}{end}"] for end in ("mean", "low", "high")] for name in ALL}
        if paired:
            expected["baseline"] = [0.0]
        dots = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"]
        assert dots == [expected[variant][0] for variant in run.variants]
        bars = [list(line.get_xdata()) for line in panel.lines if line.get_ms() == 5]
        assert bars == [expected[variant][1:] for variant in run.variants if expected[variant][1:]]
        upright = [line.get_xdata()[0] for line in panel.lines if line.get_ydata()[0] == 0 and line.get_ms() > 5]
        assert upright == [expected[name][0] for name in CONTROLS]
        for variant, ticks in zip(run.variants, (line for line in panel.lines if line.get_ms() == 4), strict=True):
            before = [run.cell("baseline", *place)[metric] if paired else 0 for place in run.places]
            values = [run.cell(variant, *place)[metric] for place in run.places]
            assert list(ticks.get_xdata()) == [value - old for value, old in zip(values, before, strict=True)]
        assert all(panel.get_xlim()[0] < value < panel.get_xlim()[1] for value in dots)


def test_the_noise_floor_is_compared_at_its_own_cells(run):
    """It has the first seed only, so its own mean must not be compared with means over all seeds."""
    rows = [dict(row) for row in run.summary]
    for row in rows:
        if (row["variant"], row["metric"]) == ("noise floor", "letters"):
            row.update(mean=0.1, low=0.1, high=0.1, paired_mean=0.0, paired_low=0.0, paired_high=0.0)
    assert results.effects(replace(run, summary=rows), "letters")["noise floor"] == (0.0, 0.0, 0.0)


def test_rows_are_named_by_formula_and_name(run):
    canvas = article.draw(run, run.variants, run.places[:1], ["ssim"], "page").axes[0]
    texts = [text.get_text() for text in canvas.texts]
    for text in ("unchanged ids", "img_ids = 0", "img_ids × 0.5", "img_ids (index) = 1", *run.variants, "seed 0"):
        assert text in texts


@pytest.mark.parametrize(
    ("edit", "formula"),
    [
        ({"op": "scale", "factor": 0.5}, "img_ids × 0.5"),
        ({"op": "scale", "factor": {"row": 2}}, "img_ids (row) × 2"),
        ({"op": "scale", "factor": 2, "axes": ["row", "col"]}, "img_ids (row, col) × 2"),
        ({"op": "scale", "factor": [2, 3]}, "scale factor [–, 2, 3] on image"),
        ({"op": "scale", "factor": 2, "origin": "centre"}, "scale factor 2, origin centre on image"),
        ({"op": "zero", "tokens": "text", "steps": [0, 1]}, "txt_ids = 0, steps 0–1"),
        ({"op": "zero", "side": "keys", "blocks": 3}, "img_ids = 0, blocks 3, keys"),
        ({"op": "offset", "by": 3, "tokens": "all"}, "all ids + 3"),
        ({"op": "offset", "by": [-16, -16]}, "img_ids (row, col) - 16"),
        ({"op": "set", "value": 1, "axes": "index"}, "img_ids (index) = 1"),
        ({"op": "offset", "by": {"order": 8}, "tokens": "text"}, "txt_ids (order) + 8"),
        ({"op": "scale", "factor": {"l": 2}, "tokens": "text"}, "txt_ids (order) × 2"),
        ({"op": "zero", "tokens": {"words": ["cat"]}}, "zero on words 'cat'"),
        ({"op": "rotate", "degrees": 30}, "rotate degrees 30 on image"),
    ],
)
def test_formulas(edit, formula):
    assert results.formula(Program.from_config({"a": edit}).edits[0]) == formula


def test_an_op_that_is_not_loaded_is_described_as_in_the_store(run):
    mine = {"program": {"a": {"op": "mine", "by": 3}}, "describe": "mine by 3 on image"}
    assert results.label(type(run)(run.path, {"variants": {"m": mine}}, [], [], []), "m") == "mine by 3 on image"


def test_caption_has_the_numbers(run):
    text = article.caption(run, run.variants, ["ssim", "sawtooth"])
    rows = {(row["variant"], row["metric"]): row for row in run.summary}
    for name in (*run.variants, *CONTROLS):
        row = rows[name, "ssim"]
        line = next(line for line in text.splitlines() if line.startswith((f"  {name} (", f"  {name}: ")))
        assert f": {row['mean']:.3g} [{row['low']:.3g}, {row['high']:.3g}], n = {row['n']}" in line
    half, level = rows["half", "sawtooth"], rows["baseline", "sawtooth"]["mean"]
    assert f"half (img_ids × 0.5): Δ {half['paired_mean']:.3g} [{half['paired_low']:.3g}, " in text
    assert f"], baseline + Δ = {level + half['paired_mean']:.3g}, n = 4" in text
    floor = next(line for line in text.splitlines() if line.startswith("  noise floor: Δ"))
    assert floor.endswith("n = 2")  # the first seed of each prompt
    assert "shifted by (3, -2.5, 7)" in text
    assert "Model tiny" in text
    assert "16 steps, 64 × 64 px" in text
    assert run.record["digest"] in text
    assert "2 prompts × 2 seeds" in text


def test_numbers_as_text():
    values = (-0.0, 0.12345, 12.345, 0.012345, 1e-7, math.inf, math.nan, -math.inf)
    assert [results.number(value) for value in values] == ["0", "0.123", "12.3", "0.0123", "1e-07", "∞", "-", "-∞"]


def test_choice_of_images(run):
    cat, fox = PROMPTS
    assert results.pick_places(run, None, None, 4) == [(cat, 0), (cat, 1), (fox, 0), (fox, 1)]
    assert results.pick_places(run, None, None, 2) == [(cat, 0), (fox, 0)]
    assert results.pick_places(run, None, None, 1) == [(cat, 0)]
    assert results.pick_places(run, ["FOX"], None, 2) == [(fox, 0), (fox, 1)]
    assert results.pick_places(run, ["fox", "cat hold"], ["1"], 2) == [(fox, 1), (cat, 1)]
    assert results.pick_places(run, None, ["1", "0"], 2) == [(cat, 1), (cat, 0)]


def test_choice_of_metrics(run, odd):
    assert results.pick_metrics(run, None, 3) == ["ssim", "letters"]
    assert results.pick_metrics(odd, None, 3) == ["ssim", "sawtooth"]  # no scene, no letters
    assert results.pick_metrics(run, ["sawtooth", "displacement", "psnr"], 3) == ["sawtooth", "displacement", "psnr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,9"], "--seeds 0,9: the store has 0, 1"),
        (["--seeds", ","], "the store has 0, 1"),
        (["--prompt", "dog"], "no prompt contains it"),
        (["--prompt", "sign"], "more than one prompt contains it"),
        (["--metrics", "lpips"], "--metrics lpips: the store has psnr, ssim"),
        (["--metrics", "relation"], "--metrics relation: the store has"),  # no cell has a value
        (["--metrics", "ssim,psnr,rmse,word"], "expected at most 3"),
        (["--variants", "quarter"], "--variants quarter: the store has baseline, zero"),
        (["--width", "column", "--metrics", "ssim,psnr"], "column width shows one metric"),
        (["--width", "poster"], "--width"),
        (["--what"], "--what"),
    ],
)
def test_wrong_arguments_are_refused(run, tmp_path, capsys, arguments, message):
    assert results.run_command(article.make, "article", [str(run.path), "-o", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_not_a_store_and_a_damaged_store(tmp_path, capsys):
    assert results.run_command(article.make, "article", [str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    store = make_store(tmp_path / "s", {"half": ARTICLE["half"]}, PROMPTS[:1], (0,))
    cell = read_store(store).image("half", PROMPTS[0], 0)
    cell.write_bytes(cell.read_bytes()[:100])
    assert results.run_command(article.make, "article", [str(store), "-o", str(tmp_path / "x")]) == 2
    assert str(cell) in capsys.readouterr().err


def test_more_than_fits_is_refused():
    with pytest.raises(ValueError, match="60 variants do not fit a page; choose some with --variants"):
        article.sheet((64, 64), 60, [("a", 0)], 1, "page")
    with pytest.raises(ValueError, match="40 images do not fit column width"):
        article.sheet((64, 64), 2, [("a", seed) for seed in range(40)], 1, "column")


@pytest.mark.parametrize("native", [(64, 64), (1024, 1024), (1344, 768), (48, 80)])
@pytest.mark.parametrize(("rows", "pictures"), [(2, 1), (6, 4), (26, 3), (40, 2)])
def test_nothing_overlaps(native, rows, pictures):
    for width, plots in (("column", 1), ("page", 1), ("page", 3)):
        places = [(f"prompt {i % 2}", i) for i in sorted(range(pictures), key=lambda i: i % 2)]
        at = article.sheet(native, rows, places, plots, width)
        assert at.height <= 2700
        assert at.cell[1] <= at.pitch
        edges = [(left, left + at.cell[0]) for left in at.lefts] + [(left, left + wide) for left, wide in at.panels]
        assert at.label <= edges[0][0]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(edges))
        assert edges[-1][1] <= at.width


METRICS = ["psnr", "spectrum_slope", "thing_moved_row"]  # long names, minus signs, several lines


@pytest.mark.parametrize("width", ["column", "page"])
def test_all_text_is_on_the_page(run, doses, width):
    metrics = METRICS if width == "page" else METRICS[1:2]
    name, found = dose.varied(doses, doses.variants[1:])
    for figure in (
        article.draw(run, run.variants, run.places, metrics, width),
        dose.draw(doses, name, found, doses.places[0], metrics, width),
    ):
        FigureCanvasAgg(figure).draw()
        canvas, *panels = figure.axes
        boxes = [panel.get_tightbbox() for panel in panels]
        boxes += [text.get_window_extent() for text in (*canvas.texts, canvas.get_legend())]
        for box in boxes:
            assert box.x0 >= 0, box
            assert box.y0 >= 0, box
            assert box.x1 <= figure.bbox.x1, box
            assert box.y1 <= figure.bbox.y1, box


def test_fit_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
    assert np.array_equal(np.asarray(fit_image(image, (20, 20))), np.asarray(image).repeat(3, 0).repeat(3, 1))
    assert fit_image(image, (3, 20)).size == (3, 2)


def test_any_store(odd, tmp_path):
    made = article.make(odd, tmp_path)
    assert len(made) == 5
    canvas = article.draw(odd, odd.variants, odd.places, ["ssim"], "page").axes[0]
    assert any("“$5 and" in text.get_text() and not text.get_parse_math() for text in canvas.texts)
    caption = made[-1].read_text()
    assert "baseline (unchanged ids): 1, n = 1" in caption  # one image has no interval
    decibels = article.draw(odd, odd.variants, odd.places, ["psnr"], "page").axes[1]
    assert decibels.get_xlabel() == "PSNR to the baseline (dB)"
    assert [text.get_text() for text in decibels.texts] == ["∞"]  # the baseline against itself


def test_the_curve_is_in_the_order_of_the_numbers(doses):
    name, found = dose.varied(doses, doses.variants[1:])
    assert (name, found) == ("x, for img_ids × x", [(1.25, "x1"), (1.5, "x2"), (1.75, "x3")])
    figure = dose.draw(doses, name, found, doses.places[0], ["ssim"], "page")
    canvas, axes = figure.axes
    rows = {(row["variant"], row["metric"]): row for row in doses.summary}
    curve = next(line for line in axes.lines if line.get_label() == "mean")
    assert list(curve.get_xdata()) == [1.25, 1.5, 1.75]
    assert list(curve.get_ydata()) == [rows[variant, "ssim"]["mean"] for _, variant in found]
    for name in CONTROLS:
        n = rows[name, "ssim"]["n"]
        line = next(line for line in axes.lines if line.get_label() == f"{name} (n = {n})")
        assert line.get_ydata()[0] == rows[name, "ssim"]["mean"]
    assert [text.get_text() for text in canvas.texts][1:] == ["1.25", "1.5", "1.75"]
    assert len(canvas.images) == 3
    middles = [sum(image.get_extent()[:2]) / 2 for image in canvas.images]
    over = [axes.transData.transform((x, 0))[0] / figure.dpi * 300 for x in (1.25, 1.5, 1.75)]
    assert middles == pytest.approx(over, abs=1)


@pytest.mark.parametrize(
    ("edits", "name", "values"),
    [
        ([{"op": "rotate", "degrees": d} for d in (5, 10)], "degrees of rotate", [5, 10]),
        ([{"op": "zero", "side": "keys", "blocks": b} for b in (4, 2)], "blocks of zero", [4, 2]),
        ([{"op": "offset", "by": [b, b]} for b in (1, 64)], "x, for img_ids (row, col) + x", [1, 64]),
        ([{"op": "scale", "factor": 2, "strength": s} for s in (0.5, 1)], "strength of scale", [0.5, 1]),
        ([{"op": "offset", "by": b} for b in ([1, 1], 2)], None, None),  # on two axes and on three
        ([{"op": "scale", "factor": 2}, {"op": "rotate", "degrees": 5}], None, None),
        ([{"op": "scale", "factor": 2}], None, None),
        ([{"op": "zero", "tokens": t} for t in ("text", "image")], None, None),
    ],
)
def test_the_number_that_varies(run, edits, name, values):
    programs = {f"v{i}": {"program": {"a": edit}} for i, edit in enumerate(edits)}
    made = type(run)(run.path, {"variants": programs}, [], [], [])
    if name is None:
        with pytest.raises(ValueError, match="expected two or more variants that differ in one number"):
            dose.varied(made, list(programs))
    else:
        assert dose.varied(made, list(programs)) == (
            name,
            sorted((value, f"v{i}") for i, value in enumerate(values)),
        )


def test_command(doses, tmp_path, capsys):
    arguments = [str(doses.path), "-o", str(tmp_path / "f"), "--width", "column", "--variants", "x1,x3"]
    assert results.run_command(dose.make, "dose", arguments) == 0
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.split()] == [
        "dose-curve-column.pdf",
        "dose-curve-column.png",
        "dose-curve.txt",
    ]
    assert "2 values from 1.25 to 1.75" in (tmp_path / "f" / "dose-curve.txt").read_text()


@pytest.mark.parametrize("flags", [["--seeds", "0,1"], ["--prompt", "cat", "--prompt", "sign"]])
def test_a_curve_refuses_images_that_it_would_not_draw(doses, tmp_path, capsys, flags):
    assert results.run_command(dose.make, "dose", [str(doses.path), "-o", str(tmp_path / "f"), *flags]) == 2
    assert "one prompt and one seed; name one" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_captions_print_the_whole_commit(run):
    """A shortened commit would lose the mark of modified files."""
    commit = "0123456789abcdef0123456789abcdef01234567-dirty"
    record = {**run.record, "versions": {**run.record["versions"], "commit": commit}}
    assert f"commit {commit}" in article.caption(replace(run, record=record), run.variants, ["ssim"])
