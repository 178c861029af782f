"""README, CONTRIBUTING and docs/ describe the project as it is."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from docs import architecture, tables

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda file: file.name)
def page(request) -> Path:
    return request.param


def test_generated_tables_are_current(page):
    """`python docs/tables.py` refreshes them."""
    text = page.read_text()
    assert tables.rendered(text) == text, "run python docs/tables.py"


def test_a_stale_table_is_replaced_and_the_rest_kept():
    stale = "before\n<!-- table: models -->\n| stale row |\n<!-- end table -->\nafter\n"
    fresh = tables.rendered(stale)
    assert fresh.startswith("before\n<!-- table: models -->\n| `model=` |")
    assert "| `schnell` | FLUX.1 [schnell]" in fresh
    assert fresh.endswith("\n<!-- end table -->\nafter\n")
    assert "stale row" not in fresh
    assert tables.rendered(fresh) == fresh
    with pytest.raises(KeyError, match="'tabel', expected one of answer, experiments"):
        tables.rendered(stale.replace("models", "tabel"))


def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and link[0] != "#"]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_glossary_has_at_most_25_terms_and_defines_each_once():
    terms = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert 20 <= len(terms) <= 25
    assert len(set(terms)) == len(terms)


def test_the_import_graph_is_current():
    """`python docs/architecture.py` refreshes it."""
    imported = architecture.imports()
    assert json.loads(architecture.DATA.read_text()) == imported, "run python docs/architecture.py"
    with Image.open(architecture.PICTURE) as picture:
        assert picture.text["Description"] == architecture.digest(imported)


def test_the_page_on_architecture_lists_every_package():
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(architecture.imports())


def test_arrows_are_the_imports_that_no_chain_implies():
    imported = {"run": ["model", "errors", "files"], "model": ["errors"], "errors": [], "files": []}
    assert architecture.arrows(imported) == [("run", "model"), ("run", "files"), ("model", "errors")]
    assert architecture.levels(imported) == {"run": 2, "model": 1, "errors": 0, "files": 0}
    column = architecture.columns(imported)
    assert abs(column["errors"] - column["files"]) >= architecture.ARROW_GAP
    with pytest.raises(ValueError, match="import cycle: a -> b -> a"):
        architecture.levels({"a": ["b"], "b": ["a"]})
