"""The numbers of the model card: those of `fluxlab.measure`, on drawn pictures."""

import json

import numpy as np
import pytest

from benchmarks.embedded import COLUMNS, scores, table, two_word_scores
from fluxlab import scenes
from fluxlab.measure import METRICS, compare, describe
from fluxlab.training.card import shown


@pytest.fixture(scope="module")
def drawn():
    """Captions of scenes with a sign, and their pictures."""
    rng = np.random.default_rng(0)
    found = [scene for scene in (scenes.sample_scene(rng, (64, 64), "heldout") for _ in range(60)) if scene.sign][:6]
    captions = [scenes.caption(scene, rng, "full").lower() for scene in found]
    return captions, np.stack([scenes.render(scene) for scene in found])


def test_drawn_pictures_are_right_and_their_own_baselines(drawn):
    captions, images = drawn
    found = scores(images, images, captions, range(6), period=4)
    assert list(found) == list(COLUMNS)
    for name in ("object", "colour", "shape", "place", "sign", "word", "letters", "ssim"):
        assert found[name] == [1, 1, 1], name
    assert METRICS[COLUMNS["edges"]].unit == "1/px²"
    assert found["edges"][0] == pytest.approx(np.mean([describe(image, 4)["edge_energy"] for image in images]))
    assert found["edges"][1] < found["edges"][0] < found["edges"][2]
    assert 8 < found["size"][0] < 40


def test_a_changed_picture_is_compared_with_its_baseline(drawn):
    captions, images = drawn
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    found = scores(mirrored, images, captions, range(6), period=4)
    pairs = zip(mirrored, images, strict=True)
    assert found["ssim"][0] == pytest.approx(np.mean([compare(image, before)["ssim"] for image, before in pairs]))
    assert found["word"][0] < 0.5  # wow reads the same from behind
    assert found["edges"][0] == pytest.approx(scores(images, images, captions, range(6), 4)["edges"][0])


def test_signs_with_two_words_are_scored_apart(drawn):
    captions, images = drawn
    two = [i for i, caption in enumerate(captions) if len(caption.split(" says ")[1].split()) == 2]
    assert 0 < len(two) < len(captions)
    found = two_word_scores(images, captions, range(6), period=4)
    assert found == {"cells": len(two), "word": [1, 1, 1], "letters": [1, 1, 1]}
    wrong = images.copy()
    wrong[two[0]] = 255
    assert two_word_scores(wrong, captions, range(6), period=4)["word"][0] == pytest.approx(1 - 1 / len(two))
    one = [i for i in range(6) if i not in two]
    assert two_word_scores(images[one], [captions[i] for i in one], one, period=4) == {"cells": 0}


def test_what_is_not_there_has_no_number(drawn):
    captions, images = drawn
    empty = np.full_like(images[:1], 255)
    found = scores(empty, images[:1], captions[:1], [0], period=4)
    assert found["size"] is None
    assert found["object"] == [0, None, None]  # one picture has no interval
    results = {"edits": {"as trained": scores(images, images, captions, range(6), 4), "gone": found}}
    json.dumps(results, allow_nan=False)
    lines = table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "100.0 % [100, 100]" in lines[1]
    assert lines[2].split()[:3] == ["gone", "0.0", "%"]
    assert lines[2].endswith("–")


def test_cards_show_numbers_in_their_units():
    assert shown([0.984, 0.96, 1.0], "word") == "98.4 % [96, 100]"
    assert shown([0.41234, 0.39, 0.431], "ssim") == "0.412 [0.390, 0.431]"
    assert shown([0.00412, 0.0039, 0.00431], "edges") == "0.0041 [0.0039, 0.0043]"
    assert shown([22.97, 22.3, 23.64], "size") == "23.0 [22.3, 23.6]"
    assert shown([0.5, None, None], "ssim") == "0.500"
    assert shown(None, "size") == "–"
