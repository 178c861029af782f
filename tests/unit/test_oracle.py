from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fluxlab import scenes
from fluxlab.measure.oracle import ATTRIBUTES, inspect, tally
from fluxlab.measure.regions import components


def sample(seed, n, size=(64, 64), split="all", keep=lambda scene: True):
    rng, found = np.random.default_rng(seed), []
    while len(found) < n:
        scene = scenes.sample_scene(rng, size, split)
        if keep(scene):
            found.append(scene)
    return found


def full(scene):
    return scenes.write(scenes.wanted_of(scene))


def signed(scene):
    return scene.sign is not None


def pair(scene):
    return scene.relation is not None


def box_blur(image):
    """Mix each pixel with its four neighbours, which have a weight of 1/16 each."""
    padded = np.pad(image / 255, ((1, 1), (1, 1), (0, 0)), mode="edge")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return 0.75 * padded[1:-1, 1:-1] + neighbours / 16


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_renders_are_read_correctly(split):
    made = [s for i, size in enumerate(scenes.SIZES) for s in sample(i, 15, size, split)]
    reports = [inspect(scenes.render(s), full(s)) for s in made]
    for name, (right, of) in tally(reports).items():
        assert of > 5, name
        assert right / of >= 0.995, name
    letters = [r.letter_accuracy for r in reports if r.letter_accuracy is not None]
    assert np.mean(letters) >= 0.995


@pytest.mark.parametrize("spoil", ["noise", "blur"])
def test_slightly_degraded_renders_are_read_correctly(spoil):
    rng = np.random.default_rng(0)
    made = sample(1, 80)
    images = [scenes.render(s) for s in made]
    images = [
        np.clip(x + rng.normal(0, 12, x.shape), 0, 255).astype(np.uint8) if spoil == "noise" else box_blur(x)
        for x in images
    ]
    reports = [inspect(x, full(s)) for x, s in zip(images, made, strict=True)]
    for name, (right, of) in tally(reports).items():
        assert right / of >= 0.97, name


def other_colour(scene, rng):
    first = scene.things[0]
    taken = {t.colour for t in scene.things}
    colour = rng.choice([c for c in scenes.COLOURS if c not in taken])
    return replace(scene, things=(replace(first, colour=str(colour)), *scene.things[1:]))


def other_thing(scene, rng):
    first = scene.things[0]
    taken = {t.name for t in scene.things}
    name = rng.choice([n for n in scenes.THINGS if n not in taken])
    return replace(scene, things=(replace(first, name=str(name)), *scene.things[1:]))


def other_words(scene, rng):
    words = list(scene.sign.words)
    line = rng.integers(len(words))
    longest = max(map(len, words))
    # of the same length, so that the board keeps its size and position
    fits = [w for w in scenes.WORDS if len(w) == len(words[line]) <= longest and w != words[line]]
    words[line] = str(rng.choice(fits))
    return replace(scene, sign=replace(scene.sign, words=tuple(words)))


def other_relation(scene, rng):
    one, two = scene.things
    moved = (replace(one, row=two.row, col=two.col), replace(two, row=one.row, col=one.col))
    return replace(scene, things=moved)


def no_sign(scene, rng):
    return replace(scene, sign=None)


def other_place(scene, rng):
    thing = scene.things[0]
    row, col = scene.size[0] - thing.row, scene.size[1] - thing.col  # mirrored at the middle
    return replace(scene, things=(replace(thing, row=row, col=col),))


@pytest.mark.parametrize(
    ("change", "keep", "expected"),
    [
        (other_colour, lambda s: True, {"colour"}),
        (other_thing, lambda s: True, {"shape"}),
        (other_words, signed, {"word"}),
        (other_relation, pair, {"relation"}),
        (no_sign, signed, {"sign", "word"}),
        (other_place, lambda s: not signed(s) and not pair(s) and s.things[0].place != "centre", {"place"}),
    ],
)
def test_one_change_is_reported_and_nothing_else(change, keep, expected):
    rng, right = np.random.default_rng(0), 0
    made = sample(2, 40, keep=keep)
    for scene in made:
        report = inspect(scenes.render(change(scene, rng)), full(scene))
        right += set(report.wrong) == expected
    assert right / len(made) >= 0.995


def test_a_missing_thing_is_reported():
    for scene in sample(3, 40, keep=signed):
        report = inspect(scenes.render(replace(scene, things=())), full(scene))
        assert {"object", "colour", "shape", "place"} == set(report.wrong)
        assert report.things == ()


def test_a_sign_that_the_caption_does_not_have_is_wrong():
    scene = sample(4, 1, keep=signed)[0]
    report = inspect(scenes.render(scene), scenes.write(replace(scenes.wanted_of(scene), sign=None)))
    assert report.wrong == ("sign",)


def test_positions_are_in_pixels():
    for scene in sample(5, 60):
        report = inspect(scenes.render(scene), full(scene))
        for thing, found in zip(scene.things, report.things, strict=True):
            assert abs(found.centre[0] - thing.row) <= 1.5
            assert abs(found.centre[1] - thing.col) <= 1.5
            assert abs(found.size - thing.size) <= 2
            mask = scenes.thing_mask(thing.name, thing.size)
            corner = np.array([thing.row, thing.col]) - thing.size / 2
            centroid = np.argwhere(mask).mean(0) + 0.5 + corner
            assert np.allclose((found.row, found.col), centroid)
            assert found.area == mask.sum()
            assert found.iou == pytest.approx(1)
        if scene.sign:
            top, left, bottom, right = scene.sign.box
            assert report.board.box == (top + 1, left + 1, bottom - 1, right - 1)
            assert report.board.words == scene.sign.words


def test_a_shift_of_the_image_is_measured_exactly():
    scene = sample(6, 1, keep=lambda s: signed(s) and s.things[0].place == "left")[0]
    image = scenes.render(scene)
    moved = np.concatenate([image[:, -1:].repeat(5, 1), image[:, :-5]], axis=1)
    before, after = inspect(image, full(scene)), inspect(moved, full(scene))
    assert after.things[0].col - before.things[0].col == pytest.approx(5)
    assert after.things[0].row == pytest.approx(before.things[0].row)
    assert after.board.centre[1] - before.board.centre[1] == 5


def test_letters_are_read_one_by_one():
    scene = sample(7, 1, keep=lambda s: signed(s) and s.sign.words == ("hello", "world"))[0]
    image = scenes.render(scene)
    row, col = scene.sign.row, scene.sign.col
    image[row : row + 7, col + 4 : col + 7] = image[row - 1, col]  # erase the e
    report = inspect(image, full(scene))
    assert report.letter_accuracy == pytest.approx(0.9)
    assert report.board.letters == ("h llo", "world")


def test_blank_and_noisy_images_contain_nothing():
    rng = np.random.default_rng(0)
    caption = "a red cat on the left holding a sign that says hello world"
    images = [np.full((64, 64, 3), v, np.uint8) for v in (0, 128, 255)]
    images += [np.broadcast_to(np.array(c, np.uint8), (48, 80, 3)) for c in scenes.COLOURS.values()]
    images += [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    images += [rng.normal(0.5, 0.15, (64, 80, 3)).astype(np.float32) for _ in range(5)]
    images += [np.full((64, 64, 3), np.nan, np.float32), np.zeros((1, 1, 3), np.uint8), np.zeros((5, 9, 3), np.uint8)]
    for image in images:
        report = inspect(image, caption)
        assert not report.word
        assert not report.shape
        assert report.letter_accuracy < 0.5
        inspect(image, "a red ring above a blue square")
        inspect(image, "")


def test_an_empty_caption_says_nothing():
    report = inspect(scenes.render(sample(8, 1)[0]), "")
    assert report.things
    assert all(getattr(report, name) is None for name in ATTRIBUTES)
    assert report.wrong == ()


def test_uint8_float_and_pil_images_agree():
    scene = sample(9, 1, keep=signed)[0]
    image = scenes.render(scene)
    expected = inspect(image, full(scene))
    assert inspect(Image.fromarray(image), full(scene)) == expected
    assert inspect(image / 255, scenes.wanted_of(scene)) == expected


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64, 3), int), -np.ones((64, 64, 3))],
)
def test_other_images_are_rejected(image):
    with pytest.raises(ValueError, match="image: "):
        inspect(image, "a cat")


def test_components_are_eight_connected():
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random((12, 17)) < rng.uniform(0.1, 0.7)
        found, count = components(mask)
        assert ((found > 0) == mask).all()
        expected = np.where(
            mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0
        )  # spread the largest number until nothing changes
        while True:
            padded = np.pad(expected, 1)
            spread = np.max([padded[y : y + 12, x : x + 17] for y in range(3) for x in range(3)], axis=0) * mask
            if (spread == expected).all():
                break
            expected = spread
        pairs = set(zip(found[mask].tolist(), expected[mask].tolist(), strict=True))
        assert len(pairs) == count == len({a for a, _ in pairs}) == len({b for _, b in pairs})
