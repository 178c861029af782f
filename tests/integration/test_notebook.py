"""The notebooks: their two files agree, neither contains outputs, and they run."""

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


def run(name: str, scratch: Path, folder: Path):
    """Return the executed notebook. Raises if a cell does."""
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    environment = {**os.environ, "TMPDIR": str(scratch), "IPYTHONDIR": str(scratch)}
    environment["JUPYTER_RUNTIME_DIR"] = str(scratch)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return notebook


def images(notebook) -> list[str]:
    """Return the heading above each cell with an image."""
    kinds = [[k for output in cell.get("outputs", ()) for k in output.get("data", {})] for cell in notebook.cells]
    return [_heading(notebook, i) for i, found in enumerate(kinds) if "image/png" in found]


def printed(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))


def test_the_tour_runs(tmp_path):
    notebook = run("tour", tmp_path, tmp_path)
    assert images(notebook) == ["An edit", "An edit", "Images", "An experiment"]
    text = printed(notebook)
    assert "img_ids (1, 256, 3) torch.float32" in text
    assert "half" in text
    differences = dict(line.split(":") for line in text.splitlines() if line.startswith("  ids "))
    assert int(differences["  ids halved"]) > 5 * int(differences["  ids shifted"])  # which is rounding


def test_your_own_op_runs(tmp_path):
    notebook = run("your_own_op", tmp_path, tmp_path)
    assert images(notebook) == ["Look at it", "Look at it", "Measure it", "Measure it"]
    text = printed(notebook)
    assert "Move columns by `by` × row, so that the image leans." in text
    assert "a.by: 'a lot', expected a number" in text


def test_the_findings_are_redrawn(tmp_path):
    notebook = run("findings", tmp_path, FOLDER)
    assert len(images(notebook)) == 4
    assert "images per mean: 64" in printed(notebook)


def _heading(notebook, i: int) -> str:
    titles = [cell.source for cell in notebook.cells[:i] if cell.source.startswith("## ")]
    return titles[-1].splitlines()[0].removeprefix("## ")
