"""Attention in images, on the page and in a tracker: what is shown is what was captured."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fluxlab.experiment.reading import read_store
from fluxlab.probes import Captured
from fluxlab.report import products
from fluxlab.report.attention import page as attention_page
from fluxlab.report.attention import pictures as attention
from fluxlab.report.page import render
from fluxlab.report.wandb import tracking
from tests.stores import make_store

CAPTURE = {
    "words": {"kind": "words", "average": ["heads"]},
    "entropy": {"kind": "entropy", "average": ["heads"]},
    "distance": {"kind": "distance", "average": ["heads", "tokens"]},
    "quadrants": {"kind": "quadrants", "average": ["heads"]},
}
PROMPTS = ("a red cat", "</script><script>alert(1)</script> sign")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    path = make_store(folder / "one", prompts=PROMPTS, size=(32, 48), attention=CAPTURE)
    attention.write_pictures(read_store(path))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stores") / "plain", prompts=PROMPTS[:1], seeds=(0,), caption="plain")


@pytest.fixture(scope="module")
def html(store):
    return render([store])


def data(html: str) -> dict:
    return json.loads(re.search(r'id="attention-data">(.*?)</script>', html, re.S)[1])


def maps(blocks=6, steps=4, side=(8, 12), streams=None) -> Captured:
    values = np.random.default_rng(0).random((steps, blocks, 2, *side)).astype(np.float32)
    coords = {"step": list(range(steps)), "block": list(range(blocks)), "word": ["a", "cat"]}
    coords = {axis: ((axis,), labels) for axis, labels in coords.items()}
    coords |= {"sigma": (("step",), np.linspace(1, 0.1, steps).tolist())}
    coords |= {"stream": (("block",), streams)} if streams else {}
    return Captured(values, ("step", "block", "word", "row", "col"), coords, {})


def test_every_image_is_drawn_once(store):
    run = read_store(store)
    first = [entry["cell"] for entry in run.attention if entry["seed"] == 0]
    sheets = {f"{cell}{view}.png" for cell in first for view in ("", "-words-word_to_image")}
    films = {f"steps-{n}{view}.gif" for n in (1, 2) for view in ("", "-words-word_to_image")}
    figures = {f"{name}.png" for name in ("entropy", "distance", "quadrants")}
    files = {file.name: file for file in (store / "attention").iterdir() if file.suffix in (".png", ".gif")}
    assert files.keys() == sheets | films | figures
    with Image.open(files["steps-1.gif"]) as film:
        assert film.n_frames == 16
    sizes = {name: Image.open(files[name]).size for name in sheets}
    assert all(width > 6 * 96 for width, _ in sizes.values())  # one column per block
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files.values()}
    gone = files["entropy.png"]
    gone.unlink()
    attention.write_pictures(run)
    for file, (written, content) in before.items():
        assert file.read_bytes() == content
        assert (file.stat().st_mtime_ns == written) == (file != gone)
    found = attention.pictures(run)
    assert {file for some in vars(found).values() for file, _ in some} == set(files.values())
    assert found.sheets[0][1] == "baseline · a red cat · seed 0 · words: attention from image tokens to words"


def test_a_store_without_captures_has_no_images(plain):
    run = read_store(plain)
    assert attention.write_pictures(run) == []
    assert not (plain / "attention").exists()
    assert attention.summary(run) == {}
    html = render([plain])
    assert "attention" not in html.replace("dialog-attention", "").lower().replace("#attention", "")
    assert not any("attention" in key for message in tracking.messages(run) for key in message.get("images", {}))


def test_double_and_single_blocks_are_averaged_separately():
    one = maps(57, 1, (2, 2), ["double"] * 19 + ["single"] * 38)
    averaged = attention.average_blocks(one)
    labels = averaged.labels("block")
    assert len(labels) == 20
    assert labels[:2] + labels[5:8] == ["0-2", "3-5", "15-17", "18", "19-21"]
    assert labels[-1] == "55-56"
    np.testing.assert_allclose(averaged.values[:, 7], one.values[:, 19:22].mean(1), rtol=1e-6)
    assert attention.average_blocks(one.sel(word="cat"), 60).values.shape[1] == 57


def test_steps_are_selected_evenly_with_both_ends():
    selected = attention.select_steps(maps(1, 20), 7)
    assert selected.labels("step") == [0, 3, 6, 10, 13, 16, 19]
    assert len(selected.coords["sigma"][1]) == 7
    np.testing.assert_array_equal(selected.values[-1], maps(1, 20).values[-1])
    assert attention.select_steps(maps(1, 4), 7).labels("step") == [0, 1, 2, 3]


@pytest.mark.parametrize("resolution", [(7, 20, 32), (2, 3, 6), (0, 3, 12), (2, 0, 12), (0, 0, 4)])
def test_a_page_has_means_over_all_steps_and_blocks_first(resolution):
    resolution, one = attention_page.Resolution(*resolution), maps()
    small = attention_page.reduce(one, resolution)
    assert small.labels("step") == [
        "mean",
        *(attention.select_steps(one, resolution.steps).labels("step") if resolution.steps else []),
    ]
    assert small.labels("block") == [
        "mean",
        *(attention.average_blocks(one, resolution.blocks).labels("block") if resolution.blocks else []),
    ]
    mean = attention_page.downsample(one.values.mean((0, 1)), resolution.side)
    np.testing.assert_allclose(small.values[0, 0], mean, rtol=1e-5)
    assert max(small.values.shape[3:]) == min(12, resolution.side)
    np.testing.assert_allclose(small.values[0, 0].mean((1, 2)), one.values.mean((0, 1, 3, 4)), rtol=1e-5)
    packed = base64.b64decode(attention_page.pack(small))
    assert len(packed) == attention_page._size(one, resolution)
    count = np.prod(small.values.shape[:3])
    tops = np.frombuffer(packed, "<f4", count)
    shares = np.frombuffer(packed, np.uint8, offset=4 * count).reshape(count, -1)
    values = small.values.transpose(2, 0, 1, 3, 4).reshape(count, -1)
    np.testing.assert_allclose(shares / 255 * tops[:, None], values, atol=values.max() / 500)
    assert (shares.max(1) == 255).all()


def test_an_axis_that_was_averaged_over_has_one_entry():
    one = maps()
    words = attention.WordMaps("words", "image_to_word", "")
    captured = {"words": replace(one.mean("step"), about={})}
    values = captured["words"].values[:, None].transpose(1, 0, 2, 3, 4)
    axes = ("direction", "block", "word", "row", "col")
    coords = {**captured["words"].coords, "direction": (("direction",), ["image_to_word"])}
    found = words.maps({"words": Captured(values, axes, coords, {})})
    assert found.labels("step") == [attention.ALL]
    assert attention_page.reduce(found, attention_page.RESOLUTIONS[0]).values.shape[:2] == (1, 7)


def test_downsampling_averages_areas():
    np.testing.assert_allclose(attention_page.downsample(np.arange(6.0)[None], 3), [[0.5, 2.5, 4.5]])
    np.testing.assert_allclose(attention_page.downsample(np.array([[1.0], [2], [6]]), 2), [[4 / 3], [14 / 3]])


def test_maps_on_the_page_are_those_of_the_store(html, store):
    run = read_store(store)
    (loaded,) = data(html)["runs"]
    assert loaded["variants"] == run.variants
    assert [prompt["prompt"] for prompt in loaded["prompts"]] == list(PROMPTS)
    assert [prompt["column"] for prompt in loaded["prompts"]] == [0, 2]
    view = loaded["prompts"][0]["views"][0]
    assert view["words"] == ["a", "red", "cat"]
    assert view["blocks"] == ["mean", *map(str, range(6))]
    assert (view["steps"][0], view["steps"][1], view["steps"][-1]) == ("mean", "0, σ 1.00", "15, σ 0.06")
    assert view["size"] == [8, 12]
    content = base64.b64decode(view["maps"]["2"])
    tops = np.frombuffer(content, "<f4", 3 * len(view["steps"]) * 7).reshape(3, -1, 7)
    array = run.captured("half", PROMPTS[0], 0)["words"].sel(direction="image_to_word").values
    np.testing.assert_allclose(tops[2, 0, 0], array[:, :, 2].mean((0, 1)).max(), rtol=1e-5)
    np.testing.assert_allclose(tops[1, -1, 4], array[-1, 3, 1].max(), rtol=1e-5)
    assert "Shown: seed 0 of 2 seeds, 7 of 16 steps. Means are over everything captured" in html
    assert html.count("<script>alert") == 0
    assert html == render([store])


def test_a_size_limit_for_maps(store, monkeypatch):
    run = read_store(store)
    sizes = {}
    for budget in (2_000_000, 200_000, 60_000, 5_000, 1):
        shown = attention_page.shown([run], ["one"], maps=budget, sheets=0)
        prompts = json.loads(shown.data)["runs"][0]["prompts"]
        packed = [text for prompt in prompts for view in prompt["views"] for text in view["maps"].values()]
        sizes[budget] = sum(len(base64.b64decode(text)) for text in packed)
        assert sizes[budget] <= budget or budget == 1
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert sizes[1] > 0  # at least one prompt
    assert "1 of 2 prompts" in shown.notes[0]
    assert "the mean of 6 blocks" in shown.notes[0]
    assert shown.notes[1].startswith("This page shows 0 of 12 contact sheets")


def test_runs_with_and_without_captures_on_one_page(store, plain):
    for stores, table in (([store, plain], 0), ([plain, store], 1)):
        html = render(stores)
        (loaded,) = data(html)["runs"]
        assert loaded["table"] == table
        assert html.count("<script>") == 2
        assert f"{loaded['name']}: Shown: seed 0" in html


def test_numbers_for_a_tracker(store):
    run = read_store(store)
    found = attention.summary(run)
    for variant in run.variants:
        places = [(variant, prompt, seed) for prompt, seed in run.places]
        text = [
            run.captured(*place)["quadrants"].sel(**{"from": "image", "to": "text"}).values.mean() for place in places
        ]
        assert found[f"attention.{variant}.quadrants"] == pytest.approx(np.mean(text), rel=1e-4)
        words = [run.captured(*place)["words"].sel(direction="image_to_word") for place in places if place[2] == 0]
        shares = [one.values.sum(2).mean() for one in words]
        assert found[f"attention.{variant}.words"] == pytest.approx(np.mean(shares), rel=1e-4)
        assert found[f"attention.{variant}.entropy"] > 0
        assert 0 < found[f"attention.{variant}.distance"] < 12
    sent = {key: value for message in tracking.messages(run) for key, value in message.items()}
    assert sent["summary"]["attention.half.words"] == found["attention.half.words"]
    assert len(sent["images"]["attention/sheets"]) == 12
    assert len(sent["images"]["attention/figures"]) == 3
    assert [caption.split(" · ")[0] for _, caption in sent["videos"]["attention/steps"]] == [*PROMPTS] * 2


def test_making_the_page_draws_the_images(tmp_path):
    capture = {"words": {"kind": "words", "direction": "image_to_word", "average": ["heads"]}}
    path = make_store(tmp_path / "one", {}, prompts=("a cat",), seeds=(3,), size=(16, 16), attention=capture)
    products.page(read_store(path))
    assert sorted(file.suffix for file in (path / "attention").iterdir() if file.is_file()) == [".gif", ".json", ".png"]
    assert "contact sheets" in (path / "report.html").read_text().lower()


def test_words_that_are_compared(tmp_path):
    """They are drawn as words are, from 0 to 1 in all images, and have no number for a tracker."""
    words = ["cat", "star", "sign"]
    path = make_store(
        tmp_path / "one",
        {},
        prompts=("a cat",),
        seeds=(3,),
        size=(16, 16),
        attention={"c": {"kind": "concepts", "words": words, "blocks": "double"}},
    )
    products.page(read_store(path))
    run = read_store(path)
    drawn = attention.pictures(run)
    assert [len(drawn.sheets), len(drawn.gifs), attention.summary(run)] == [1, 1, {}]
    (loaded,) = data((path / "report.html").read_text())["runs"]
    assert loaded["highest"] == [1.0]
    (view,) = loaded["prompts"][0]["views"]
    assert view["words"] == words
    maps = attention.word_maps(attention.requests(run))[0].maps(run.captured("baseline", "a cat", 3))
    assert view["maps"]["0"] == attention_page.pack(attention_page.reduce(maps, attention_page.RESOLUTIONS[0]))
