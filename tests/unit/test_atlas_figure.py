"""The atlas of frequencies: a planted frequency, the ablation that follows from it, and the figure's statistics."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import fluxlab
from experiments import atlas, atlastable
from fluxlab import ablation
from fluxlab.attribution import of_gains, with_gains
from fluxlab.errors import UserError
from fluxlab.experiment.reading import read_run
from fluxlab.gradients import sampled
from fluxlab.learning import read_attribution
from fluxlab.learning.folder import begin, cell_file
from fluxlab.learning.objectives import Place, make_objective
from fluxlab.learning.place import centre, place, side_of, towards
from fluxlab.learning.ranking import ranking, without
from fluxlab.positions import Program
from fluxlab.probes import Captured, write
from fluxlab.sampling import Sampling
from tests.stores import make_store
from tests.unit.test_attribution_figure import SETTINGS, record

GRID = (16, 16)
PLANTED = 7
"""Among the pairs of the embedded model: 4 of the index, then 14 of rows. This is the fourth of rows."""

PROMPT = "a red fox on the left holding a sign that says open"


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny", dtype=torch.float32)


def content(row, col):
    """Latents of a background with noise-free content in one token."""
    x = torch.full((1, *GRID, 4), 0.5)
    x[0, row, col] = torch.tensor([2.0, -1, 0, 3])
    return x.flatten(1, 2)


def test_the_stand_in_is_where_the_content_is():
    assert centre(content(3, 11), GRID)[0].tolist() == [3, 11]
    both = torch.cat((content(3, 11), content(3, 11), content(3, 11), content(3, 11)))
    assert towards(both, GRID, ["left", "right", "top", "bottom"]).tolist() == [-11, 11, -3, 3]


def test_the_derivative_of_the_stand_in():
    x = (content(3, 11) + 0.1 * torch.randn(1, 256, 4, generator=torch.Generator().manual_seed(0))).double()
    x.requires_grad_()
    towards(x, GRID, ["right"]).sum().backward()
    step = torch.zeros_like(x)
    step[0, 3 * 16 + 11, 0] = 1e-4  # more content there moves the centre to the right
    with torch.no_grad():
        change = (towards(x + step, GRID, ["right"]) - towards(x - step, GRID, ["right"])) / 2e-4
    assert x.grad[0, 3 * 16 + 11, 0] == pytest.approx(change.item(), rel=1e-5)
    assert change > 0


@pytest.mark.parametrize("prompt", ["a red fox", "a red fox in the centre", "an oil painting of a fox"])
def test_prompts_without_a_side(prompt):
    with pytest.raises(UserError, match=r"objective=place: .* names no side"):
        side_of(prompt)


def test_a_planted_frequency_is_found(pipe):
    """All pairs but one add nothing to the scores, so that the image depends on that one only."""
    others = [pair for pair in range(14) if pair != PLANTED - 4]
    program = Program.from_config(
        {
            "a": {"op": "gain", "factor": 0, "axes": ["index", "col"]},
            "b": {"op": "gain", "factor": 0, "axes": "row", "pairs": others},
        }
    )
    settings = pipe.resolve(Sampling(steps=1))
    config, where = {"name": "denoising", "images": "sampled", "variant": None}, Place(PROMPT, 0)
    own = make_objective(config, pipe, [PROMPT], [where], settings, program).score([where])
    for score in (place([PROMPT]), own):
        found = of_gains(pipe, [PROMPT], [0], score, program=program, settings=settings)
        assert found.coords["axis"][1][PLANTED] == "row"
        sizes = np.abs(found.values[0])
        assert not np.delete(sizes, PLANTED, -1).any()
        assert (sizes[..., PLANTED] > 0).sum() >= 15  # of 18 heads


def gains(values, blocks=6, heads=3):
    """The derivatives of one cell of the embedded model, 0 but at (step, block, head, pair) → value."""
    x = np.zeros((2, blocks, heads, 32), np.float32)
    for at, value in values.items():
        x[at] = value
    coords = {"axis": (("pair",), ["index"] * 4 + ["row"] * 14 + ["col"] * 14)}
    coords |= {
        "wavelength": (("pair",), [6.3, 63, 630, 6300, *np.geomspace(6.3, 4000, 14), *np.geomspace(6.3, 4000, 14)])
    }
    return Captured(x, ("step", "block", "head", "pair"), coords, {})


def folder(path, objective, cells, **others):
    path.mkdir(parents=True)
    held = ["a green cat on the left", "a red fox on the right"]
    made = record(prompts=[PROMPT], seeds=range(len(cells)), objective={"name": objective}, held_out=held, **others)
    begin(path, made)
    for n, values in enumerate(cells):
        write(cell_file(path, n), {"gains": gains(values)})
    return path


SITES = {(0, 1, 0, 7): 2, (0, 0, 0, 0): 0.5}


@pytest.fixture
def folders(tmp_path):
    """Attributions of 4 images: block 1 head 0 pair 7 moves the thing most, then the first site."""
    moved = [SITES, {**SITES, (0, 1, 0, 7): -2}, SITES, SITES]
    loss = [{(1, 2, 2, 20): 1, (1, 2, 2, 21): -2}] * 2
    return folder(tmp_path / "place", "place", moved), folder(tmp_path / "denoising", "denoising", loss)


def test_a_program_without_sites_is_the_gain_of_0(pipe, folders):
    """To the bit: the edits of an ablation, and gains of 0 at the same sites."""
    found = read_attribution(folders[0])
    chosen = np.random.default_rng(1).permutation(576)[:20]
    program, gain = without(found, chosen), torch.ones(576)
    gain[torch.from_numpy(chosen)] = 0
    how = {"settings": Sampling(steps=1)}
    (one,) = with_gains(pipe, [PROMPT], [3], lambda p, make: sampled(p, make()), [gain.reshape(1, 6, 3, 32)], **how)
    assert torch.equal(one, pipe.sample([PROMPT], [3], program, Sampling(steps=1), output="latent"))
    assert not torch.equal(one, pipe.sample([PROMPT], [3], None, Sampling(steps=1), output="latent"))


def written(folders, *arguments):
    assert ablation.main([*map(str, folders), *arguments]) == 0
    return yaml.safe_load((folders[0] / "exp" / "made_ablation.yaml").read_text())


def test_the_experiment_of_an_ablation(folders, capsys):
    made = written(folders, "--first", "2,1", "--random", "2")
    assert "+exp=made_ablation" in capsys.readouterr().out
    assert made["prompts"] == ["a green cat on the left", "a red fox on the right"]
    assert made["seeds"] == [4, 5, 6, 7]
    kinds = ("place", "denoising", "random")
    names = [
        f"{kind}_{k}{end}" for k in (1, 2) for kind in kinds for end in (("_1", "_2") if kind == "random" else ("",))
    ]
    assert list(made["variants"]) == ["baseline", *names]
    assert made["variants"]["baseline"] == {}
    edit = {"op": "gain", "factor": 0, "side": "queries", "heads": [0]}
    assert made["variants"]["place_2"] == {
        "block_0_head_0_index": {**edit, "blocks": [0], "axes": "index", "pairs": [0]},
        "block_1_head_0_row": {**edit, "blocks": [1], "axes": "row", "pairs": [3]},
    }
    assert made["variants"]["denoising_1"]["block_2_head_2_col"]["pairs"] == [3]
    first, second = (
        {json.dumps(made["variants"][f"random_2_{n}"]) for n in (1, 2)},
        {json.dumps(made["variants"]["random_1_1"])},
    )
    assert len(first | second) == 3


def test_a_program_is_continued(tmp_path):
    """The variant whose score was differentiated is the baseline, and a part of every variant."""
    program = {"a": {"op": "scale", "factor": 2}}
    request = {**record(prompts=[PROMPT], seeds=[3])["request"], "variants": {"baseline": {}, "double": program}}
    path = folder(tmp_path / "place", "place", [SITES], request=request, variant="double")
    made = written([path], "--first", "1", "--random", "0")
    assert made["variants"]["baseline"] == program
    assert list(made["variants"]["place_1"]) == ["a", "block_1_head_0_row"]
    assert made["seeds"] == [4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--first", "0"], "--first 0: expected whole numbers from 1"),
        (["--first", "few"], "--first few: expected whole numbers from 1"),
        (["--first", "600"], "--first 600: the model has 576 (block, head, frequency)"),
        (["--random", "-1"], "--random -1: expected at least 0"),
        (["--far"], "unrecognized arguments: --far"),
    ],
)
def test_wrong_arguments_of_an_ablation(words, message, folders, capsys):
    assert ablation.main([*map(str, folders), *words]) == 2
    assert message in capsys.readouterr().err


def test_attributions_that_do_not_go_together(folders, tmp_path, capsys):
    assert ablation.main([str(folders[0])] * 2) == 2
    assert "of the same objective, place" in capsys.readouterr().err
    other = folder(tmp_path / "other", "sharpness", [SITES], settings={**SETTINGS, "steps": 8})
    assert ablation.main([str(folders[0]), str(other)]) == 2
    assert "not the steps of" in capsys.readouterr().err


def store(folders, path, **changes):
    """A run of the ablation: rendered scenes, in which `place_2` is moved and the others are as the baseline."""
    made = written(folders, "--first", "1,2", "--random", "2")
    variants = {name: config for name, config in made["variants"].items() if name != "baseline"} | changes
    return make_store(path, variants, made["prompts"], (4, 5), name="made_ablation")


def settled(folders, run):
    """The attributions with the model of a made-up store."""
    for path in folders:
        file = path / "attribution.yaml"
        known = yaml.safe_load(file.read_text())
        known["settings"]["model_digest"] = run.record["settings"]["model_digest"]
        file.write_text(yaml.safe_dump(known))
    return [read_attribution(path) for path in folders]


def test_statistics(folders, tmp_path):
    run = read_run(store(folders, tmp_path / "run"))
    found = settled(folders, run)
    order = ranking(found[0])
    assert list(order[:2]) == [(1 * 3 + 0) * 32 + 7, 0]  # in C order
    numbers = atlastable.numbers(*found, run)
    for key in ("block 1", "axis row", "step 0"):
        assert numbers["shares"][key]["mean"] == pytest.approx(1 if key == "step 0" else 0.8)
    first = numbers["first"][0]
    assert first["place"] == pytest.approx(0.8 * 576)
    assert (first["block"], first["head"], first["axis"], first["signed"]) == (1, 0, "row", 1)
    outcomes = numbers["ablation"]
    assert set(outcomes) >= {"all sites", "place 1", "denoising 2", "random 2", "noise floor", "another seed"}
    before = [run.cell("baseline", *place)["object"] for place in run.places]
    assert outcomes["all sites"]["found"]["mean"] == np.mean(before)
    pair = [
        run.cell("place_2", *p)["place"] - np.mean([run.cell(f"random_2_{n}", *p)["place"] for n in (1, 2)])
        for p in run.places
    ]
    assert outcomes["place 2"]["place - random"]["mean"] == pytest.approx(np.mean(pair))
    assert outcomes["random 2"]["moved"]["sets"][0] <= outcomes["random 2"]["moved"]["sets"][1]


def test_choices_at_random_are_averaged_where_a_thing_is_found():
    """An image counts once, with the mean over the choices that have a value."""
    values = {"random_8_1": [1.0, np.nan], "random_8_2": [3.0, np.nan], "place_8": [5.0, 7.0]}
    rows = [
        {"variant": variant, "prompt": "a", "seed": seed, "place": 1.0, "object": 1.0, "thing_moved": value}
        for variant, column in {"baseline": [0.0, 0.0], **values}.items()
        for seed, value in enumerate(column)
    ]
    kinds = {"random_8_1": ("random", 8), "random_8_2": ("random", 8), "place_8": ("place", 8)}
    pooled = atlastable.pooled(SimpleNamespace(baseline="baseline", metrics=rows), kinds)
    moved = {(row["variant"], row["seed"]): row["moved"] for row in pooled}
    assert moved["random 8", 0] == 2
    assert np.isnan(moved["random 8", 1])
    assert moved["place 8", 1] == 7
    assert moved["all sites", 0] == 0


def test_files(folders, tmp_path):
    path = store(folders, tmp_path / "run")
    settled(folders, read_run(path))
    for name in "ab":
        assert atlas.main([*map(str, folders), str(path), "-o", str(tmp_path / name)]) == 0
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    pictures = [f"made-{width}.{end}" for width in ("column", "page") for end in ("pdf", "png")]
    assert files == [*pictures, "made.csv", "made.json", "made.txt"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    numbers = json.loads((tmp_path / "a" / "made.json").read_text())
    assert numbers["first"][0]["pair"] == 7
    text = (tmp_path / "a" / "made.txt").read_text()
    assert "block 1 head 0 row, wavelength 27.9: 461 [461, 461], for the loss 0, signed 1 tokens" in text
    assert "noise floor: " in text
    assert "single choices" in text


def test_a_run_of_other_attributions(folders, tmp_path, capsys):
    path = store(folders, tmp_path / "run", place_2={"a": {"op": "zero"}})
    settled(folders, read_run(path))
    assert atlas.main([*map(str, folders), str(path), "-o", str(tmp_path / "out")]) == 2
    assert "its variant place_2 is not theirs" in capsys.readouterr().err
    assert atlas.main([*map(str, folders[::-1]), str(path), "-o", str(tmp_path / "out")]) == 2
    assert "of objective=denoising, expected objective=place" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
