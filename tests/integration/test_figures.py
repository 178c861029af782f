"""Figures that need no run: their content, and that two calls write the same bytes."""

import math
from pathlib import Path

import pytest
from PIL import Image

from experiments import gallery, ids, schedule, style
from tests.stores import make_store

ROOT = Path(__file__).parents[2]
WIDTHS = {"column": style.COLUMN, "page": style.PAGE}


@pytest.mark.parametrize("module", [schedule, ids], ids=["schedule", "ids"])
def test_files(module, tmp_path, capsys):
    name = module.__name__.rpartition(".")[2]
    first, again = ({f.name: f.read_bytes() for f in module.make(tmp_path / folder)} for folder in ("a", "b"))
    assert first == again
    assert sorted(first) == sorted([f"{name}.txt", *(f"{name}-{w}.{end}" for w in WIDTHS for end in ("pdf", "png"))])
    for width, inches in WIDTHS.items():
        assert Image.open(tmp_path / "a" / f"{name}-{width}.png").width == round(300 * inches)
        pdf = first[f"{name}-{width}.pdf"]
        assert b"CIDFontType2" in pdf  # text, not outlines
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf


def test_schedule_curves_are_the_time_shift():
    axes, steps = schedule.draw(style.PAGE, steps=True).axes
    curves = {line.get_label(): line for line in axes.lines}
    assert set(curves) == {"not shifted", "μ = 0.5", "μ = 0.75", "μ = 1", "μ = 1.15"}
    for mu in (0.5, 0.75, 1.0, 1.15):
        for t, sigma in zip(*curves[f"μ = {mu:g}"].get_data(), strict=True):
            assert sigma == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / t - 1) if t else 0, abs=1e-12)
    assert list(curves["not shifted"].get_xdata()) == list(curves["not shifted"].get_ydata())
    assert [len(line.get_xdata()) for line in steps.lines] == [28] * 5


def test_schedule_caption():
    text = schedule.caption()
    assert "μ = 1.15 (4096 tokens, 1024 pixels square, e^μ = 3.16): σ = 0.760 at t = 0.5; 22 of 28 steps" in text
    assert "μ = 0.5 (256 tokens, 256 pixels square" in text
    assert "not shifted: σ = 0.500 at t = 0.5; 14 of 28" in text


def test_ids_are_printed_in_the_tokens():
    panels = {axes.get_title(): axes for axes in ids.draw(style.PAGE, columns=4).axes}
    texts = {title: [text.get_text() for text in axes.texts] for title, axes in panels.items()}
    grid = [(r, c) for r in range(3) for c in range(3)]
    assert texts["img_ids"] == [f"0, {r}, {c}" for r, c in grid]
    assert texts["txt_ids"] == ["0, 0, 0"] * 3
    assert texts["img_ids, all zero"] == ["0, 0, 0"] * 9
    assert texts["img_ids, axis 0 = 1"] == [f"1, {r}, {c}" for r, c in grid]
    for factor in (0.5, 2, 1.2):
        assert texts[f"img_ids, × {factor}"] == [f"0, {factor * r:.3g}, {factor * c:.3g}" for r, c in grid]
    tinted = [patch.get_facecolor()[:3] != (1, 1, 1) for patch in panels["img_ids, × 2"].patches]
    assert tinted == [False] + [True] * 8


def test_ids_caption():
    text = ids.caption()
    assert "× 1.2: 8 of 9 tokens change." in text
    assert "columns run from 0 to 75.6, 1.2 apart; index 0; 4096 positions for 4096 tokens." in text
    assert "axis 0 = 1: 9 of 9 tokens change." in text
    assert "index 0; 1 position for 4096 tokens." in text


def test_a_folder_that_cannot_be_created_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert style.command(schedule.make, "schedule", ["-o", str(tmp_path / "file" / "x")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--width", "page"], ["store"], ["-o"]])
def test_arguments_that_a_figure_does_not_have_are_refused(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert style.command(schedule.make, "schedule", arguments) == 2
    assert "; see --help" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gallery_leaves_the_committed_figures_alone(tmp_path, capsys, monkeypatch):
    store = make_store(tmp_path / "store", {"half": {"a": {"op": "scale", "factor": 0.5}}}, seeds=(0,))
    committed = {file: file.stat().st_mtime_ns for file in (ROOT / "experiments" / "gallery").iterdir()}
    monkeypatch.chdir(tmp_path)
    assert gallery.main([str(store)]) == 0
    assert sorted(path.name for path in (tmp_path / "figures" / "gallery").iterdir()) == [
        "article.png",
        "ids.png",
        "schedule.png",
    ]
    assert gallery.main([str(store), "-o", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "ids.png").is_file()
    assert {file: file.stat().st_mtime_ns for file in committed} == committed
    capsys.readouterr()
    assert gallery.main([str(tmp_path / "none")]) == 2
    assert gallery.main([]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
