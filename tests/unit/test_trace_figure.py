"""The figure of patched quadrants: its numbers on images whose content is known."""

import shutil

import pytest

import fluxlab
from experiments import trace, tracetable
from tests.stores import make_store

PROMPTS = (
    "a red fox on the left holding a sign that says open",
    "a blue heart on the right holding a sign that says rain",
    "a yellow cat at the top holding a sign that says taxi",
)
TI = {"op": "inject", "source": {"prompt": {"next": 1}}, "what": ["keys", "values"], "tokens": "text"}
TI["seen_by"] = "image"
II = {**TI, "tokens": "image"}
VARIANTS = {
    "ti_all": {"a": TI},
    "ti_0": {"a": {**TI, "blocks": 0}},
    "ti_1": {"a": {**TI, "blocks": 1}},
    "ti_early": {"a": {**TI, "steps": {"fraction": [0, 0.5]}}},
    "ii_0": {"a": {**II, "blocks": 0}},
    "other": {"a": {**TI, "blocks": [0, 1]}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store in which block 0 of text → image transfers the whole scene, and all other patches nothing."""
    path = make_store(tmp_path_factory.mktemp("runs") / "run", VARIANTS, PROMPTS, seeds=(0, 1), name="trace")
    store = fluxlab.read_run(path)
    for prompt, seed in store.places:
        source = PROMPTS[(PROMPTS.index(prompt) + 1) % 3]
        for variant in VARIANTS:
            shown = source if variant == "ti_0" else prompt
            shutil.copy(store.image("baseline", shown, seed), store.image(variant, prompt, seed))
    return store


def test_which_variants_are_patches_of_a_quadrant(run):
    found = {patch.variant: (patch.quadrant, patch.blocks, patch.steps) for patch in tracetable.patches(run)}
    assert found == {
        "ti_all": ("text → image", "all", "all"),
        "ti_0": ("text → image", 0, "all"),
        "ti_1": ("text → image", 1, "all"),
        "ti_early": ("text → image", "all", (0.0, 0.5)),
        "ii_0": ("image → image", 0, "all"),
    }


def test_the_sources_are_those_of_the_cells(run):
    sources = tracetable.source_prompts(run, ["ti_0", "ii_0"])
    assert sources[PROMPTS[2], 1] == (PROMPTS[0], 1)
    assert sources[PROMPTS[0], 0] == (PROMPTS[1], 0)


def test_what_was_transferred(run):
    rows = {(row["variant"], row["attribute"]): row for row in tracetable.table_rows(run, tracetable.patches(run))}
    for attribute in tracetable.ATTRIBUTES:
        for variant in ("ti_0", tracetable.SOURCE):
            row = rows[variant, attribute]
            assert (row["n"], row["source"], row["own"]) == (6, 1, 0)
        for variant in ("ti_1", "ii_0", "baseline"):
            row = rows[variant, attribute]
            assert (row["source"], row["own"]) == (0, 1)
    assert rows["noise floor", "place"]["n"] == 3
    assert rows["another seed", "colour"]["own"] == 1


@pytest.mark.parametrize("width", ["column", "page"])
def test_the_figure_shows_these_numbers(run, width):
    found = tracetable.patches(run)
    panels = trace.draw(run, found, tracetable.table_rows(run, found), width).axes
    assert [axes.get_title("left") for axes in panels] == list(trace.TITLES.values())
    for axes in panels:
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert lines["text → image"] == [1, 0]
        assert lines["image → image"] == [0]
        assert lines["the source's own image"] == [1, 1]
        assert lines["not patched"] == [0, 0]


def test_files_are_equal_in_every_run(run, tmp_path):
    files = [trace.make(run, tmp_path / name) for name in "ab"]
    assert [file.name for file in files[0]] == [
        "trace-transfer-column.pdf",
        "trace-transfer-column.png",
        "trace-transfer-page.pdf",
        "trace-transfer-page.png",
        "trace-transfer.txt",
        "trace-transfer.csv",
    ]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    text = files[0][4].read_text()
    assert "text → image, block 0: 1 [1, 1], n = 6" in text
    assert "most in a single block: text → image, block 0" in text
    assert "FreeFlux's lists" in text


def test_freeflux_lists_on_a_model_with_their_blocks():
    found = [tracetable.Patch(f"v{b}", "text → image", b, "all") for b in range(57)]
    rows = [
        {"variant": f"v{b}", "attribute": attribute, "source": float(b in (1, 2, 4, 26))}
        for b in range(57)
        for attribute in tracetable.ATTRIBUTES
    ]
    assert "place of the thing, text → image: content 0 (13 blocks), position 0.571 (7 blocks)" in trace.freeflux(
        found, rows
    )


def test_a_run_without_patches(tmp_path, capsys):
    path = make_store(tmp_path / "run", prompts=PROMPTS[:1])
    assert trace.main([str(path), "-o", str(tmp_path / "out")]) == 2
    assert "expected a run of +exp=trace" in capsys.readouterr().err


def test_prompts_that_the_oracle_does_not_read(tmp_path, capsys):
    path = make_store(tmp_path / "run", {"ti": {"a": TI}}, prompts=("a dragon", "a wizard"))
    assert trace.main([str(path)]) == 2
    assert "the scene oracle scores captions of scenes only" in capsys.readouterr().err
