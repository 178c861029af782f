"""The figure of words' attention: shares compared with a count of pixels, best block, files, legend, errors."""

import csv
import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from experiments import style, wordmaps, words, wordtable
from fluxlab.drawing.legend import legend_below
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.store import open_store
from fluxlab.measure.oracle import inspect
from fluxlab.probes import Captured, write
from fluxlab.scenes import Thing, parse, render
from fluxlab.scenes.scene import Scene
from tests.stores import ARTICLE, make_store

PROMPTS = ("A cat holding a sign that says hello world", "a red fox on the left holding a sign that says open cafe")
REGIONED = {"cat", "fox", "red", "hello", "world", "open", "cafe"}
STEPS, BLOCKS, SIDE = 2, 3, 16
REQUEST = {"kind": "words", "direction": "image_to_word", "average": ["heads"]}


def captured_of(prompt: str, values: np.ndarray, labels: list[str], **about) -> Captured:
    coords = {"block": (("block",), list(range(values.shape[1]))), "word": (("word",), labels)}
    coords["direction"] = (("direction",), ["image_to_word"])
    axes = ("step", "block", "direction", "word", "row", "col")
    return Captured(values[:, :, None].astype(np.float32), axes, coords, {"request": {**REQUEST, **about}})


def maps_of(prompt: str, image: Image.Image, rng: np.random.Generator, strength: np.ndarray) -> np.ndarray:
    """Noise. Words that name something have more attention on its box: `strength` by block."""
    report, labels = inspect(image, prompt), prompt.lower().split()
    values = 0.01 * (1 + 0.1 * rng.random((STEPS, BLOCKS, len(labels), SIDE, SIDE)))
    for i, word in enumerate(labels):
        box = report.things[0].box if word in ("cat", "fox", "red") else report.board and report.board.box
        if word in REGIONED and box:
            top, left, bottom, right = (edge // 4 for edge in box)
            values[:, :, i, top:bottom, left:right] *= 1 + strength[:, None, None]
    return values


def add_attention(path, strengths) -> None:
    """Write attention/ as a run with capture=words does. strengths: variant → strength by block."""
    run, digest, entries = read_store(path), "0123456789ab", []
    (path / "attention" / digest).mkdir(parents=True)
    for row in run.metrics:
        variant, prompt, seed = (row[key] for key in ("variant", "prompt", "seed"))
        image = Image.open(run.image(variant, prompt, seed)).convert("RGB")
        values = maps_of(prompt, image, np.random.default_rng(seed), np.asarray(strengths[variant]))
        file = f"attention/{digest}/{row['cell']}.safetensors"
        write(path / file, {"words": captured_of(prompt, values, wordmaps.word_labels(prompt))})
        entries.append({"variant": variant, "prompt": prompt, "seed": seed, "cell": row["cell"], "file": file})
    index = {"capture": {"max_mb": 512.0, "words": REQUEST}, "digest": digest, "cells": entries}
    (path / "attention" / "index.json").write_text(json.dumps(index))
    with open_store(path) as store:
        store.seal()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    kept = {"half": ARTICLE["half"]}
    path = make_store(tmp_path_factory.mktemp("store") / "a", kept, PROMPTS, seeds=(0, 1, 2, 3), name="attention")
    add_attention(path, {"baseline": [0, 3, 1], "half": [0, 0, 0]})
    return read_store(path)


@pytest.fixture(scope="module")
def found(run):
    return wordtable.table_rows(run, run.variants)


def row_of(found, **keys):
    rows = [row for row in found if all(row[key] == value for key, value in keys.items())]
    assert len(rows) == 1
    return rows[0]


def by_pixels(values: np.ndarray, box) -> np.ndarray:
    """Return the share of maps (…, row, col) that is on a box, counted over the pixels of the image."""
    large = values.repeat(4, -2).repeat(4, -1)
    top, left, bottom, right = box
    return large[..., top:bottom, left:right].sum((-2, -1)) / large.sum((-2, -1))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_shares_are_those_of_the_pixels(run, prompt):
    image = Image.open(run.image("baseline", prompt, 2)).convert("RGB")
    got = wordmaps.cell_shares(image, prompt, run.captured("baseline", prompt, 2))
    report, labels = inspect(image, prompt), prompt.lower().split()
    values = run.captured("baseline", prompt, 2)["words"].values[:, :, 0]
    for kind, named, box in (
        ("thing", [parse(prompt).thing], report.things[0].box),
        ("sign", parse(prompt).sign, report.board.box),
    ):
        top, left, bottom, right = box
        chance = (bottom - top) * (right - left) / 64**2
        assert got[f"{kind}/chance"] == pytest.approx(chance)
        at = [labels.index(word) for word in named]
        share = by_pixels(values[:, :, at], box).mean((0, 2))
        for block in range(BLOCKS):
            assert got[f"{kind}/{block}/share"] == pytest.approx(share[block], rel=1e-5)
            assert got[f"{kind}/{block}/ratio"] == pytest.approx(share[block] / chance, rel=1e-5)
        assert got[f"{kind}/mean/share"] == pytest.approx(share.mean(), rel=1e-5)
        plain = [i for i, word in enumerate(labels) if word not in REGIONED]
        other = by_pixels(values[:, 1, plain], box).mean() / chance
        assert got[f"{kind}/1/other"] == pytest.approx(other, rel=1e-5)
        assert got[f"{kind}/1/beyond"] == pytest.approx(share[1] / chance - other, rel=1e-4)
        assert other == pytest.approx(1, abs=0.01)
    assert ("colour/chance" in got) == (parse(prompt).colour is not None)


def test_an_even_map_has_ratio_1():
    image = Image.fromarray(render(Scene((64, 64), "mist", (Thing("cat", "red", "left", 32, 16, 22),))))
    values = np.ones((1, 1, 3, 16, 16))
    got = wordmaps.cell_shares(image, "a red cat", {"words": captured_of("", values, ["a", "red", "cat"])})
    assert {key for key in got if key.startswith("sign")} == set()
    assert got["thing/0/ratio"] == got["colour/mean/ratio"] == pytest.approx(1)


def test_each_of_two_things_has_its_own_region():
    things = (Thing("cat", "red", None, 32, 14, 20), Thing("fox", "blue", None, 32, 48, 20))
    image = Image.fromarray(render(Scene((64, 64), "mist", things, "left of")))
    labels = ["a#1", "red", "cat", "left", "of", "a#2", "blue", "fox"]
    values = np.ones((1, 1, 8, 16, 16))
    values[0, 0, [1, 2], :, 8:] = values[0, 0, [6, 7], :, :8] = 0  # each word only on one half of the image
    prompt = "a red cat left of a blue fox"
    got = wordmaps.cell_shares(image, prompt, {"words": captured_of(prompt, values, labels)})
    assert got["thing/0/ratio"] == got["colour/0/ratio"] == pytest.approx(2, rel=1e-3)


def test_repeated_words():
    prompt = "A red cat on the left holding a sign that says hello hello"
    text = prompt.lower().split()
    named = wordmaps.names(parse("a red cat on the left holding a sign that says hello hello"), text)
    said = [(word.kind, wordmaps.word_labels(prompt)[word.index]) for word in named]
    assert said == [("colour", "red"), ("thing", "cat"), ("sign", "hello#1"), ("sign", "hello#2")]
    assert wordmaps.word_labels(prompt)[:2] == ["a#1", "red"]


def test_the_best_block_is_evaluated_at_other_seeds(run, found):
    best = [row for row in found if row["of"] == "best"]
    assert {row["block"] for row in best} == {"1"}
    cells = [
        {"variant": "baseline", "seed": seed, "thing/chance": 0.1, "thing/0/ratio": low, "thing/1/ratio": 2.0}
        for seed, low in ((0, 1.0), (1, 9.0), (5, 1.0), (3, 9.0))
    ]
    choosing, quoted = wordtable.halves(cells)
    assert [cell["seed"] for cell in choosing] == [0, 5]
    assert [cell["seed"] for cell in quoted] == [1, 3]
    assert wordtable.best_block(choosing, "baseline", "thing", ["0", "1"]) == "1"
    assert wordtable.best_block(quoted, "baseline", "thing", ["0", "1"]) == "0"
    for kind in ("thing", "sign"):
        quoted_row = row_of(found, variant="baseline", words=kind, of="best")
        over_all = row_of(found, variant="baseline", words=kind, of="block", block="1")
        assert (quoted_row["n"], over_all["n"]) == (4, 8)
        values = [
            wordmaps.cell_shares(
                Image.open(run.image("baseline", prompt, seed)).convert("RGB"),
                prompt,
                run.captured("baseline", prompt, seed),
            )[f"{kind}/1/ratio"]
            for prompt in PROMPTS
            for seed in (1, 3)
        ]
        assert quoted_row["ratio"] == pytest.approx(np.mean(values))
        pairs = np.reshape(values, (2, 2))
        assert quoted_row["ratio_sd"] == pytest.approx(np.var(pairs, axis=1, ddof=1).mean() ** 0.5)
        assert quoted_row["ratio_low"] <= quoted_row["ratio"] <= quoted_row["ratio_high"]


def test_an_edit_is_compared_with_the_baseline(found):
    for kind in ("colour", "thing", "sign"):
        before, half = (row_of(found, variant=name, words=kind, of="best") for name in ("baseline", "half"))
        assert before["ratio"] > 1.5
        assert half["ratio"] == pytest.approx(1, abs=0.05)
        assert math.isnan(before["less_baseline"])
        assert before["beyond_low"] > 1 > half["beyond_high"]
        assert before["beyond"] == pytest.approx(before["ratio"] - before["other_words"])
        assert half["less_baseline"] == pytest.approx(half["ratio"] - before["ratio"])
        assert half["less_high"] < 0


def test_files(run, found, tmp_path):
    first = {file.name: file.read_bytes() for file in words.make(run, tmp_path / "a")}
    assert sorted(first) == sorted(
        [
            "attention-words.csv",
            "attention-words.txt",
            *(f"attention-words-{w}.{end}" for w in ("column", "page") for end in ("pdf", "png")),
        ]
    )
    again = words.make(run, tmp_path / "b", widths=["column"])
    assert len(again) == 4
    assert all(file.read_bytes() == first[file.name] for file in again)
    for width, inches in {"column": style.COLUMN, "page": style.PAGE}.items():
        assert Image.open(tmp_path / "a" / f"attention-words-{width}.png").width == round(300 * inches)
        pdf = first[f"attention-words-{width}.pdf"]
        assert b"CIDFontType2" in pdf  # letters, not outlines
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
    table = list(csv.DictReader(first["attention-words.csv"].decode().splitlines()))
    assert [row["variant"] for row in table] == [row["variant"] for row in found]
    assert [float(row["ratio"]) for row in table] == pytest.approx([row["ratio"] for row in found], rel=1e-5)
    assert "nan" not in first["attention-words.csv"].decode()
    text = first["attention-words.txt"].decode()
    best = row_of(found, variant="baseline", words="thing", of="best")
    assert f"best block 1: {best['ratio']:.3g} [{best['ratio_low']:.3g}, {best['ratio_high']:.3g}]" in text
    assert "at seeds 0, 2, evaluated at seeds 1, 3" in text


def test_the_points_are_the_rows_of_the_table(run, found):
    drawn = words.draw(run, found, run.variants, "page")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == list(words.TITLES.values())
    for axes, kind in zip(drawn.axes, words.TITLES, strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        for variant, name in (("baseline", "unchanged ids"), ("half", "img_ids × 0.5")):
            rows = [row for row in found if (row["words"], row["variant"], row["of"]) == (kind, variant, "block")]
            assert lines[name] == [row["ratio"] for row in rows]
        assert lines["chance"] == [1, 1]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "all", "best\n(1)"]


def inside(drawn) -> None:
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    texts = [text for axes in drawn.axes for text in (axes.xaxis.label, axes.yaxis.label) if text.get_text()]
    parts = [*drawn.legends, *texts]
    for box in (part.get_window_extent(canvas.get_renderer()) for part in parts):
        assert 0 <= box.x0 <= box.x1 <= drawn.bbox.width
        assert 0 <= box.y0 <= box.y1 <= drawn.bbox.height
    assert all(axes.bbox.height > 0.15 * drawn.bbox.height for axes in drawn.axes)


@pytest.mark.parametrize("width", ["column", "page"])
def test_labels_and_legend_are_inside_the_figure(run, found, width):
    inside(words.draw(run, found, run.variants, width))


@pytest.mark.parametrize("width", ["column", "page"])
def test_a_legend_of_many_long_names_is_inside_the_figure(width):
    names = ["baseline", *(f"a long name of a variant, number {n}" for n in range(6))]
    rows = [
        {"variant": name, "words": kind, "of": of, "block": "0", "n": 4, **dict.fromkeys(wordtable.COLUMNS[5:], 1.5)}
        for name in names
        for kind in words.TITLES
        for of in ("block", "mean", "best")
    ]
    program = {f"edit {n}": {"op": "scale", "factor": 0.5, "blocks": [n], "tokens": "text"} for n in range(3)}
    record = {"variants": {name: {"program": program if name != "baseline" else {}} for name in names}}
    drawn = words.draw(type("Run", (), {"record": record})(), rows, names, width)
    inside(drawn)
    (legend,) = drawn.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == len(names) + 2
    assert all(any(name[:9] in text for text in shown) for name in names[1:])
    lines = [line for line in drawn.axes[0].lines if line.get_label() in shown]
    styles = {(line.get_color(), line.get_marker()) for line in lines}
    assert len({colour for colour, _ in styles}) == len(styles) == len(lines)  # colour or marker identifies a line
    markers = [line.get_marker() for line in lines if line.get_marker() != "None"]
    assert len(set(markers)) == len(markers) == len(names)


def test_a_label_that_is_wider_than_the_figure_is_shortened():
    drawn = style.figure(2, 2)
    (line,) = drawn.subplots().plot([0, 1])
    assert legend_below(drawn, [line], ["the first words " + 40 * "x" + " the last words"]) == 1
    (text,) = drawn.legends[0].get_texts()
    assert text.get_text().startswith("the first")
    assert text.get_text().endswith("words")
    inside(drawn)


def test_many_blocks():
    """As in FLUX.1: bands instead of bars, fewer ticks than blocks, and nothing outside of the axes."""
    found = []
    for variant in ("baseline", "half"):
        for of, block in [*(("block", str(i)) for i in range(57)), ("mean", ""), ("best", "8")]:
            values = dict.fromkeys(wordtable.COLUMNS[5:], 1.5)
            found.append({"variant": variant, "words": "thing", "of": of, "block": block, "n": 4, **values})
    record = {"variants": {"baseline": {"program": {}}, "half": {"program": ARTICLE["half"]}}}
    drawn = words.draw(type("Run", (), {"record": record})(), found, ["baseline", "half"], "column")
    (axes,) = drawn.axes
    assert len(axes.get_xticks()) < 12
    assert all(axes.get_xlim()[0] < x < axes.get_xlim()[1] for line in axes.lines[1:] for x in line.get_xdata())


@pytest.mark.parametrize(
    ("captured", "said"),
    [
        ({}, "no words were captured; run the store's command again with capture=words"),
        ({"words": captured_of("", np.ones((1, 1, 2, 16, 16)), ["a", "cat"], kind="map")}, "no words were captured"),
        (
            {"words": captured_of("", np.ones((1, 1, 2, 16, 16)), ["a", "cat"]).mean("block")},
            "the words were averaged over blocks",
        ),
    ],
)
def test_captures_without_words_by_block(captured, said):
    image = Image.fromarray(render(Scene((64, 64), "mist", (Thing("cat", "red", "left", 32, 16, 22),))))
    with pytest.raises(ValueError, match=said):
        wordmaps.cell_shares(image, "a cat", captured)


def test_wrong_arguments_are_reported(run, tmp_path, capsys):
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match=r"prompt 'a dog': expected a caption of fluxlab\.scenes"):
        wordmaps.cell_shares(image, "a dog", {})
    one = make_store(tmp_path / "one", {"half": ARTICLE["half"]}, PROMPTS[:1], (7,))
    assert words.main([str(one), "-o", str(tmp_path / "x")]) == 2
    assert "capture=words" in capsys.readouterr().err
    add_attention(one, {"baseline": [0, 1, 0], "half": [0, 0, 0]})
    assert words.main([str(one), "-o", str(tmp_path / "x")]) == 2
    assert "seeds=2 or more" in capsys.readouterr().err
    assert words.main([str(run.path), "-o", str(tmp_path / "x"), "--variants", "quarter"]) == 2
    assert "--variants quarter: expected some of baseline, half" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
