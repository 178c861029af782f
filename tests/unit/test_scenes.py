"""Scenes: sampling, captions and their parser, held-out scenes, rendering, errors."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab import scenes
from fluxlab.scenes.font import GLYPHS


def sample(split="train", n=300, size=(64, 64), seed=0):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, size, split) for _ in range(n)]


def test_the_same_seed_gives_the_same_scenes():
    images, captions = scenes.batch(np.random.default_rng(3), 20)
    again, captions_again = scenes.batch(np.random.default_rng(3), 20)
    other, _ = scenes.batch(np.random.default_rng(4), 20)
    assert (images == again).all()
    assert captions == captions_again
    assert (images != other).any()


def test_a_batch():
    images, captions = scenes.batch(np.random.default_rng(0), 5, (48, 80), "all")
    assert images.shape == (5, 48, 80, 3)
    assert images.dtype == np.uint8
    assert len(captions) == 5


def test_numbers_of_things_colours_and_words():
    assert len(scenes.THINGS) >= 8
    assert len(scenes.COLOURS) >= 6
    assert len(scenes.WORDS) >= 24
    assert {"hello", "world"} <= set(scenes.WORDS)
    assert len(set(scenes.WORDS)) == len(scenes.WORDS)


def test_letters_and_things_differ():
    assert min(int((a != b).sum()) for a, b in itertools.combinations(GLYPHS.values(), 2)) >= 2
    for side in (20, 22, 24):
        masks = [scenes.thing_mask(name, side) for name in scenes.THINGS]
        assert max((a & b).sum() / (a | b).sum() for a, b in itertools.combinations(masks, 2)) < 0.85


def test_colours_differ():
    colours = np.array([*scenes.COLOURS.values(), *scenes.BACKGROUNDS.values()], dtype=float)
    among_things = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours[: len(scenes.COLOURS)], 2)]
    to_backgrounds = np.linalg.norm(
        colours[: len(scenes.COLOURS), None] - colours[None, len(scenes.COLOURS) :], axis=-1
    )
    assert min(among_things) > 75
    assert to_backgrounds.min() > 75


@pytest.mark.parametrize("size", scenes.SIZES)
def test_everything_is_inside_the_image_and_nothing_is_covered(size):
    for scene in sample("all", 80, size):
        image = scenes.render(scene)
        assert image.shape == (*size, 3)
        for thing in scene.things:
            ink = int(scenes.thing_mask(thing.name, thing.size).sum())
            assert (image == scenes.COLOURS[thing.colour]).all(-1).sum() == ink  # nothing clipped, nothing covered
            if thing.place:
                assert scenes.place_of(thing.row, thing.col, size) == thing.place
        if scene.sign:
            top, left, bottom, right = scene.sign.box
            assert top >= 0
            assert left >= 0
            assert bottom <= size[0]
            assert right <= size[1]
            assert scene.sign.row % 4 == 0  # on the token grid
            assert scene.sign.col % 4 == 0
        if scene.relation:
            first, second = ((t.row, t.col) for t in scene.things)
            assert scenes.relation_of(first, second) == scene.relation


def test_held_out_scenes_are_not_in_the_training_split():
    train, heldout = sample("train", 800), sample("heldout", 200)
    assert not any(map(scenes.held_out, train))
    assert all(map(scenes.held_out, heldout))

    def key(scene):
        return tuple((t.colour, t.name) for t in scene.things), scene.sign.words[0] if scene.sign else None

    assert not {key(s) for s in train} & {key(s) for s in heldout}
    everything = sample("all", 800)
    assert 0.08 < sum(map(scenes.held_out, everything)) / len(everything) < 0.16


def test_the_prompt_of_the_article_is_in_distribution():
    rng = np.random.default_rng(0)
    cats = (s for s in sample(n=4000) if s.sign and s.sign.words == ("hello", "world") and s.things[0].name == "cat")
    captions = {scenes.caption(s, rng, "partial").lower() for s in cats}
    assert "a cat holding a sign that says hello world" in captions


def test_a_tenth_of_captions_is_empty_and_half_start_with_a_capital():
    _, captions = scenes.batch(np.random.default_rng(0), 2000)
    assert 0.08 < captions.count("") / len(captions) < 0.12
    written = [c for c in captions if c]
    assert 0.45 < sum(c.startswith("A") for c in written) / len(written) < 0.55


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from(["train", "heldout", "all"]), st.sampled_from([None, "full", "partial"])
)
def test_captions_describe_their_scene_and_parse(seed, split, form):
    rng = np.random.default_rng(seed)
    scene = scenes.sample_scene(rng, (64, 64), split)
    text = scenes.caption(scene, rng, form)
    wanted, everything = scenes.parse(text), scenes.wanted_of(scene)
    assert scenes.write(wanted) == text.lower()
    assert set(text.lower().split()) <= set(scenes.VOCABULARY)
    if form == "full":
        assert wanted == everything
    if text:
        for name, value in vars(wanted).items():
            assert value in (None, getattr(everything, name))
        assert wanted.sign == everything.sign


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", scenes.Wanted()),
        ("A cat holding a sign that says hello world", scenes.Wanted("cat", sign=("hello", "world"))),
        ("an orange star at the top.", scenes.Wanted("star", "orange", "top")),
        (
            "a blue ring left of a green square",
            scenes.Wanted("ring", "blue", relation="left of", second="square", second_colour="green"),
        ),
    ],
)
def test_parse(text, expected):
    assert scenes.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "an cat",
        "a orange cat",
        "red fox",
        "a cat holding a sign that says bye",
        "a cat above",
        "a cat on the top",
    ],
)
def test_captions_outside_the_grammar_are_errors(text):
    with pytest.raises(ValueError, match="caption="):
        scenes.parse(text)


@pytest.mark.parametrize("form", scenes.FORMS)
def test_forms(form):
    rng, count = np.random.default_rng(0), 0
    for scene in sample(n=60):
        single = len(scene.things) == 1 and not scene.sign
        if (form == "relation" and not scene.relation) or (form == "thing" and not single):
            with pytest.raises(ValueError, match="form="):
                scenes.caption(scene, rng, form)
        else:
            count += 1
            assert (scenes.caption(scene, rng, form) == "") == (form == "empty")
    assert count


def test_errors_name_the_value():
    rng = np.random.default_rng(0)
    for size in [(64, 62), (44, 64), (64, 84), (64,)]:
        with pytest.raises(ValueError, match="size="):
            scenes.sample_scene(rng, size)
    with pytest.raises(ValueError, match="split='test'"):
        scenes.sample_scene(rng, split="test")
    with pytest.raises(ValueError, match="n=0"):
        scenes.batch(rng, 0)
    with pytest.raises(ValueError, match="'dog'"):
        scenes.thing_mask("dog", 20)
    with pytest.raises(ValueError, match="no glyph"):
        scenes.text_mask(("a-b",))
    scene = sample(n=1)[0]
    with pytest.raises(ValueError, match="form='poem'"):
        scenes.caption(scene, rng, "poem")
    with pytest.raises(ValueError, match="background='pink'"):
        scenes.render(replace(scene, background="pink"))
    with pytest.raises(ValueError, match="not completely inside the image"):
        scenes.render(replace(scene, things=(replace(scene.things[0], row=-3),)))


@pytest.mark.parametrize("scale", [2, 3])
def test_a_scene_at_a_multiple_of_its_size(scale):
    """Background, board, text and stick are those of the scene with larger pixels; things are drawn at their size."""
    for scene in sample("all", n=40, size=(48, 64)):
        large = scenes.render(scene, scale=scale)
        empty = replace(scene, things=())
        expected = scenes.render(empty).repeat(scale, 0).repeat(scale, 1) if scene.sign else None
        boxes = np.zeros(large.shape[:2], dtype=bool)
        for thing in scene.things:
            side, mask = thing.size * scale, scenes.thing_mask(thing.name, thing.size * scale)
            top, left = (int(scale * (middle - thing.size / 2)) for middle in (thing.row, thing.col))
            boxes[top : top + side, left : left + side] = True
            if not scene.sign:
                shown = (large[top : top + side, left : left + side] == scenes.COLOURS[thing.colour]).all(-1)
                assert (shown == mask).all()
        if scene.sign:
            assert (large == expected)[~boxes].all()
        else:
            assert (large[~boxes] == scenes.BACKGROUNDS[scene.background]).all()
