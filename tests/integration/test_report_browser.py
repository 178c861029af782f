"""The page of a run in a browser: Chromium, without a network."""

import os
import shutil

import pytest

from fluxlab.experiment.reading import read_store
from fluxlab.report.attention.pictures import write_pictures
from fluxlab.report.page import write_report
from tests.stores import make_store

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

HOSTILE = '<script>document.title = "broken into"</script><img src=x onerror="document.title = 1">'
WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return write_report(
        [make_store(folder / "one", prompts=("a red cat", HOSTILE), seeds=(0, 12))], folder / "page.html"
    )


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=WAIT)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, report):
    """Open the page. At the end there must have been no error, and no request except for the page."""
    messages, requests, visited, contexts = [], [], [], []

    def open_page(width=1280, height=900, file=report, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        visited.append(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == visited


def visible(page, selector):
    return [element.inner_text() for element in page.query_selector_all(selector) if element.is_visible()]


def test_a_prompt_is_shown_as_text(visit):
    page = visit()
    assert page.title() == "test – fluxlab"
    assert HOSTILE in page.inner_text("table.grid thead tr:first-child th:last-child")
    assert HOSTILE in visible(page, "table.cells td.prompt")
    images = page.query_selector_all("table.grid img")
    assert [image.evaluate("image => image.complete && image.naturalWidth") for image in images] == [64] * 12


def test_comparing_with_the_slider_from_the_keyboard(visit):
    page = visit()
    page.focus("table.grid tbody tr:first-child button")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.inner_text("#compare h2") == "zero, seed 12"

    def baseline_to():
        shares = "stage => [stage.querySelector('.baseline').style.clipPath, stage.querySelector('.line').style.left]"
        return page.eval_on_selector(".stage", shares)

    assert baseline_to() == ["inset(0px 50% 0px 0px)", "50%"]
    page.keyboard.press("ArrowRight")
    assert baseline_to() == ["inset(0px 49% 0px 0px)", "51%"]
    page.keyboard.press("End")
    assert baseline_to() == ["inset(0px 0% 0px 0px)", "100%"]
    assert page.get_attribute("#compare input", "aria-valuetext") == "100 % baseline"

    def shown():
        cell = "table.grid tbody tr:nth-child({}) td:nth-of-type({}) img"
        sources = [page.get_attribute(f".stage .{name}", "src") for name in ("variant", "baseline")]
        places = [(y, x) for y in (1, 2, 3) for x in (1, 2, 3, 4)]
        return [next(p for p in places if page.get_attribute(cell.format(*p), "src") == source) for source in sources]

    assert shown() == [(2, 2), (1, 2)]
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#compare h2") == "half, seed 12"
    assert shown() == [(3, 2), (1, 2)]
    page.keyboard.press("PageDown")
    assert page.inner_text("#compare .prompt") == HOSTILE
    assert shown() == [(3, 3), (1, 3)]
    assert page.get_attribute("[data-move='0 1']", "aria-disabled") == "true"
    page.click("[data-move='1 0']")
    page.keyboard.press("ArrowLeft")  # on a button arrows go to another cell
    assert shown() == [(3, 3), (1, 3)]
    texts = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    rows = page.eval_on_selector_all("#compare tbody tr", texts)
    table = page.eval_on_selector_all("table.cells tr", texts)
    ssim = table[0].index("ssim")
    assert next(row for row in rows if row[0] == "ssim") == ["ssim", table[11][ssim], table[3][ssim]]
    assert next(row for row in rows if row[0] == "psnr (dB)")[2] == "∞"
    page.keyboard.press("Escape")
    assert not page.is_visible("#compare")
    assert page.evaluate("document.activeElement.firstChild.alt").startswith("half, seed 0: <script>")


def test_dragging_on_the_image(visit):
    page = visit()
    page.click("table.cells tbody tr:nth-child(9) .open")
    box = page.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 9)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 30)
    page.mouse.up()
    assert page.input_value("#compare input") == "25"
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 30)
    assert page.input_value("#compare input") == "25"
    assert box["width"] % 64 == 0  # whole pixels
    page.click("#compare .close")
    assert not page.is_visible("#compare")


def test_filter(visit):
    page = visit()
    variants = "table.grid tbody th a"
    assert page.inner_text("form.filter output") == "12 of 12 cells"
    page.fill("[name=words]", "SCALE factor")  # words of the program
    assert visible(page, variants) == ["half"]
    assert page.inner_text("form.filter output") == "4 of 12 cells"
    assert len(visible(page, "table.cells tbody tr")) == 4
    page.fill("[name=words]", "seed 1")
    assert visible(page, variants) == []
    page.fill("[name=words]", "seed 12 cat")
    assert visible(page, variants) == ["baseline", "zero", "half"]
    assert visible(page, "table.grid thead th") == ["a red cat", "variant", "seed 12"]
    page.fill("[name=words]", "")
    page.select_option("[name=metric]", "psnr")
    page.fill("[name=least]", "1000")
    assert visible(page, variants) == ["baseline"]  # ∞ dB
    page.fill("[name=least]", "")
    page.fill("[name=most]", "1000")
    assert visible(page, variants) == ["zero", "half"]
    page.keyboard.press("Enter")  # submits nothing
    page.click("form.filter [type=reset]")
    page.get_by_text("12 of 12 cells", exact=True).wait_for()
    assert visible(page, variants) == ["baseline", "zero", "half"]


@pytest.mark.parametrize("table", ["findings", "cells"])
def test_sort(visit, table):
    page = visit()
    column = f"table.{table} thead th[data-metric=sharpness]"

    def values():
        script = (
            "(head) => [...head.closest('table').tBodies[0].rows].map(r => r.cells[head.cellIndex])"
            ".map(c => Number(c.dataset.value ?? c.textContent))"
        )
        return page.eval_on_selector(column, script)

    before = values()
    page.click(f"{column} button")
    assert page.get_attribute(column, "aria-sort") == "ascending"
    assert values() == sorted(before)
    page.focus(f"{column} button")
    page.keyboard.press("Enter")
    assert page.get_attribute(column, "aria-sort") == "descending"
    assert values() == sorted(before, reverse=True) != before
    page.keyboard.press("Enter")
    assert page.get_attribute(column, "aria-sort") == "none"
    assert values() == before
    page.click(f"table.{table} thead th:first-child button")
    names = visible(page, f"table.{table} tbody:first-of-type th")
    assert names == sorted(names)
    if table == "findings":
        assert visible(page, "table.findings tbody.controls th") == ["another seed", "noise floor"]
    page.click(f"table.{table} thead th[data-metric=psnr] button")
    assert visible(page, f"table.{table} tbody:first-of-type th")[-1] == "baseline"  # ∞ dB


def test_a_table_that_is_cut_says_that_it_scrolls(visit):
    page = visit()
    findings, cells = '[aria-label="findings"]', '[aria-label="cells"]'

    def state(region):
        hint = page.locator(f"p.hint:has(+ {region})")
        hidden = "scroll => scroll.scrollWidth - scroll.clientWidth - scroll.scrollLeft"
        return (
            hint.is_visible(),
            "cut" in page.get_attribute(region, "class"),
            page.eval_on_selector(region, hidden) > 1,
        )

    assert state(findings) == (False, False, False)  # all columns fit 1280 px
    assert state(cells) == (True, True, True)
    page.eval_on_selector(cells, "scroll => { scroll.scrollLeft = scroll.scrollWidth; }")
    page.wait_for_selector(f"{cells}:not(.cut)")  # a function would be evaluated, which the page's policy forbids
    assert state(cells) == (False, False, False)
    page.check("#all-metrics")
    page.wait_for_selector(f"{findings}.cut")
    assert state(findings) == (True, True, True)


def test_the_choice_of_metrics(visit):
    page = visit()
    assert "rmse" not in " ".join(visible(page, "table.findings thead th"))
    page.check("#all-metrics")
    assert "rmse" in " ".join(visible(page, "table.findings thead th"))


def test_copying_the_command(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.click(".copy")
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "python -m fluxlab.run +exp=test"


def test_a_phone(visit):
    page = visit(380, 800, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    page.tap("table.grid tbody tr:nth-child(2) td:nth-of-type(1) button")
    box = page.locator("#compare").bounding_box()
    assert (box["x"], box["width"]) == (0, 380)
    stage = page.locator(".stage").bounding_box()
    assert 256 <= stage["width"] <= 380


def test_dark_and_in_print(visit):
    pages = [visit(color_scheme=scheme) for scheme in ("light", "dark")]
    read = "getComputedStyle(document.body).backgroundColor"
    assert [page.evaluate(read) for page in pages] == ["rgb(255, 255, 255)", "rgb(21, 23, 27)"]
    pages[1].emulate_media(media="print")
    assert pages[1].evaluate(read) == "rgb(255, 255, 255)"
    assert not pages[1].is_visible("form.filter")


def test_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("form.filter").is_hidden()
    assert page.locator(".copy").is_hidden()
    assert page.locator("table.grid img").first.is_visible()
    assert page.locator("noscript p").is_visible()
    assert page.locator("table.findings tbody.controls th").all_inner_texts() == ["noise floor", "another seed"]


CAPTURE = {
    "words": {"kind": "words", "direction": "image_to_word", "average": ["heads"]},
    "quadrants": {"kind": "quadrants"},
}


@pytest.fixture(scope="module")
def attention_report(tmp_path_factory):
    """Return a page of two runs, the second with captured attention."""
    folder = tmp_path_factory.mktemp("attended")
    stores = [
        make_store(folder / "plain", {}, prompts=("a red cat",), seeds=(0,), caption="plain"),
        make_store(folder / "attention", prompts=("a red cat", HOSTILE), seeds=(0, 12), attention=CAPTURE),
    ]
    for store in stores:
        write_pictures(read_store(store))
    return write_report(stores, folder / "page.html")


@pytest.fixture
def visit_attention(visit, attention_report):
    """Open the page with attention."""
    return lambda *size, **options: visit(*size, file=attention_report, **options)


PIXELS = "canvas => canvas.hidden ? null : [canvas.width, canvas.height, canvas.toDataURL()]"


def painted(page, root=".pair"):
    return page.eval_on_selector_all(f"{root} canvas", f"all => all.map({PIXELS})")


def test_controls_change_the_maps(visit_attention):
    page = visit_attention()
    assert page.eval_on_selector_all("#attention-controls [name=word] option", "all => all.map(one => one.text)") == [
        "a",
        "red",
        "cat",
    ]
    assert page.inner_text(".pair .baseline b") == "baseline, seed 0"
    assert page.inner_text(".pair .variant b") == "zero, seed 0"
    sources = page.eval_on_selector_all(".pair img", "all => all.map(one => one.src)")
    grid = "table.grid >> nth=1 >> tbody tr:nth-child({}) td:nth-of-type(1) img"
    assert sources == [page.get_attribute(grid.format(row), "src") for row in (1, 2)]
    states = [painted(page)]
    assert states[0][0][:2] == [16, 16]
    assert states[0][0] != states[0][1]
    for name, key, text in (
        ("block", "ArrowRight", "0"),
        ("block", "End", "5"),
        ("step", "ArrowRight", "0, σ 1.00"),
        ("step", "End", "15, σ 0.06"),
        ("opacity", "ArrowLeft", "74 %"),
    ):
        page.focus(f"#attention-controls [name={name}]")
        page.keyboard.press(key)
        assert page.inner_text(f"#attention-controls .{name} output") == text
        assert text in page.get_attribute(f"#attention-controls [name={name}]", "aria-valuetext")
        assert painted(page) not in states
        states.append(painted(page))
    for name, label in (("word", "cat"), ("variant", "half"), ("prompt", HOSTILE)):
        page.select_option(f"#attention-controls [name={name}]", label=label)
        assert painted(page) not in states
        states.append(painted(page))
    assert page.inner_text(".pair .variant b") == "half, seed 0"
    largest = [float(text.split()[1]) for text in page.locator(".pair .largest").all_inner_texts()]
    assert float(page.inner_text("#attention-controls .top")) == max(largest) > 0


def test_attention_in_the_comparison(visit_attention):
    page = visit_attention()
    page.click("table.grid >> nth=0 >> tbody button")
    assert page.is_hidden("#dialog-attention")  # nothing was captured there
    page.keyboard.press("Escape")
    page.click("table.grid >> nth=1 >> tbody tr:nth-child(2) td:nth-of-type(1) button")
    assert page.is_hidden(".stage canvas >> nth=0")
    page.select_option("#dialog-attention [name=word]", label="cat")
    before = painted(page, ".stage")
    assert before[0] != before[1]
    page.focus("#dialog-attention [name=block]")
    page.keyboard.press("ArrowUp")  # the slider's own, not the next variant
    assert page.inner_text("#compare h2") == "zero, seed 0"
    assert painted(page, ".stage") != before
    page.focus("#compare > input")
    page.keyboard.press("End")
    clips = page.eval_on_selector_all(".stage .baseline", "all => all.map(one => one.style.clipPath)")
    assert clips == ["inset(0px 0% 0px 0px)"] * 2
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#compare h2") == "half, seed 0"
    assert page.is_visible(".stage canvas >> nth=0")
    page.keyboard.press("PageDown")  # the page has no maps of another seed
    assert page.is_hidden("#dialog-attention")
    assert page.is_hidden(".stage canvas >> nth=0")


def test_attention_on_a_phone_and_without_scripts(visit_attention):
    page = visit_attention(380, 800, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    boxes = [page.locator(f".pair .{side}").bounding_box() for side in ("baseline", "variant")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert all(box["width"] > 150 for box in boxes)
    plain = visit_attention(java_script_enabled=False)
    assert plain.is_hidden("#attention-controls")
    assert plain.is_visible("#attention noscript p")
    assert plain.locator("#attention .drawings img").first.is_visible()
