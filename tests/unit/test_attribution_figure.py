"""The comparison of gradients with ablations: its statistics on made-up numbers."""

import numpy as np
import pytest

from experiments import attribution


def made(predicted):
    measured = np.tile(np.arange(1.0, 21), (5, 1))
    names = np.array([f"block 0 head {i} {axis} short" for i, axis in enumerate(["row", "col"] * 10)])
    return {"predicted": predicted(measured), "measured": -measured, "names": names}


def test_a_perfect_prediction():
    rows = attribution.summary(made(lambda m: 0.5 * m), tops=(5,), draws=50)
    assert rows["rank correlation"] == pytest.approx([1, 1, 1])
    assert rows["top 5"] == pytest.approx([90 / 210] * 3)
    assert rows["random 5"][0] == pytest.approx(0.25)


def test_a_prediction_in_reverse():
    rows = attribution.summary(made(lambda m: 21 - m), tops=(5,), draws=50)
    assert rows["rank correlation"][0] == pytest.approx(-1)
    assert rows["top 5"][0] == pytest.approx(15 / 210)


def test_the_figure_shows_every_band():
    found = made(lambda m: 0.5 * m)
    lines = attribution.draw(found, attribution.summary(found, draws=50)).axes[0].lines
    assert sum(len(line.get_xdata()) for line in lines if line.get_marker() != "None") == 20


def test_more_bands_than_asked_for_are_chosen_at_random():
    every = [(0, n, "row", "short", np.array([0])) for n in range(50)]
    some = [band[1] for band in attribution.chosen(every, 10)]
    assert len(set(some)) == 10
    assert some == sorted(some) != list(range(10))
    assert some == [band[1] for band in attribution.chosen(every, 10)]
    assert attribution.chosen(every, 50) == every


def test_from_the_command_line(tmp_path, monkeypatch):
    """One prompt, one image, three bands: what one backward predicts, and what the ablation of each gives."""
    monkeypatch.setattr(attribution.measure, "__defaults__", (attribution.PROMPTS[:1],))
    words = ["device=cpu", "steps=1", "--seeds", "1", "--bands", "3", "-o", str(tmp_path)]
    assert attribution.main(words) == 0
    text = (tmp_path / "attribution.txt").read_text()
    assert "3 bands" in text
    assert "1 noise levels" in text
    assert text.rstrip().endswith("python -m experiments.attribution device=cpu steps=1 --seeds 1 --bands 3")
