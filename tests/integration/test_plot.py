"""Plots of a program: points and curves against the formulas, and the messages of the command line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from fluxlab.config import config_folder
from fluxlab.drawing import position_plot as plot
from fluxlab.drawing import rope_similarity
from fluxlab.model.rope import frequencies
from fluxlab.positions import Program, Prompt, compile_programs
from fluxlab.positions.__main__ import main, read_program

ROOT = Path(__file__).parents[2]
GRID, TEXT = (4, 6), 5
SCALE = {"a": {"op": "scale", "factor": 2}}
PRESETS = sorted((config_folder() / "op").glob("*.yaml"))


def layout(program, **more) -> Figure:
    return plot.position_plot(program, **{"grid": GRID, "text": TEXT, **more})


def points(figure: Figure, label: str):
    """Return (col, row) of a scatter, as fp32."""
    (scatter,) = [c for c in figure.axes[0].collections if c.get_label() == label]
    return torch.tensor(scatter.get_offsets().tolist())


def line(figure: Figure, label: str, panel: int = 0):
    (drawn,) = [line for line in figure.axes[panel].lines if line.get_label() == label]
    return torch.tensor(list(map(float, drawn.get_xdata()))), torch.tensor(list(map(float, drawn.get_ydata())))


def expected(program, **more):
    seen = plot.program_at_step(program, plot.sequence(grid=GRID, text=TEXT), **more)
    return seen.after[:TEXT, [2, 1]], seen.after[TEXT:, [2, 1]]


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def notes(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(
    "program",
    [
        {},
        SCALE,
        {"a": {"op": "rotate", "degrees": 30}},
        {"a": {"op": "text_line", "axis": "col", "start": 2}},
        {"a": {"op": "shuffle"}, "b": {"op": "offset", "by": {"row": -3}, "tokens": "all"}},
    ],
)
def test_points_are_the_ids(program):
    figure = layout(program)
    text, image = expected(program)
    assert torch.equal(points(figure, "text"), text)
    assert torch.equal(points(figure, "image"), image)
    context = plot.sequence(grid=GRID, text=TEXT)
    assert torch.equal(points(figure, "unchanged"), context.ids[0][:, [2, 1]])
    compiled = compile_programs([Program.from_config(program)], context)
    assert torch.equal(torch.cat((text, image)), compiled.ids()[:, [2, 1]])


def test_points_by_hand():
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0))
    assert torch.equal(points(layout(SCALE), "image"), 2 * grid.flip(1))
    assert torch.equal(points(layout(SCALE), "text"), torch.zeros(TEXT, 2))


def test_the_top_row_and_left_column_show_a_mirrored_grid():
    figure = layout({"a": {"op": "mirror"}})
    across, down = line(figure, "top row of the image")
    assert across.tolist() == [5, 4, 3, 2, 1, 0]
    assert down.tolist() == [0] * 6
    assert line(figure, "left column of the image")[0].tolist() == [5] * 4


def test_mesh_joins_neighbours():
    (mesh,) = [c for c in layout(SCALE).axes[0].collections if c.get_label() == "image lines"]
    assert len(mesh.get_paths()) == sum(GRID)
    lengths = {
        round(abs(b - a).max(), 6) for p in mesh.get_paths() for a, b in zip(p.vertices, p.vertices[1:], strict=False)
    }
    assert lengths == {2.0}


def test_axis_0_is_the_colour_if_it_varies():
    assert len(layout(SCALE).axes) == 1
    assert len(layout({"a": {"op": "set", "value": 1, "axes": "index", "tokens": "all"}}).axes) == 1
    figure = layout({"a": {"op": "set", "value": 1, "axes": "index"}})
    assert len(figure.axes) == 2
    colours = {c.get_label(): c.get_array() for c in figure.axes[0].collections}
    assert colours["image"].tolist() == [1] * 24
    assert colours["text"].tolist() == [0] * TEXT


def test_few_piles_are_annotated():
    assert notes(layout({"a": {"op": "zero"}})) == ["24 image + 5 text tokens at (0, 0)"]
    assert notes(layout({"a": {"op": "text_line", "axis": "index"}})) == [
        "1 image + 5 text tokens at (0, 0), index 0 to 4"
    ]
    assert notes(layout({"a": {"op": "zero", "axes": "row", "tokens": "image"}})) == []  # 6 places of 4 tokens
    said = [text.get_text() for text in layout({"a": {"op": "zero", "axes": "row"}}).legends[0].get_texts()]
    assert "image: 24 tokens, index 0, row 0, col 0 to 5, in 6 places" in said


LIMITED = {"op": "scale", "factor": 2, "blocks": "20-21", "steps": {"sigma": [0, 0.5]}, "heads": 3, "side": "keys"}


def test_the_default_is_where_the_program_acts_first():
    figure = layout({"a": LIMITED})
    assert title(figure).splitlines()[-1] == "step 14 (σ 0.5), block 20 (single 1), head 3, keys"
    assert points(figure, "image").max() == 10
    late = {"a": {"op": "zero", "blocks": [40]}, "b": {"op": "scale", "factor": 3, "blocks": [7]}}
    assert points(layout(late), "image").max() == 15
    assert points(layout(late, block=40), "image").max() == 0


@pytest.mark.parametrize("spot", [{"step": 13}, {"block": 22}, {"head": 4}, {"side": "queries"}])
def test_positions_are_unchanged_where_the_program_does_not_act(spot):
    figure = layout({"a": LIMITED}, **spot)
    assert torch.equal(points(figure, "image"), points(layout(None), "image"))
    assert title(figure).endswith("positions unchanged")


def test_the_strength_of_the_step_is_used():
    fade = {"a": {"op": "scale", "factor": 3, "strength": {"from": 1, "to": 0}}}
    assert points(layout(fade), "image").max() == 15
    assert points(layout(fade, step=14), "image").max() == 10
    assert "step 14 (σ 0.5)" in title(layout(fade, step=14))


def test_keys_that_only_some_queries_see():
    program = {"a": {"op": "offset", "by": [0, 7, 7], "side": "keys", "seen_by": {"indices": [3], "of": "image"}}}
    figure = layout(program)
    assert points(figure, "image").amin(0).tolist() == [7, 7]
    assert "as image token 3 sees them" in title(figure)


def test_words_of_a_prompt():
    program = {"a": {"op": "relocate", "tokens": {"words": ["hello world"]}, "to": [2, 3]}}
    assert points(layout(program, prompt="says hello world!"), "text").tolist() == [
        [0, 0],
        [3, 2],
        [3, 2],
        [0, 0],
        [0, 0],
    ]
    spans = Prompt("hello world", ((0, 3), (3, 5), (6, 11), (0, 0), (0, 0)))
    assert points(layout(program, prompt=spans), "text").tolist() == [[3, 2]] * 3 + [[0, 0]] * 2


def test_references():
    context = plot.sequence(grid=GRID, text=0, references=[(2, 2), (1, 3)])
    assert context.ids[0, 24:28].tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert context.ids[0, 28:].tolist() == [[2, 0, 0], [2, 0, 1], [2, 0, 2]]
    figure = plot.draw_positions(
        plot.program_at_step({"a": {"op": "offset", "by": [0, 0, 9], "tokens": "reference"}}, context)
    )
    assert points(figure, "reference 1").tolist() == [[9, 0], [10, 0], [11, 0]]


def similarity(distance, axis: int):
    """S of the docstring, in fp64."""
    omega = frequencies(plot.FLUX.axes_dim[axis], plot.FLUX.theta)
    return (distance.double()[:, None] * omega).cos().mean(-1).float()


def curve(program, label="after, this axis", panel=0, **more):
    return line(plot.similarity_plot(program, **{"grid": GRID, "text": TEXT, **more}), label, panel)


@pytest.mark.parametrize(("panel", "n"), [(0, 4), (1, 6)])
def test_similarity_is_the_formula(panel, n):
    distance, unchanged = curve(SCALE, "unchanged, this axis", panel)
    assert distance.tolist() == list(range(1 - n, n))
    torch.testing.assert_close(unchanged, similarity(distance, 1), rtol=0, atol=1e-6)
    _, after = curve(SCALE, panel=panel)
    torch.testing.assert_close(after, similarity(2 * distance, 1), rtol=0, atol=1e-6)
    _, whole = curve(SCALE, "after, all axes", panel)
    torch.testing.assert_close(whole, (8 + 28 + 28 * similarity(2 * distance, 1)) / 64, rtol=0, atol=1e-6)


def test_similarity_with_moved_keys_temperature_and_dropped_rotation():
    distance, moved = curve({"a": {"op": "offset", "by": {"row": 3}, "side": "keys"}})
    torch.testing.assert_close(moved, similarity(distance + 3, 1), rtol=0, atol=1e-6)
    _, sharp = curve({"a": {"op": "temperature", "factor": 1.5}})
    torch.testing.assert_close(sharp, 1.5 * similarity(distance, 1), rtol=0, atol=1e-6)
    assert curve({"a": {"op": "drop", "axes": "row"}})[1].tolist() == [1] * 7


def test_similarity_of_a_head_and_of_query_groups():
    program = {"a": {"op": "scale", "factor": 2, "heads": [5]}}
    distance, unchanged = curve(program, "unchanged, this axis")
    assert torch.equal(curve(program, head=0)[1], unchanged)
    torch.testing.assert_close(curve(program)[1], similarity(2 * distance, 1), rtol=0, atol=1e-6)
    half = {"op": "offset", "by": {"row": 3}, "side": "keys", "seen_by": {"box": [0, 0, 4, 3]}}  # three of six columns
    between = (similarity(distance, 1) + similarity(distance + 3, 1)) / 2
    torch.testing.assert_close(curve({"a": half})[1], between, rtol=0, atol=1e-6)


def test_the_band_spans_all_pairs():
    state = plot.program_at_step({"a": {"op": "jitter", "std": 1}}, plot.sequence(grid=GRID, text=TEXT))
    row = state.after[TEXT:, 1].reshape(GRID)
    pairs = similarity((row[2:] - row[:-2]).flatten(), 1)  # two rows apart
    _, mean, low, high = rope_similarity.similarity_by_distance(
        state, rope_similarity.program_tables(state), 1, slice(8, 36)
    )
    at = GRID[0] - 1 + 2
    torch.testing.assert_close(
        torch.stack((mean[at], low[at], high[at])),
        torch.stack((pairs.mean(), pairs.min(), pairs.max())),
        rtol=0,
        atol=1e-6,
    )


def test_token_kinds_on_the_index_axis():
    moved = {"a": {"op": "set", "value": 3, "axes": "index"}}
    distance, alike = curve(moved, "image to text", 2)
    assert distance.tolist() == [-3]
    torch.testing.assert_close(alike, similarity(distance, 0), rtol=0, atol=1e-6)
    assert curve(moved, "image to image", 2)[0].tolist() == [0]
    assert curve({"a": {"op": "text_line", "axis": "index"}}, "image to text", 2)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_presets_render(file):
    if "???" in file.read_text():
        with pytest.raises(ValueError, match=r"relocate\.to: '\?\?\?', expected"):
            read_program(str(file))
        return
    png = io.BytesIO()
    context = plot.sequence(grid=(5, 5), text=TEXT, references=[(3, 2), (5, 5)])
    plot.draw_positions(plot.program_at_step(read_program(str(file)), context)).savefig(png, dpi=40)
    assert len(png.getvalue()) > 2000


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_equal_figures_have_equal_bytes(ending, tmp_path):
    import matplotlib

    first = plot.write_figure(layout(SCALE), tmp_path / f"a.{ending}").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "pdf.compression": 0, "axes.facecolor": "red"}):
        again = plot.write_figure(layout(SCALE), tmp_path / f"b.{ending}").read_bytes()
    assert first == again
    assert first != plot.write_figure(layout({"a": {"op": "zero"}}), tmp_path / f"c.{ending}").read_bytes()
    if ending == "pdf":
        assert b"CIDFontType2" in first
        assert b"/Type3" not in first
        assert b"CreationDate" not in first


def test_figures_leave_pyplot_alone():
    code = (
        "import sys; from fluxlab.drawing import position_plot; assert 'matplotlib' not in sys.modules;"
        "position_plot.position_plot({}, grid=(2, 2)); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"grid": (0, 4)}, "grid 0x4: 0, expected a whole number from 1"),
        ({"text": -1}, "text: -1"),
        ({"axes_dim": (16, 56)}, r"axes_dim: \(16, 56\), expected an even number for each of index, row, col"),
        ({"axes_dim": (16, 55, 56)}, "axes_dim"),
        ({"theta": float("nan")}, "theta: nan"),
        ({"block": 57}, "block: 57, expected a whole number from 0 to 56"),
        ({"step": -1}, "step: -1"),
        ({"head": True}, "head: True"),
        ({"side": "both"}, "side: 'both', expected queries or keys"),
    ],
)
def test_sizes_and_steps_that_do_not_exist(sizes, message):
    with pytest.raises(ValueError, match=message):
        plot.position_plot(SCALE, **sizes)


def test_command_line_without_output_only_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["{a: {op: scale, factor: 2}}", "--grid", "3x5"]) == 0
    out = capsys.readouterr().out
    program = Program.from_config(SCALE)
    assert out.splitlines()[:2] == [program.describe(), f"digest {program.digest}"]
    assert "image: 15 tokens, index 0, row 0 to 4, col 0 to 8, in 15 places" in out
    assert not list(tmp_path.iterdir())


def test_command_line_writes_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("a:\n  op: zero\n  side: keys\n")
    options = ["--grid", "3x3", "--text", "2", "--block", "3"]
    assert main(["@mine.yaml", "-o", "new/positions.png", "--similarity", "similarity.svg", *options]) == 0
    assert Path("new/positions.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("similarity.svg").read_text()
    out = capsys.readouterr().out
    assert "block 3 (double 3), keys" in out
    assert "wrote new/positions.png" in out


def test_a_file_may_hold_one_edit():
    (edit,) = read_program(str(config_folder() / "op" / "scale.yaml")).edits
    assert (edit.name, edit.op) == ("scale", "scale")


def test_an_interpolation_in_a_program_is_text(capsys):
    program = "{a: {op: relocate, tokens: {words: ['${price}']}, to: [1, 1]}}"
    assert main([program, "--prompt", "a sign that says ${price}", "--grid", "3x3"]) == 0
    assert "words '${price}'" in capsys.readouterr().out


def test_a_bug_in_an_op_shows_its_traceback(tmp_path):
    (tmp_path / "my_ops.py").write_text(
        "from fluxlab.positions import op\n\n@op('mine')\ndef mine(ids, scope):\n    raise ValueError('mine')\n"
    )
    command = [sys.executable, "-m", "fluxlab.positions", "{a: {op: mine}}", "--plugins", "my_ops", "--grid", "3x3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert f'{tmp_path / "my_ops.py"}", line 5, in mine' in done.stderr
    assert done.stderr.endswith("ValueError: mine\nin op mine on 9 tokens, edit a\n")


def test_a_misspelt_op_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "fluxlab.positions", "{a: {op: scael}}", "-o", str(tmp_path / "x.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("a.op: 'scael', expected one of")
    assert done.stderr.strip().endswith("did you mean scale?")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PROGRAM"),
        (["a"], "program: 'a', expected a mapping of edits"),
        ([""], "program: '', expected a mapping of edits"),
        (["3"], "program: '3'"),
        (["{a: {op: zero}"], "program: '{a: {op: zero}', not YAML"),
        (["{a: {op: zero, op: zero}}"], "not YAML that can be read: found duplicate key op"),
        (["{a: {op: set, value: " + "9" * 5000 + "}}"], "program: '{a: {op: set, value: 999"),
        (["[" * 5000], "not YAML that can be read"),
        (["{a: {op: zero}}\0"], "not YAML that can be read"),
        (["{0.5: {op: zero}}"], "0.5: 0.5 is not text, expected the name of an edit in quotes, such as '0.5'"),
        (["{op: zero}"], "is an edit without a name"),
        (["{a: {op: zero, tokns: text}}"], "a.tokns: 'text', unknown key of zero"),
        (["nothere.yaml"], "nothere.yaml: cannot be read (No such file or directory)"),
        (["@."], ".: cannot be read"),
        (["{a: {op: zero, tokens: {words: [cat]}}}"], "no prompt was given"),
        (["{a: {op: zero, tokens: {words: [cat]}}}", "--prompt", "a dog"], "'cat' is not in the prompt"),
        (["{a: {op: zero, blocks: 57}}"], "a.blocks: 57"),
        (["{}", "-o", "x.jpg"], "x.jpg: expected a name that ends in .png, .pdf, .svg"),
        (["{}", "--kernel", "x"], "x: expected a name that ends in"),
        (["{}", "--grid", "16"], "argument --grid: '16', expected ROWSxCOLS"),
        (["{}", "--grid", "9999x9999"], "at most 256x256"),
        (["{}", "--axes-dim", "16,x"], "argument --axes-dim: '16,x'"),
        (["{}", "--text", "many"], "argument --text: 'many', expected a whole number"),
        (["{}", "--stpe", "1"], "unrecognized arguments: --stpe"),
        (["{}", "--plugins", "no_such_module"], "--plugins[0]: 'no_such_module'"),
    ],
)
def test_errors_have_at_most_three_lines(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert 1 <= len(err.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())
