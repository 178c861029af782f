"""The recipes of CONTRIBUTING.md: their code is applied to a copy of the project, their commands are run there.

A step is a fenced block and the text before it: "Append to `path`:", "Create `path`", "In `path`, add below `line`:" or
"Run". A block without one of these fails the test, so that no code in a recipe goes untested.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("benchmarks", "configs", "docs", "experiments", "fluxlab", "notebooks", "tests")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "pyproject.toml")
SECTIONS = re.findall(
    r"^## (Add [^\n]+)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
)
STEP = re.compile(
    r"Append\s+to\s+`(?P<append>[^`]+)`"
    r"|Create\s+`(?P<create>[^`]+)`"
    r"|In\s+`(?P<insert>[^`]+)`,\s+add\s+below\s+`(?P<below>[^`]+)`"
    r"|(?P<run>\bRun\b)"
)


@pytest.fixture
def copy(tmp_path) -> Path:
    ignored = shutil.ignore_patterns("golden")  # compiled files stay valid: times of files are copied too
    for folder in COPIED:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def steps(recipe: str) -> list[tuple[re.Match, str]]:
    """Return (what to do, code) of every fenced block: the last instruction in the text before it."""
    found = []
    parts = re.split(r"^```\w+\n(.*?)^```$", recipe, flags=re.DOTALL | re.MULTILINE)
    for text, code in zip(parts[::2], parts[1::2], strict=False):
        instructions = list(STEP.finditer(text))
        assert instructions, f"no instruction before this block:\n{code}"
        found.append((instructions[-1], code))
    return found


def apply(step: re.Match, code: str, folder: Path) -> None:
    if step["run"]:
        return run(code, folder)
    file = folder / (step["append"] or step["create"] or step["insert"])
    if step["append"]:
        text = file.read_text() + code
    elif step["create"]:
        assert not file.exists(), file
        file.parent.mkdir(parents=True, exist_ok=True)
        text = code
    else:
        before, line, after = file.read_text().partition(f"{step['below']}\n")
        assert line, f"{file.name}: no line ends in {step['below']!r}"
        assert step["below"] not in after, f"{file.name}: several lines contain {step['below']!r}"
        text = f"{before}{line}{code}{after}"
    file.write_text(text)
    if file.suffix == ".py":
        for command in (["check"], ["format", "--check"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", str(file)]
            done = subprocess.run(ruff, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
    return None


def run(script: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(folder), "PATH": path, "WANDB_MODE": "disabled"}
    done = subprocess.run(
        ["bash", "-euxc", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_every_extension_has_a_recipe():
    names = {f"Add {what}" for what in ("an op", "a probe", "a metric", "an experiment", "a figure", "a model family")}
    assert {title for title, _ in SECTIONS} == names


@pytest.mark.parametrize(("title", "recipe"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_the_recipe_works(title, recipe, copy):
    todo = steps(recipe)
    assert todo[-1][0]["run"], "a recipe ends by running something"
    for step, code in todo:
        apply(step, code, copy)
