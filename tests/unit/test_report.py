"""The page of a run: what is in it, that it is whole and safe, and that it is the same every time."""

import base64
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fluxlab.run
from fluxlab.drawing import pictures
from fluxlab.experiment.reading import read_store
from fluxlab.report import page
from fluxlab.report.__main__ import main
from fluxlab.report.page import render, write_report
from tests.stores import make_store

HOSTILE = '</script><script>document.title = "broken into"</script> & "a" <img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("stores") / "one",
        prompts=("a red cat", HOSTILE),
        caption=HOSTILE,
        command=f"python -m fluxlab.run +exp=test 'prompts=[\"{HOSTILE}\"]'",
    )


@pytest.fixture(scope="module")
def html(store):
    return render([store])


class Tree(HTMLParser):
    """Tags with their attributes, and every table as rows of texts, by class or caption."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.texts, self.inside = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append((dict(attrs).get("class", ""), []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.texts.append(data)
        if self.inside:
            self.tables[-1][1][-1][-1] += data.strip(" \n") + " "

    def table(self, name):
        return next([[cell.strip() for cell in row] for row in rows] for kind, rows in self.tables if name in kind)


def test_one_file_that_asks_for_nothing(html):
    tags = Tree(html).tags
    for tag, attrs in tags:
        for key in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(key, "#").startswith(("#", "data:")), (tag, attrs)
        assert not [key for key in attrs if key.startswith("on")], (tag, attrs)
        assert "style" not in attrs  # which the policy forbids
    assert not re.search(r"url\(|@import|fetch\(|innerHTML|https?://", html)
    assert [tag for tag, _ in tags].count("script") == 1


def test_only_its_own_script_and_style_may_run(html):
    policy = next(attrs["content"] for tag, attrs in Tree(html).tags if "Content-Security-Policy" in attrs.values())
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_prompt_is_text(html, store):
    assert "<script>document" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;document") > 10  # caption, command, heads, cells, descriptions of pictures
    assert HOSTILE in [row[1] for row in Tree(html).table("cells")]


def test_the_same_store_gives_the_same_bytes_and_is_left_alone(store, tmp_path):
    def state():
        return {file: file.stat().st_mtime_ns for file in sorted(store.rglob("*")) if file.is_file()}

    before = state()
    page._drawn.cache_clear()
    first = write_report([store], tmp_path / "a.html")
    page._drawn.cache_clear()
    again = write_report([str(store)], str(tmp_path / "b.html"))
    assert first.read_bytes() == again.read_bytes()
    written = first.stat().st_mtime_ns
    assert write_report([store], first).stat().st_mtime_ns == written  # nothing new, nothing written
    assert state() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_pictures_as_they_are_stored(html, store):
    run = read_store(store)
    urls = [attrs["src"] for tag, attrs in Tree(html).tags if tag == "img" and "seed" in attrs["alt"]]
    stored = [run.image(row["variant"], row["prompt"], row["seed"]).read_bytes() for row in run.metrics]
    assert [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls] == stored
    assert 'class="crisp"' in html
    assert "WebP" not in html


def test_a_cell_a_row_in_the_experiment_s_order(html, store):
    run = read_store(store)
    head, *rows = Tree(html).table("cells")
    assert [row[:3] for row in rows] == [[row["variant"], row["prompt"], str(row["seed"])] for row in run.metrics]
    ssim = next(i for i, name in enumerate(head) if name == "ssim")
    assert [float(row[ssim]) for row in rows] == [row["ssim"] for row in run.metrics]
    assert {len(row) for row in rows} == {len(head)}
    assert "relation" not in head  # no caption here asks for one


def test_findings_are_the_summary_s_with_the_references_last(html, store):
    run = read_store(store)
    head, *rows = Tree(html).table("findings")
    assert [row[0] for row in rows] == ["baseline", "zero", "half", "noise floor", "another seed"]
    for name in ("ssim", "sharpness"):
        column = next(i for i, told in enumerate(head) if told.split(" ")[0] == name)
        for row in rows:
            wanted = next(one for one in run.summary if (one["variant"], one["metric"]) == (row[0], name))
            numbers = [float(number) for number in re.findall(r"-?\+?\d+\.\d+", row[column])]
            keys = ["mean", "low", "high"] if wanted["low"] < wanted["high"] else ["mean"]
            if not np.isnan(wanted["paired_mean"]):
                keys += ["paired_mean"]
                keys += ["paired_low", "paired_high"] if wanted["paired_low"] < wanted["paired_high"] else []
            assert numbers == pytest.approx([wanted[key] for key in keys], abs=0.006 if name == "ssim" else 6e-5)
    assert rows[0][next(i for i, told in enumerate(head) if told.startswith("psnr"))] == "∞"


def test_drawings_of_intervals_lie_between_the_least_and_the_greatest():
    def row(variant, mean, low, high):
        nothing = dict.fromkeys(("paired_mean", "paired_low", "paired_high"), np.nan)
        return {"variant": variant, "metric": "m", "n": 4, "mean": mean, "low": low, "high": high, **nothing}

    rows = [row("a", 2.0, 1.0, 3.0), row("noise floor", 0.0, 0.0, 0.0), row("another seed", 4.0, 3.5, 5.0)]
    table = {(one["variant"], "m"): one for one in rows}
    told = page._column("m", [table])(table, rows[0])
    low, high = page.SCALE
    assert [told[key] for key in ("floor", "from", "at", "to", "ceiling")] == [
        round(low + (high - low) * share, 1) for share in (0, 0.2, 0.4, 0.6, 0.8)
    ]
    assert (told["mean"], told["interval"], told["paired"], told["few"]) == ("2.00", "[1.00, 3.00]", "", 0)
    flat = {("a", "m"): row("a", 1.0, 1.0, 1.0)}
    assert page._column("m", [flat])(flat, flat["a", "m"])["at"] is None


def test_few_values_are_said():
    rows = [
        {"variant": "a", "metric": metric, "n": n, "mean": 1.0, "low": 1.0, "high": 2.0}
        | dict.fromkeys(("paired_mean", "paired_low", "paired_high"), np.nan)
        for metric, n in (("m", 8), ("place", 3))
    ]
    table = {(row["variant"], row["metric"]): row for row in rows}
    assert page._column("place", [table])(table, rows[1])["few"] == 3
    assert page._column("m", [table])(table, rows[0])["few"] == 0
    assert page._column("m", [table])(table, {**rows[0], "n": 0, "mean": np.nan}) is None


@pytest.mark.parametrize(
    "program",
    [
        {},
        {"a": {"op": "set", "value": 1, "axes": ["index"]}},
        {
            "a": {"op": "zero"},
            "b": {"op": "relocate", "tokens": [{"words": ["hello: world", "#2", "ö"]}], "to": [4, 4]},
        },
        {"a": {"op": "mask", "from": {"mask": ["..##" * 9] * 9}, "to": {"indices": list(range(90)), "of": "text"}}},
    ],
)
def test_programs_read_back(program):
    text = page._yaml("no", program)  # YAML's no is not the word
    assert yaml.safe_load(text) == {"no": program}
    assert max(map(len, text.splitlines())) < 140


def test_programs_commands_and_versions_are_told(html, store):
    tree = Tree(html)
    record = read_store(store).record
    told = "".join(tree.texts)
    assert record["command"] in told
    for facts in (record["versions"], {"steps": 16, "kernel": "sdpa"}):
        for key, value in facts.items():
            assert [key, str(value)] in [
                row for _, rows in tree.tables for row in (list(map(str.strip, r)) for r in rows)
            ]
    assert "half:\n  a: {op: scale, factor: 0.5}" in told
    drawings = [attrs for tag, attrs in tree.tags if tag == "img" and attrs["alt"].startswith("Positions")]
    assert [attrs["alt"].partition(": ")[2] for attrs in drawings] == [
        "identity",
        "zero on image",
        "scale factor 0.5 on image",
    ]
    assert len({attrs["src"] for attrs in drawings}) == 3


def test_a_program_of_an_op_that_is_not_here(store, tmp_path):
    record = yaml.safe_load((store / "experiment.yaml").read_text())
    record["variants"]["half"]["program"] = {"a": {"op": "mine"}}
    for file in store.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "experiment.yaml").unlink()
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(record))
    assert "No drawing of its positions: a.op: &#39;mine&#39;, expected" in (told := render([tmp_path]))
    assert "a: {op: mine}" in told


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Of the same name, with another variant."""
    return make_store(
        tmp_path_factory.mktemp("stores") / "two",
        {"double": {"a": {"op": "scale", "factor": 2}}},
        prompts=("a red cat",),
        baseline="untouched",
    )


def test_several_stores_on_one_page(store, other):
    html = render([store, other])
    names = [f"test {read_store(path).record['digest']}" for path in (store, other)]
    tree = Tree(html)
    head, *rows = tree.table("cells")
    assert head[:3] == ["variant", "run", "prompt"]
    assert [row[1] for row in rows] == [names[0]] * 12 + [names[1]] * 4
    assert [row[:2] for row in tree.table("findings")[1:]] == [
        *([variant, names[0]] for variant in ("baseline", "zero", "half")),
        *([variant, names[1]] for variant in ("untouched", "double")),
        *([reference, name] for name in names for reference in ("noise floor", "another seed")),
    ]
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"][1:] for tag, attrs in tree.tags if tag == "a"}
    assert links <= set(ids)
    assert [attrs["data-run"] for _, attrs in tree.tags if "data-run" in attrs] == names
    assert len([1 for kind, _ in tree.tables if kind == "grid"]) == 2


def test_runs_of_one_name_and_digest_are_told_apart(store, tmp_path):
    (tmp_path / "copy").symlink_to(store)
    with pytest.raises(ValueError, match="named twice"):
        render([store, tmp_path / "copy"])
    (tmp_path / "real").mkdir()
    for file in store.iterdir():
        (tmp_path / "real" / file.name).symlink_to(file)
    digest = read_store(store).record["digest"]
    assert page._names([read_store(store), read_store(tmp_path / "real")]) == [
        f"test {digest} (1)",
        f"test {digest} (2)",
    ]


def test_a_missing_picture_is_said(store, tmp_path):
    for file in store.iterdir():
        if file.name != "cells":
            (tmp_path / file.name).symlink_to(file)
    files = sorted((store / "cells").glob("*.png"))
    (tmp_path / "cells").mkdir()
    for file in files[1:]:
        (tmp_path / "cells" / file.name).symlink_to(file)
    assert render([tmp_path]).count(">missing<") == 1
    (tmp_path / "cells" / files[0].name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=rf"{files[0].name}: not a readable image"):
        render([tmp_path])


def noise(folder: Path, count: int, side: int) -> list[Path]:
    files = [folder / f"{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        values = np.random.default_rng(i).integers(0, 255, (side // 2, side, 3), dtype=np.uint8)
        Image.fromarray(values).save(file)
    return files


def test_a_budget_of_bytes(tmp_path):
    files = noise(tmp_path, 5, 400)
    stored = sum(file.stat().st_size for file in files)
    whole = pictures.embed([*files, *files], budget=stored)
    assert pictures.note(list(whole.values())) == ""
    assert [base64.b64decode(p.url.partition(",")[2]) for p in whole.values()] == [file.read_bytes() for file in files]
    sizes = []
    for budget in (stored - 1, stored // 8, stored // 30, 1):
        small = pictures.embed(files, budget)
        contents = [base64.b64decode(picture.url.removeprefix("data:image/webp;base64,")) for picture in small.values()]
        assert sum(map(len, contents)) <= budget or budget == 1
        assert [Image.open(io.BytesIO(content)).size for content in contents] == [p.size for p in small.values()]
        assert {picture.stored for picture in small.values()} == {(400, 200)}
        sizes.append(small[files[0]].size)
    assert sizes[0] == (400, 200)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == (64, 32)  # never smaller
    assert pictures.note(list(small.values())).startswith(
        "Pictures are 400 × 200 px, shown at 64 × 32, compressed as WebP"
    )
    assert pictures.embed(files, stored // 8) == pictures.embed(files, stored // 8)


def test_a_page_whose_pictures_are_too_many_says_so(store):
    told = render([store], budget=1)
    assert "Pictures are of full size, compressed as WebP; the originals lie in the run folder&#39;s cells/." in told
    shown = [attrs["src"] for tag, attrs in Tree(told).tags if tag == "img" and "seed" in attrs["alt"]]
    assert len(shown) == 12
    assert all(url.startswith("data:image/webp;base64,") for url in shown)


def test_command_line(store, other, tmp_path, capsys, monkeypatch):
    assert main([str(store), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == render([store])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/page.html  0.")
    monkeypatch.chdir(tmp_path)
    assert main([str(store), str(other)]) == 0
    assert (tmp_path / "report.html").read_text() == render([store, other])
    assert main([str(other)]) == 0
    assert (other / "report.html").read_text() == render([other])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "STORE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: STORE"),
        (["nowhere"], "no experiment.yaml in it"),
        (["STORE", "STORE"], "named twice"),
        (["STORE", "-o", "."], "a folder; name a file"),
        (["STORE", "-o", "no/such/page.html"], "there is no folder no/such"),
        (["STORE", "--plugins", "no_such_module"], "no_such_module"),
        (["STORE", "--cell"], "unrecognized arguments: --cell"),
    ],
)
def test_what_a_user_can_get_wrong(store, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(store) if argument == "STORE" else argument for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished(store, tmp_path):
    (tmp_path / "experiment.yaml").symlink_to(store / "experiment.yaml")
    with pytest.raises(ValueError, match=r"metrics\.csv: not there; the run is not finished"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="no run folder named"):
        render([])


def test_drawings_know_the_prompt_and_the_schedule():
    edit = {"op": "relocate", "tokens": {"words": ["cat"]}, "to": [4, 4], "steps": {"sigma": [0, 0.5]}}
    program = json.dumps({"a": edit})
    even, bent = (json.dumps({"shift": shift, "use_dynamic_shifting": False}) for shift in (1.0, 3.0))
    drawn = [page._drawn(program, (16, 16), 24, "a red cat", 16, schedule).url for schedule in (even, bent)]
    assert drawn[0].startswith("data:image/png;base64,")
    assert drawn[0] != drawn[1]  # σ falls to 0.5 at another step
    assert "words" in page._drawn(program, (16, 16), 24, "a red fox", 16, even).missing


def test_each_combination_of_m_keeps_its_own_command(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(fluxlab.run, "run", lambda config, command: commands.append(command))
    monkeypatch.chdir(tmp_path)
    assert fluxlab.run.main(["-m", "+exp=hello", "seeds=1,2", "prompts=['a red fox']"]) == 0
    assert [shlex.split(command) for command in commands] == [
        ["python", "-m", "fluxlab.run", "+exp=hello", f"seeds={seeds}", "prompts=['a red fox']"] for seeds in (1, 2)
    ]
