"""The tour: its two files agree, neither contains outputs, and it runs."""

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


def test_both_files_agree(script):
    pair = [jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))]
    cells = [[(cell.cell_type, cell.source) for cell in one.cells] for one in pair]
    assert cells[0] == cells[1], f"run jupytext --to ipynb {script}"
    assert pair[0].metadata.kernelspec == pair[1].metadata.kernelspec


def test_outputs_are_not_saved(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_no_functions_or_classes_are_defined(script):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, defined)]


def test_the_tour_runs(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / "tour.ipynb", as_version=4)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path)}
    environment["JUPYTER_RUNTIME_DIR"] = str(tmp_path)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)  # raises if a cell does
    types = {
        i: [kind for output in cell.get("outputs", ()) for kind in output.get("data", {})]
        for i, cell in enumerate(notebook.cells)
    }
    images = [i for i, kinds in types.items() if "image/png" in kinds]
    assert [_heading(notebook, i) for i in images] == ["An edit", "An edit", "Images", "An experiment"]
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "img_ids (1, 256, 3) torch.float32" in printed
    assert "half" in printed
    differences = dict(line.split(":") for line in printed.splitlines() if line.startswith("  ids "))
    assert int(differences["  ids halved"]) > 5 * int(differences["  ids shifted"])  # which is rounding


def _heading(notebook, i: int) -> str:
    titles = [cell.source for cell in notebook.cells[:i] if cell.source.startswith("## ")]
    return titles[-1].splitlines()[0].removeprefix("## ")
