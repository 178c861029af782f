"""Prompt files: what is read, and which line is named when it cannot be."""

import codecs
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlab.experiment.prompts import read_prompts

CAT, FOX = "A cat holding a sign that says hello world", "a red fox on the left"


def written(folder, content, name="prompts.txt"):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_a_line_a_prompt(tmp_path):
    text = f"# two of them\n\n  {CAT}  \n\t\n  # and\n{FOX}"
    assert read_prompts(written(tmp_path, text)) == [CAT, FOX]
    assert read_prompts(str(written(tmp_path, text))) == [CAT, FOX]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_and_a_mark_of_utf8(tmp_path, end):
    assert read_prompts(written(tmp_path, codecs.BOM_UTF8 + f"{CAT}{end}{FOX}{end}".encode())) == [CAT, FOX]


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, CAT)
    assert read_prompts("~/prompts.txt") == [CAT]


def test_jsonl(tmp_path):
    lines = [json.dumps({"prompt": CAT, "seed": 3}), "", json.dumps(FOX), json.dumps(" # of spaces "), '{"prompt": ""}']
    assert read_prompts(written(tmp_path, "\n".join(lines), "p.JSONL")) == [CAT, FOX, " # of spaces ", ""]


WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n"), min_size=1).map(str.strip)
PROMPTS = st.lists(WORDS.filter(lambda text: text and not text.startswith("#")), min_size=1, max_size=5, unique=True)


@settings(max_examples=50, deadline=None)
@given(prompts=PROMPTS)
def test_prompts_come_back_as_they_are(prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    assert read_prompts(written(folder, codecs.BOM_UTF8 + "\n".join(prompts).encode())) == prompts
    lines = [json.dumps(prompt) for prompt in prompts]
    assert read_prompts(written(folder, "\n".join(lines), "p.jsonl")) == prompts


WRONG = [
    ("p.txt", "", r"p\.txt: no prompt found; write one per line"),
    ("p.txt", "\n# nothing\n  \n", r"p\.txt: no prompt found"),
    ("p.jsonl", "\n", r"p\.jsonl: no prompt found"),
    ("p.txt", f"{CAT}\n# {CAT}\n{FOX}\n{CAT} \n", r"p\.txt, lines 1 and 4: 'A cat .*world' occurs twice"),
    ("p.jsonl", '"a"\n{"prompt": "a"}', r"p\.jsonl, lines 1 and 2: 'a' occurs twice"),
    ("p.txt", b"a cat\nun caf\xe9\n", r"p\.txt, line 2: not UTF-8 .*save the file as UTF-8"),
    ("p.txt", codecs.BOM_UTF8 + b"caf\xe9", r"p\.txt, line 1: not UTF-8"),
    ("p.txt", CAT.encode("utf-16"), r"p\.txt, line 1: not UTF-8"),
    ("p.jsonl", '"a"\n{"prompt": "b"', r"""p\.jsonl, line 2: '\{"prompt": "b"', expected .*Expecting"""),
    ("p.jsonl", CAT, r"p\.jsonl, line 1: 'A cat .*, expected \{\"prompt\": \"…\"\} or a JSON string"),
    ("p.jsonl", "# no comments in JSON", r"p\.jsonl, line 1: '# no comments in JSON', expected"),
    ("p.jsonl", "[" * 100_000, r"p\.jsonl, line 1: .*expected"),
    ("p.jsonl", '\n{"promt": "a", "seed": 1}', r"p\.jsonl, line 2: no key prompt, only promt, seed; expected"),
    ("p.jsonl", "{}", r"p\.jsonl, line 1: no key prompt, only none"),
    ("p.jsonl", '{"prompt": ["a"]}', r"p\.jsonl, line 1: \['a'\], expected"),
    ("p.jsonl", "3", r"p\.jsonl, line 1: 3, expected"),
    ("p.jsonl", r'"\ud83d"', r"p\.jsonl, line 1: '\\ud83d' contains half a character"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(written(tmp_path, content, name))
    assert str(raised.value).startswith(str(tmp_path))
    assert len(str(raised.value).splitlines()) == 1


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="a folder; expected a file"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read"):
        read_prompts(written(tmp_path, CAT) / "more.txt")
