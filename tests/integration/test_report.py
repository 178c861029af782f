"""The page of a run: its content, its safety, and that the same run gives the same bytes."""

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageColor

import fluxlab.run
from fluxlab.drawing import pictures
from fluxlab.drawing.style import OKABE_ITO
from fluxlab.experiment.reading import Run, read_store
from fluxlab.measure.summary import Effect
from fluxlab.report import findings, page, parts, position_plot
from fluxlab.report.__main__ import main
from fluxlab.report.page import render, write_report
from fluxlab.report.products import grid
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
    """Tags with their attributes, and every table as rows of texts, by class."""

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


def test_the_page_loads_nothing(html):
    tags = Tree(html).tags
    for tag, attrs in tags:
        for key in ("src", "href", "srcset", "action", "data"):
            assert attrs.get(key, "#").startswith(("#", "data:")), (tag, attrs)
        assert not [key for key in attrs if key.startswith("on")], (tag, attrs)
        assert "style" not in attrs  # the content security policy forbids it
    assert not re.search(r"url\(|@import|fetch\(|innerHTML|https?://", html)
    assert [tag for tag, _ in tags].count("script") == 1


def test_the_policy_allows_only_the_page_s_own_script_and_style(html):
    policy = next(attrs["content"] for tag, attrs in Tree(html).tags if "Content-Security-Policy" in attrs.values())
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_prompt_is_shown_as_text(html, store):
    assert "<script>document" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;document") > 10  # caption, command, headings, cells, descriptions of images
    assert HOSTILE in [row[1] for row in Tree(html).table("cells")]


def test_the_same_store_gives_the_same_bytes_and_is_not_changed(store, tmp_path):
    def state():
        return {file: file.stat().st_mtime_ns for file in sorted(store.rglob("*")) if file.is_file()}

    before = state()
    position_plot._draw.cache_clear()
    first = write_report([store], tmp_path / "a.html")
    position_plot._draw.cache_clear()
    again = write_report([str(store)], str(tmp_path / "b.html"))
    assert first.read_bytes() == again.read_bytes()
    written = first.stat().st_mtime_ns
    assert write_report([store], first).stat().st_mtime_ns == written  # unchanged, so not written
    assert state() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_images_are_embedded_as_stored(html, store):
    run = read_store(store)
    urls = [attrs["src"] for tag, attrs in Tree(html).tags if tag == "img" and "seed" in attrs["alt"]]
    stored = [run.image(row["variant"], row["prompt"], row["seed"]).read_bytes() for row in run.metrics]
    assert [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls] == stored
    assert 'class="crisp"' in html
    assert "WebP" not in html


def test_cells_are_in_the_order_of_the_experiment(html, store):
    run = read_store(store)
    head, *rows = Tree(html).table("cells")
    assert [row[:3] for row in rows] == [[row["variant"], row["prompt"], str(row["seed"])] for row in run.metrics]
    ssim = next(i for i, name in enumerate(head) if name == "ssim")
    assert [float(row[ssim]) for row in rows] == [row["ssim"] for row in run.metrics]
    assert {len(row) for row in rows} == {len(head)}
    assert "relation" not in head  # no caption asks for one


def test_findings_are_effects_with_the_controls_last(html, store):
    """A metric of one image is the baseline plus the paired difference; a comparison is its own mean."""
    run = read_store(store)
    head, *rows = Tree(html).table("findings")
    assert [row[0] for row in rows] == ["baseline", "zero", "half", "noise floor", "another seed"]
    assert [row[1] for row in rows] == ["4", "4", "4", "2", "4"]  # the noise floor has the first seed only
    effects = {(effect.variant, effect.metric): effect for effect in run.effects}
    for name in ("ssim", "sharpness"):
        column = next(i for i, title in enumerate(head) if title.split(" ")[0] == name)
        for row in rows:
            effect = effects[row[0], name]
            numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+(?:e-\d+)?", row[column])]
            expected = [effect.value]
            ends = [effect.low, effect.high]
            if not np.isnan(effect.difference):
                expected.append(effect.difference)
                ends = [effect.difference_low, effect.difference_high]
            expected += ends if ends[0] < ends[1] else []
            assert numbers == pytest.approx(expected, abs=0.006 if name == "ssim" else 6e-5)
    assert rows[0][next(i for i, title in enumerate(head) if title.startswith("psnr"))] == "∞"


def effect(variant="a", metric="m", n=4, value=2.0, low=1.0, high=3.0, **more):
    return Effect(variant, metric, n, value, low, high, **more)


def test_a_control_with_fewer_cells_is_drawn_at_the_baseline():
    """Its own mean is over other cells than the baseline's and must not look like an effect."""
    rows = [
        effect("baseline", "word", 8, 0.625, 0.25, 0.875, own_mean=0.625),
        effect("noise floor", "word", 2, 0.625, 0.625, 0.625, own_mean=0.5, difference=0.0),
        effect("zero", "word", 8, 0.0, 0.0, 0.0, own_mean=0.0, difference=-0.625),
    ]
    table = {(row.variant, row.metric): row for row in rows}
    column = findings.Column("word", rows)
    cells = {row.variant: column.cell(table, row.variant, row.n) for row in rows}
    assert cells["noise floor"]["at"] == cells["baseline"]["at"] == cells["zero"]["floor"]
    assert (cells["noise floor"]["value"], cells["noise floor"]["difference"]) == ("0.625", "+0.000")


def test_drawings_are_on_one_scale_per_metric():
    rows = [effect(), effect("noise floor", value=0.0, low=0.0, high=0.0), effect("another seed", value=4.0, high=5.0)]
    table = {(row.variant, row.metric): row for row in rows}
    cell = findings.Column("m", rows).cell(table, "a", 4)
    low, high = findings.SCALE
    assert [cell[key] for key in ("floor", "from", "at", "to", "ceiling")] == [
        round(low + (high - low) * share, 1) for share in (0, 0.2, 0.4, 0.6, 0.8)
    ]
    assert (cell["value"], cell["interval"], cell["difference"], cell["n"]) == ("2.00", "[1.00, 3.00]", "", 0)
    flat = effect(value=1.0, low=1.0, high=1.0)
    assert findings.Column("m", [flat]).cell({("a", "m"): flat}, "a", 4)["at"] is None


def test_small_differences_are_not_printed_as_zero():
    row = effect(value=0.5, difference=-1.6e-5, difference_low=-2e-5, difference_high=-1e-5)
    cell = findings.Column("m", [row]).cell({("a", "m"): row}, "a", 4)
    assert (cell["difference"], cell["interval"]) == ("-1.6e-05", "[-2.0e-05, -1.0e-05]")


def test_a_cell_with_fewer_values_says_its_n():
    rows = [effect(metric="m", n=8), effect(metric="place", n=3)]
    table = {(row.variant, row.metric): row for row in rows}
    assert findings.Column("place", rows).cell(table, "a", 8)["n"] == 3
    assert findings.Column("m", rows).cell(table, "a", 8)["n"] == 0


def test_empty_cells_state_the_reason(tmp_path):
    """Without an object nothing can have moved. In the tables of findings and of cells a word says so."""
    store = make_store(tmp_path / "s", {"zero": {"a": {"op": "zero"}}}, prompts=("a red cat",), seeds=(0,))
    text = (store / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("thing_moved")
    row = text[2].split(",")
    row[column] = ""
    (store / "metrics.csv").write_text("\n".join([*text[:2], ",".join(row), *text[3:]]) + "\n")
    summary = (store / "summary.csv").read_text().splitlines()
    summary = ["zero,thing_moved,0,,,,,,,0," if x.startswith("zero,thing_moved,") else x for x in summary]
    (store / "summary.csv").write_text("\n".join(summary) + "\n")
    tree = Tree(render([read_store(store, check=False)]))
    for table in ("findings", "cells"):
        head, *rows = tree.table(table)
        moved = next(i for i, title in enumerate(head) if title.split(" ")[0] == "thing_moved")
        zero = next(row for row in rows if row[0] == "zero")
        assert zero[moved] == "no object found"
        assert all(cell for row in rows for cell in row), table


def test_images_come_before_numbers_and_hashes_have_a_label(html, store):
    assert html.index('<section id="images"') < html.index('<section id="findings"') < html.index('id="cells"')
    text = "".join(Tree(html).texts)
    for digest in re.findall(r"\b[0-9a-f]{64}\b", text):
        assert re.search(rf"(Digest of the program: |model digest\s+){digest}", text), digest


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
def test_programs_can_be_read_back(program):
    text = page.program_yaml("no", program)  # unquoted, YAML reads no as false
    assert yaml.safe_load(text) == {"no": program}
    assert max(map(len, text.splitlines())) < 140


def test_programs_command_and_versions_are_shown(html, store):
    tree = Tree(html)
    record = read_store(store).record
    text = "".join(tree.texts)
    assert record["command"] in text
    for facts in (record["versions"], {"steps": 16, "kernel": "sdpa"}):
        for key, value in facts.items():
            assert [key, str(value)] in [
                row for _, rows in tree.tables for row in (list(map(str.strip, r)) for r in rows)
            ]
    assert "half:\n  a: {op: scale, factor: 0.5}" in text
    drawings = [attrs for tag, attrs in tree.tags if tag == "img" and attrs["alt"].startswith("Positions")]
    assert [attrs["alt"].partition(": ")[2] for attrs in drawings] == [
        "identity",
        "zero on image",
        "scale factor 0.5 on image",
    ]
    assert len({attrs["src"] for attrs in drawings}) == 3


def test_a_program_of_an_op_that_is_not_loaded(store, tmp_path):
    record = yaml.safe_load((store / "experiment.yaml").read_text())
    record["variants"]["half"]["program"] = {"a": {"op": "mine"}}
    for file in store.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "experiment.yaml").unlink()
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(record))
    html = render([read_store(tmp_path, check=False)])
    assert "No position plot: a.op: &#39;mine&#39;, expected" in html
    assert "a: {op: mine}" in html


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A store with the same name and another variant."""
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
        *([control, name] for name in names for control in ("noise floor", "another seed")),
    ]
    ids = [attrs["id"] for _, attrs in tree.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"][1:] for tag, attrs in tree.tags if tag == "a"}
    assert links <= set(ids)
    assert [attrs["data-run"] for _, attrs in tree.tags if "data-run" in attrs] == names
    assert len([1 for kind, _ in tree.tables if kind == "grid"]) == 2


def test_a_large_run_is_divided_by_prompts(store, tmp_path, monkeypatch):
    folder = shutil.copytree(store, tmp_path / "run")
    whole = render([folder])
    run = read_store(folder)
    monkeypatch.setattr(parts, "CELLS", len(run.metrics) // 2)
    file = write_report([folder], folder / "report.html")
    other = folder / "report-pages" / "0002.html"
    assert [path.name for path in (folder / "report-pages").iterdir()] == ["0002.html"]
    pages = [path.read_text() for path in (file, other)]
    found = [cells_of(html) for html in pages]
    assert found[0] + found[1] != cells_of(whole)  # in the order of the page, variants before prompts
    assert sorted(found[0] + found[1]) == sorted(cells_of(whole))
    first, second = dict.fromkeys(prompt for prompt, _ in run.places)
    assert {prompt for _, prompt, _ in found[0]} == {first}
    assert {prompt for _, prompt, _ in found[1]} == {second}
    assert all("2 prompts × 2 seeds" in html for html in pages)  # of the whole run
    assert 'href="report-pages/0002.html"' in pages[0]
    assert 'href="../report.html"' in pages[1]
    assert [html.count("<img src") for html in pages] == [6 + 3, 6]  # three position plots on the first page
    assert ['<h2 id="findings-title"' in html for html in pages] == [True, False]
    found = whole[whole.index('id="findings"') : whole.index('id="programs"')]
    assert found in pages[0]  # of all cells
    grid(run)
    with Image.open(folder / "grid.png") as image:
        assert image.width < 1500
    monkeypatch.setattr(parts, "CELLS", len(run.metrics))
    write_report([folder], folder / "report.html")
    assert file.read_text() == whole
    assert not other.parent.exists()  # a page that is not linked any more


def cells_of(html):
    """Return (variant, prompt, seed) of the rows of the table of cells."""
    ((_, rows),) = [table for table in Tree(html).tables if "cells" in table[0]]
    return [tuple(text.strip() for text in row[:3]) for row in rows[1:]]


def test_groups_of_prompts():
    def run(*counts):
        rows = [{"variant": "a", "prompt": f"p{i}", "seed": seed} for i, n in enumerate(counts) for seed in range(n)]
        return Run(Path(), {}, rows, [], [])

    def sizes(*runs):
        return [[len(part.metrics) for _, part in page.runs(runs)] for page in parts.divide(runs, "report.html")]

    assert sizes(run(1000, 1000)) == [[2000]]
    assert sizes(run(1000, 1000, 1)) == [[2000], [1]]
    assert sizes(run(1500, 1000, 900)) == [[1500], [1900]]
    assert sizes(run(2500, 1)) == [[2000], [501]]
    assert sizes(run(900, 900), run(400)) == [[900, 400], [900]]

    def labels(*counts):
        return [page.label for page in parts.divide([run(*counts)], "report.html")]

    assert labels(999, 999, 1500) == ["prompts 1 to 2", "prompt 3"]
    middle = [f"prompt 2, seeds {seeds}" for seeds in ("0 to 1999", "2000 to 3999")]
    assert labels(7, 4100, 8) == ["prompt 1", *middle, "prompts 2 to 3"]
    assert labels(4001)[-1] == "prompt 1, seed 4000"


def test_runs_with_the_same_name_get_different_names(store, tmp_path):
    (tmp_path / "copy").symlink_to(store)
    with pytest.raises(ValueError, match="named twice"):
        render([store, tmp_path / "copy"])
    (tmp_path / "real").mkdir()
    for file in store.iterdir():
        (tmp_path / "real" / file.name).symlink_to(file)
    digest = read_store(store).record["digest"]
    runs = [read_store(store), read_store(tmp_path / "real")]
    assert page.run_names(runs) == [f"test {digest} (1)", f"test {digest} (2)"]
    record = {**runs[1].record, "request": {"model": {"name": "dev"}}}
    assert page.run_names([runs[0], replace(runs[1], record=record)]) == ["test, tiny", "test, dev"]
    assert page.run_names([runs[0], replace(runs[1], record={**record, "name": "more"})]) == ["test", "more"]


def test_a_missing_image_is_marked(store, tmp_path):
    for file in store.iterdir():
        if file.name != "cells":
            (tmp_path / file.name).symlink_to(file)
    files = sorted((store / "cells").glob("*.png"))
    (tmp_path / "cells").mkdir()
    for file in files[1:]:
        (tmp_path / "cells" / file.name).symlink_to(file)
    assert render([tmp_path]).count(">missing<") == 1
    (tmp_path / "cells" / files[0].name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=rf"{files[0].name}: not a readable image"):
        render([tmp_path])


def noise(folder: Path, count: int, side: int) -> list[Path]:
    files = [folder / f"{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        values = np.random.default_rng(i).integers(0, 255, (side // 2, side, 3), dtype=np.uint8)
        Image.fromarray(values).save(file)
    return files


def test_images_fit_a_budget_of_bytes(tmp_path):
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
    assert sizes[-1] == (64, 32)  # the smallest size
    assert pictures.note(list(small.values())).startswith(
        "Images are 400 × 200 px, shown at 64 × 32, compressed as WebP"
    )
    assert pictures.embed(files, stored // 8) == pictures.embed(files, stored // 8)


def test_a_page_with_compressed_images_says_so(store):
    html = render([store], budget=1)
    assert "Images are in full size, compressed as WebP. The originals are in the run folder&#39;s cells/." in html
    shown = [attrs["src"] for tag, attrs in Tree(html).tags if tag == "img" and "seed" in attrs["alt"]]
    assert len(shown) == 12
    assert all(url.startswith("data:image/webp;base64,") for url in shown)


def test_command_line(store, other, tmp_path, capsys, monkeypatch):
    assert main([str(store), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == render([store])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/page.html  0.")
    monkeypatch.chdir(tmp_path)
    assert main([str(store), str(other), "-o", "both.html"]) == 0
    assert (tmp_path / "both.html").read_text() == render([store, other])
    assert main([str(other)]) == 0
    assert (other / "report.html").read_text() == render([other])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "STORE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: STORE"),
        (["nowhere"], "no experiment.yaml"),
        (["STORE", "STORE", "-o", "both.html"], "named twice"),
        (["STORE", "nowhere"], "a page of 2 run folders needs a name: add -o FILE"),
        (["STORE", "-o", "."], "a folder; name a file"),
        (["STORE", "-o", "no/such/page.html"], "there is no folder no/such"),
        (["STORE", "--plugins", "no_such_module"], "no_such_module"),
        (["STORE", "--cell"], "unrecognized arguments: --cell"),
    ],
)
def test_wrong_arguments_are_refused(store, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(store) if argument == "STORE" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_finished_is_refused(store, tmp_path):
    (tmp_path / "experiment.yaml").symlink_to(store / "experiment.yaml")
    with pytest.raises(ValueError, match=r"metrics\.csv: missing, so the run is not finished"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="no run folder is named"):
        render([])


def test_position_plots_use_the_prompt_and_the_schedule():
    edit = {"op": "relocate", "tokens": {"words": ["cat"]}, "to": [4, 4], "steps": {"sigma": [0, 0.5]}}
    program = json.dumps({"a": edit})
    schedules = [json.dumps({"shift": shift, "use_dynamic_shifting": False}) for shift in (1.0, 3.0)]
    for kind, start in (("svg", "data:image/svg+xml,"), ("png", "data:image/png;base64,")):
        plots = [position_plot._draw(program, (16, 16), 24, "a red cat", 16, given, kind).url for given in schedules]
        assert plots[0].startswith(start)
        assert plots[0] != plots[1]  # σ falls to 0.5 at another step
    assert "words" in position_plot._draw(program, (16, 16), 24, "a red fox", 16, schedules[0]).missing


def test_position_plots_of_many_tokens_are_png():
    program = json.dumps({"a": {"op": "scale", "factor": 2}})
    kinds = [
        position_plot._draw(program, grid, 8, "a red cat", 4, json.dumps({})).url[:14] for grid in ((32, 32), (33, 32))
    ]
    assert kinds == ["data:image/svg", "data:image/png"]


def test_a_page_needs_no_matplotlib(store):
    """It takes a tenth of the time of `+exp=article`."""
    code = (
        "import sys; from fluxlab.report.page import render; render(sys.argv[1:]); print('matplotlib' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(store)], check=True, capture_output=True, text=True).stdout
    assert out == "False\n"


def test_a_run_without_programs_has_no_position_plot():
    """There is nothing to compare the unchanged positions with."""
    run = SimpleNamespace(record={"variants": {"baseline": {"program": {}}, "again": {"program": {}}}})
    assert position_plot.position_plot(run, "baseline", "a red cat").missing == position_plot.UNCHANGED


def test_programs_that_leave_the_ids_have_no_position_plot():
    for edit in ({"op": "scale", "factor": 1}, {"op": "pi"}):
        plot = position_plot._draw(json.dumps({"a": edit}), (16, 16), 24, "a red cat", 4, json.dumps({}))
        assert (plot.url, plot.missing) == ("", position_plot.UNCHANGED)


@pytest.mark.parametrize("program", [{}, {"a": {"op": "zero"}}, {"a": {"op": "set", "value": 1, "axes": "index"}}])
def test_legend_entries_have_the_same_colours_in_every_position_plot(program):
    """In a palette of its own a plot would lose the colour of a legend entry that has few pixels elsewhere."""
    plot = position_plot._draw(json.dumps(program), (16, 16), 24, "a red cat", 4, json.dumps({}), "png")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(plot.url.partition(",")[2]))).convert("RGB"))
    for name in ("vermillion", "green"):  # top row and left column of the image
        assert (pixels == ImageColor.getrgb(OKABE_ITO[name])).all(-1).sum() > 20, name


def test_each_combination_of_m_keeps_its_own_command(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(fluxlab.run, "run", lambda config, command: commands.append(command))
    monkeypatch.chdir(tmp_path)
    assert fluxlab.run.main(["-m", "+exp=hello", "seeds=1,2", "prompts=['a red fox']"]) == 0
    assert [shlex.split(command) for command in commands] == [
        ["python", "-m", "fluxlab.run", "+exp=hello", f"seeds={seeds}", "prompts=['a red fox']"] for seeds in (1, 2)
    ]
