"""README, CONTRIBUTING and docs/ describe the project as it is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_glossary_has_at_most_25_terms_and_defines_each_once():
    terms = re.findall(r"^\| \*\*(.+?)\*\* \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    assert 20 <= len(terms) <= 25
    assert len(set(terms)) == len(terms)
