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
    assert sum(len(line.get_xdata()) for line in lines) == 20
