"""The paper's figures that need no run: what they show, and that two runs give the same bytes."""

import math

import pytest
from PIL import Image

from experiments import ids, schedule, style

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
        assert b"CIDFontType2" in pdf  # letters, not outlines
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf


def test_schedule_curves_are_the_shift():
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


def test_ids_cells_are_the_ids():
    panels = {axes.get_title(): axes for axes in ids.draw(style.PAGE, columns=4).axes}
    said = {title: [text.get_text() for text in axes.texts] for title, axes in panels.items()}
    grid = [(r, c) for r in range(3) for c in range(3)]
    assert said["img_ids"] == [f"0, {r}, {c}" for r, c in grid]
    assert said["txt_ids"] == ["0, 0, 0"] * 3
    assert said["img_ids, all zero"] == ["0, 0, 0"] * 9
    assert said["img_ids, axis 0 = 1"] == [f"1, {r}, {c}" for r, c in grid]
    for factor in (0.5, 2, 1.2):
        assert said[f"img_ids, × {factor}"] == [f"0, {factor * r:.3g}, {factor * c:.3g}" for r, c in grid]
    tinted = [patch.get_facecolor()[:3] != (1, 1, 1) for patch in panels["img_ids, × 2"].patches]
    assert tinted == [False] + [True] * 8


def test_ids_caption():
    text = ids.caption()
    assert "× 1.2: 8 of 9 tokens change." in text
    assert "columns run from 0 to 75.6, 1.2 apart; index 0; 4096 places for 4096 tokens." in text
    assert "axis 0 = 1: 9 of 9 tokens change." in text
    assert "index 0; 1 place for 4096 tokens." in text


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert style.command(schedule.make, "schedule", ["-o", str(tmp_path / "file" / "x")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
