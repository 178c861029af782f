"""`python -m fluxlab.play`: its command line, and its page in Chromium, without a network."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from fluxlab.play.__main__ import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # ms


def test_wrong_words(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in (
            ([f"port={port}"], f"port={port}: cannot be used"),
            (["port=70000"], "port=70000: expected a number from 0 to 65535"),
            (["port=x"], "port: 'x', expected a whole number"),
            (["dtype=half", "port=0"], "dtype=half: expected float32"),
            (["model=nothing"], "nothing"),
            (["prot=1"], "prot"),
            (["--port=1"], "--port=1: there is no such flag"),
        ):
            assert main(words) == 2, words
            error = capsys.readouterr().err
            assert message in error
            assert len(error.splitlines()) <= 3
    assert main(["--help"]) == 0
    assert "127.0.0.1" in capsys.readouterr().out


def test_without_nicegui(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert main(["port=0"]) == 2
    assert capsys.readouterr().err == "the playground needs NiceGUI: pip install 'fluxlab[play]'\n"


@pytest.fixture(scope="module")
def address():
    """Serve the page of the embedded model, and return its address."""
    pytest.importorskip("nicegui", reason="nicegui is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}  # NiceGUI reads it
    command = [sys.executable, "-m", "fluxlab.play", "port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        for _ in range(300):  # the line is printed just before the server listens
            with socket.socket() as tried:
                if process.poll() is not None or tried.connect_ex(("127.0.0.1", int(found[1]))) == 0:
                    break
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def page(address):
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=WAIT)
        context = browser.new_context(
            viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
        )
        opened, requests, errors = context.new_page(), [], []
        opened.set_default_timeout(WAIT)
        opened.on("request", lambda request: requests.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(address)
        yield opened
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith((address, "data:"))] == []


def test_the_page(page):
    """One visit: an answer, a change with a slider, an error, another op, the YAML, a phone."""

    def sources():
        return page.eval_on_selector_all(".pair img", "all => all.map(one => one.src)")

    def wait_for_another(after):
        page.wait_for_function("old => document.querySelectorAll('.pair img')[1].src != old", arg=after)

    page.fill("[aria-label=steps][type=number]", "2")
    page.locator(".yaml-text", has_text=re.compile(r"steps: 2\n")).wait_for()
    page.get_by_text("steps: all 2", exact=True).wait_for()
    before, after = sources()
    assert before != after
    words = page.locator(".maps figcaption").all_inner_texts()
    assert words == ["A#1", "cat", "holding", "a#2", "sign", "that", "says", "hello", "world"]
    assert page.eval_on_selector(".positions img", "one => one.complete && one.naturalWidth") > 300

    page.focus(".q-slider[aria-label=factor] [tabindex]")
    page.keyboard.press("ArrowRight")
    wait_for_another(after)
    assert page.input_value("[aria-label=factor]:not(.q-slider)") == "1.25"
    assert sources()[0] == before
    assert "scale: {op: scale, factor: 1.25}" in page.inner_text(".yaml-text")

    after = sources()[1]
    page.fill("[aria-label=factor]:not(.q-slider)", "twice")
    page.get_by_role("alert").filter(has_text="scale.factor: 'twice', expected a number").wait_for()
    assert page.locator(".stale").count() == 1
    page.fill("[aria-label=factor]:not(.q-slider)", "{row: 2}")
    wait_for_another(after)
    assert page.locator(".stale").count() == 0
    assert not page.get_by_role("alert").is_visible()

    after = sources()[1]
    page.click(".q-select[aria-label=op], label:has([aria-label=op])")
    page.get_by_role("option", name="zero", exact=True).click()
    wait_for_another(after)
    page.get_by_role("button", name="copy").click()
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.splitlines()[-4:] == ["variants:", "  baseline: {}", "  mine:", "    zero: {op: zero}"]
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 380


def test_other_names_of_this_host_are_refused(address):
    from http.client import HTTPConnection

    for name, status in (("localhost", 200), ("another.site", 400)):
        connection = HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("GET", "/", headers={"Host": name})
        assert connection.getresponse().status == status
