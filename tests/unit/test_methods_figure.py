"""Methods side by side: what is read in enlarged images, and the choice on one half of the prompts."""

import numpy as np
import pytest
from PIL import Image

import fluxlab
from experiments import methods, methodtable
from fluxlab.config import ModelRow
from fluxlab.scenes import parse
from tests.stores import _scene, make_store

PROMPTS = (
    "a red fox on the left holding a sign that says open",
    "a blue heart on the right holding a sign that says rain",
)
VARIANTS = {
    "bicubic": {"a": {"op": "resample"}},
    "pi": {"a": {"op": "pi"}},
    "ntk": {"a": {"op": "ntk"}},
    "ultravico": {"a": {"op": "distance", "factor": 0.9}},
    "pi_ultravico": {"a": {"op": "pi"}, "b": {"op": "distance", "factor": 0.9}},
    "ntk_ultravico": {"a": {"op": "ntk"}, "b": {"op": "distance", "factor": 0.9}},
}
GREY = np.full((96, 96, 3), 128, dtype=np.uint8)


def larger(prompt, seed):
    """A scene, drawn at 64 px, in the middle of a larger image: lettering of the trained size."""
    scene = _scene(prompt, seed)
    image = np.empty((96, 96, 3), dtype=np.uint8)
    image[:] = scene[0, 0]
    image[16:80, 16:80] = scene
    return image


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store in which ntk and pi_ultravico are right, each for one prompt, and ntk_ultravico for both."""
    model = ModelRow("tiny", "fluxlab/assets/tiny", scenes=True, size=(64, 64))
    path = make_store(
        tmp_path_factory.mktemp("runs") / "run", VARIANTS, PROMPTS, (0, 1), (96, 96), model=model, name="methods"
    )
    store = fluxlab.read_run(path)
    right = {"ntk": PROMPTS[:1], "pi_ultravico": PROMPTS[1:], "ntk_ultravico": PROMPTS, "bicubic": PROMPTS}
    for variant in store.variants:
        for prompt, seed in store.places:
            file = store.image(variant, prompt, seed)
            if prompt not in right.get(variant, ()):
                Image.fromarray(GREY).save(file)
            elif variant != "bicubic":  # its images are scenes that were resized
                Image.fromarray(larger(prompt, seed)).save(file)
            else:
                Image.fromarray(_scene(prompt, seed)).resize((96, 96), Image.Resampling.BICUBIC).save(file)
    return store


@pytest.fixture(scope="module")
def rows(run):
    return methodtable.scores(run)


def test_letters_are_read_at_both_sizes(run, rows):
    letters = {row["variant"]: row["letters"] for row in methodtable.table_rows(run, rows)}
    assert letters["ntk_ultravico"] == 1  # at the trained size, in a larger image
    assert letters["bicubic"] == 1  # resized
    assert letters["pi"] == 0


def test_copies_of_the_thing_are_not_as_asked_for():
    wanted = parse(PROMPTS[0])
    scene = _scene(PROMPTS[0], 0)
    once = methodtable.read(larger(PROMPTS[0], 0), wanted, (64, 64))
    twice = methodtable.read(np.concatenate((scene, scene)), wanted, (64, 64))
    assert (once["things"], once["colour"], once["shape"], once["letters"]) == (1, 1, 1, 1)
    assert (twice["things"], twice["colour"], twice["all_right"]) == (0, 1, 0)
    assert twice["score"] == pytest.approx((0 + 1 + 1 + twice["place"] + twice["letters"]) / 5)


def test_a_prompt_that_says_little_is_scored_by_what_it_says():
    row = methodtable.read(_scene("a red fox", 0), parse("a red fox"), (64, 64))
    assert (row["score"], row["all_right"]) == (1, 1)
    assert np.isnan(row["place"])


def test_the_kinds_of_variants(run):
    found = {name: methodtable.kind_of(run, name) for name in run.variants}
    assert found == {
        "baseline": "reference",
        "bicubic": "reference",
        "pi": "frequencies",
        "ntk": "frequencies",
        "ultravico": "attention",
        "pi_ultravico": "composed",
        "ntk_ultravico": "composed",
    }


def test_each_half_of_the_prompts_chooses_for_the_other(run, rows):
    found = methodtable.held_out(run, rows)
    # the first half prefers ntk and ntk_ultravico; the second finds no method alone, and the first listed pair
    assert found.chosen == (("ntk", "ntk_ultravico"), ("pi", "pi_ultravico"))
    value = {(row["variant"], row["prompt"], row["seed"]): row["score"] for row in rows}
    expected = [
        np.mean([value[pair, prompt, seed] - value[alone, prompt, seed] for seed in (0, 1)])
        for (alone, pair), prompt in zip(found.chosen, reversed(PROMPTS), strict=True)
    ]
    assert [mean for mean, _, _ in found.difference] == pytest.approx(expected)
    assert expected[0] > 0
    assert expected[1] == 0
    assert found.pooled[0] == pytest.approx(np.mean(expected))
    assert (found.counts, found.n, found.best, found.compared) == ((2, 2), 4, "ntk", 2)


def test_files(run, tmp_path):
    files = [methods.make([run], tmp_path / name, ["column"]) for name in "ab"]
    names = ["methods-column.pdf", "methods-column.png", "methods.txt", "methods.csv"]
    assert [file.name for file in files[0]] == names
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    text = files[0][2].read_text()
    assert "1.5 × the trained size" in text
    assert "\n  noise floor: score " in text
    assert "\n  another seed: score " in text
    assert "chosen by the first half of the prompts: alone ntk, composed ntk_ultravico" in text


def test_the_figure_shows_the_scores(run, rows):
    table = methodtable.table_rows(run, rows)
    images, shares, score, _ = methods.draw_page([run], [table]).axes
    drawn = {line.get_label(): line for line in score.lines}
    assert list(drawn["composed"].get_xdata()) == [row["score"] for row in table if row["kind"] == "composed"]
    shown = [row for row in table if row["kind"] != "control"]
    assert len(images.images) == 2 * len(shown) == 2 * (len(table) - 2)
    assert shares.images[0].get_array().shape == (len(shown), len(methodtable.PARTS))


def test_runs_that_do_not_fit(run, tmp_path, capsys):
    small = make_store(tmp_path / "small", VARIANTS, PROMPTS, model=ModelRow("tiny", "x", scenes=True, size=(64, 64)))
    assert methods.main([str(small), "-o", str(tmp_path)]) == 2
    assert "images of the trained size, expected larger ones" in capsys.readouterr().err
    assert methods.main([str(run.path), str(run.path), "-o", str(tmp_path)]) == 2
    assert "as large as another run" in capsys.readouterr().err
    assert methods.main([str(run.path), str(small), "-o", str(tmp_path)]) == 2
    assert "small: " in capsys.readouterr().err
