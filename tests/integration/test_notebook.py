"""The tour: its two files say the same, neither holds results, and it runs."""

import ast
import os
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request):
    return request.param


def test_every_notebook_is_a_pair():
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert SCRIPTS


def test_the_pair_says_the_same(script):
    pair = [jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))]
    told = [[(cell.cell_type, cell.source) for cell in one.cells] for one in pair]
    assert told[0] == told[1], f"write the notebook anew: jupytext --to ipynb {script}"
    assert pair[0].metadata.kernelspec == pair[1].metadata.kernelspec


def test_no_results_are_kept(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_nothing_is_defined_that_could_be_reused(script):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, defined)]


def test_the_tour_runs(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / "tour.ipynb", as_version=4)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
    environment["JUPYTER_RUNTIME_DIR"] = str(tmp_path)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)  # raises for a cell that does
    shown = {
        i: [sort for output in cell.get("outputs", ()) for sort in output.get("data", {})]
        for i, cell in enumerate(notebook.cells)
    }
    pictures = [i for i, sorts in shown.items() if "image/png" in sorts]
    assert [_heading(notebook, i) for i in pictures] == ["An edit", "An edit", "Pictures", "An experiment"]
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "img_ids (1, 256, 3) torch.float32" in said
    assert "half" in said
    differences = dict(line.split(":") for line in said.splitlines() if line.startswith("  ids "))
    assert int(differences["  ids halved"]) > 5 * int(differences["  ids shifted"])  # which is rounding


def _heading(notebook, i: int) -> str:
    titles = [cell.source for cell in notebook.cells[:i] if cell.source.startswith("## ")]
    return titles[-1].splitlines()[0].removeprefix("## ")
