"""The comparison of gradients with ablations: its statistics on made-up numbers, and the folder that it reads."""

import numpy as np
import pytest

from experiments import attribution
from fluxlab.errors import UserError
from fluxlab.learning import read_attribution
from fluxlab.learning.bands import Band, bands, chosen
from fluxlab.learning.folder import begin, cell_file
from fluxlab.probes import Captured, write

SETTINGS = {"model_digest": "ab" * 32, "steps": 4, "width": 64, "height": 64, "guidance": None, "true_cfg": None}
SETTINGS |= {"dtype": "float32", "device": "cpu", "threads": 1}


def record(prompts=("a",), seeds=(0, 1), **others):
    """What `attribution.yaml` says of a made-up attribution."""
    request = {"prompts": list(prompts), "seeds": list(seeds), "model": {"name": "tiny"}, "name": "made"}
    request |= {"variants": {"baseline": {}}}
    made = {"name": "made", "caption": "up", "command": "python -m fluxlab.attribution +exp=made", "digest": "0" * 12}
    made |= {"objective": {"name": "denoising"}, "variant": "baseline", "held_out": [], "request": request}
    return made | {"settings": dict(SETTINGS), "versions": {"fluxlab": "0", "commit": "none", "torch": "2"}} | others


def made(folder, predicted, images=5):
    """A folder in which 20 bands have the measured sizes 1 … 20."""
    folder.mkdir()
    begin(folder, record(seeds=range(images)))
    measured = np.arange(1.0, 21)
    coords = {"block": (("band",), [0] * 20), "head": (("band",), list(range(20)))}
    coords |= {"axis": (("band",), ["row", "col"] * 10), "wavelength": (("band",), ["below 8"] * 20)}
    for n in range(images):
        arrays = {"predicted": predicted(measured), "measured": -measured}
        write(cell_file(folder, n), {k: Captured(v, ("band",), coords, {"unit": "score"}) for k, v in arrays.items()})
    return folder


def test_a_perfect_prediction(tmp_path):
    rows = attribution.summary(*attribution.sizes(read_attribution(made(tmp_path / "a", lambda m: 0.5 * m))))
    assert rows["rank correlation"] == pytest.approx([1, 1, 1])
    assert rows["first 5"] == pytest.approx([90 / 210] * 3)
    assert set(rows) == {"rank correlation", "first 5", "first 10"}  # the first 20 are all


def test_a_prediction_in_reverse(tmp_path):
    rows = attribution.summary(*attribution.sizes(read_attribution(made(tmp_path / "a", lambda m: 21 - m))))
    assert rows["rank correlation"][0] == pytest.approx(-1)
    assert rows["first 5"][0] == pytest.approx(15 / 210)


def test_the_files_have_every_band_and_the_same_bytes(tmp_path):
    folder = made(tmp_path / "run", lambda m: 0.5 * m)
    for name in "ab":
        assert attribution.main([str(folder), "-o", str(tmp_path / name)]) == 0
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["made-column.pdf", "made-column.png", "made-page.pdf", "made-page.png", "made.txt"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    text = (tmp_path / "a" / "made.txt").read_text()
    assert "20 bands, 1 prompt × 5 seeds" in text
    assert "share of the first 5 bands: 0.429 [0.429, 0.429]; 5 at random: 0.25" in text
    assert "block 0 head 19 col, wavelengths below 8: 20" in text
    assert text.rstrip().endswith("python -m fluxlab.attribution +exp=made")
    found = read_attribution(folder)
    drawn = attribution.draw(found, attribution.summary(*attribution.sizes(found)), attribution.COLUMN)
    assert sum(len(line.get_xdata()) for line in drawn.axes[0].lines if line.get_marker() != "None") == 20
    assert drawn.axes[1].lines[0].get_ydata()[-1] == pytest.approx(1)


def test_bands_have_all_pairs_once():
    axis, waves = ["index"] * 2 + ["row"] * 3, [6.3, 600, 6.3, 9, 31]
    every = bands(axis, waves, 2, 3)
    assert len(every) == 2 * 3 * 4
    first = [band for band in every if (band.block, band.head) == (1, 2)]
    assert [(b.axis, b.wavelength, b.pairs.tolist()) for b in first] == [
        ("index", "below 8", [0]),
        ("index", "above 32", [1]),
        ("row", "below 8", [2]),
        ("row", "8 to 32", [3, 4]),
    ]


def test_more_bands_than_asked_for_are_chosen_at_random():
    every = [Band(0, n, "row", "below 8", np.array([0])) for n in range(50)]
    some = [band.head for band in chosen(every, 10)]
    assert len(set(some)) == 10
    assert some == sorted(some) != list(range(10))
    assert some == [band.head for band in chosen(every, 10)]
    assert chosen(every, 50) == every


def test_a_folder_that_is_continued(tmp_path):
    folder = made(tmp_path / "run", lambda m: m)
    later = record(seeds=range(5), versions={"fluxlab": "1"}, command="again")
    begin(folder, later)
    found = read_attribution(folder).record
    assert (found["versions"]["fluxlab"], found["command"]) == ("0", "again")
    begin(folder, {**later, "settings": {**SETTINGS, "threads": 2}})
    with pytest.raises(UserError, match="computed with device=cpu, not cuda"):
        begin(folder, {**later, "settings": {**SETTINGS, "device": "cuda"}})
    with pytest.raises(UserError, match="holds another attribution"):
        begin(folder, {**later, "digest": "1" * 12})
    (folder / "attribution.yaml").unlink()
    with pytest.raises(UserError, match=r"has cells, but no attribution\.yaml"):
        begin(folder, later)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "attribution.yaml").unlink(), "not a folder of python -m fluxlab.attribution"),
        (lambda folder: (folder / "attribution.yaml").write_text("a: [1"), "cannot be read"),
        (lambda folder: (folder / "attribution.yaml").write_text("schema: 9"), "schema 9, but this version writes 1"),
        (lambda folder: (folder / "attribution.yaml").write_text("schema: 1"), "name is missing"),
        (lambda folder: (folder / "attribution.yaml").write_text("text"), "cannot be read"),
        (lambda folder: cell_file(folder, 2).unlink(), "4 of 5 cells are done; run its command again:"),
        (lambda folder: cell_file(folder, 4).write_bytes(b"x"), "4 of 5 cells are done"),
        (lambda folder: [write(cell_file(folder, n), {"gains": WITHOUT}) for n in range(5)], "has no predicted"),
    ],
)
def test_wrong_folders(change, message, tmp_path, capsys):
    folder = made(tmp_path / "run", lambda m: m)
    change(folder)
    assert attribution.main([str(folder), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


WITHOUT = Captured(np.zeros((1, 1, 1, 2), np.float32), ("step", "block", "head", "pair"), {}, {})
