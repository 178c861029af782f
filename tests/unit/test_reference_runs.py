"""Reference images of an experiment: keys, batches and files; and a run whose prompts have different ones."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fluxlab
from fluxlab.errors import UserError
from fluxlab.experiment.cells import batches, cells
from fluxlab.experiment.plan import plan
from fluxlab.experiment.reading import read_store
from fluxlab.experiment.spec import from_request
from tests.unit.test_experiment import SETTINGS

PROMPTS = ["a red fox", "a blue cat"]
SMALL = fluxlab.Sampling(steps=1, height=16, width=16)


@pytest.fixture
def files(tmp_path):
    made = {}
    for name, size, colour in (("a", (16, 16), "red"), ("b", (32, 16), "blue"), ("c", (16, 16), "green")):
        made[name] = tmp_path / f"{name}.png"
        Image.new("RGB", size, colour).save(made[name])
    return made


def made(references=None, prompts=PROMPTS, **more):
    return fluxlab.make_experiment(prompts, references=references, identify=False, sampling=SMALL, **more)


def keys(experiment):
    return [cell.key for cell in cells(experiment, SETTINGS)]


def test_keys_follow_the_content(files, tmp_path):
    """The content and order of the files count, not their paths; without references, keys are those of before."""
    a, b = files["a"], files["b"]
    copy = tmp_path / "copy.png"
    copy.write_bytes(a.read_bytes())
    plain, one = made(), made([a])
    for other in (made([]), made([[], []]), replace(plain, references=())):
        assert keys(other) == keys(plain)
        assert other.digest == plain.digest
        assert "references" not in other.request()
    assert keys(made([copy])) == keys(one) == keys(made([[a], [a]]))
    assert made([copy]).digest == one.digest
    assert not {*keys(one)} & {*keys(plain)}
    assert not {*keys(made([a, b]))} & {*keys(made([b, a]))}
    mixed = made([[a], []])
    assert keys(mixed) == [keys(one)[0], keys(plain)[1]]
    assert len({e.digest for e in (plain, one, mixed, made([b, a]), made([a, b]))}) == 5


def test_a_batch_has_one_layout(files):
    a, b, c = files["a"], files["b"], files["c"]
    prompts = [*PROMPTS, "a cat", "a fox"]
    experiment = made([[a], [b, a], [c], []], prompts, seeds=3)
    settings = replace(SETTINGS, batch_tokens=4 * SETTINGS.tokens, pixels_per_token=4)
    grouped = batches(cells(experiment, settings), settings)
    assert sorted(cell.key for batch in grouped for cell in batch) == sorted(keys(experiment))
    for batch in grouped:
        sizes = {tuple(image.size for image in cell.references) for cell in batch}
        assert len(sizes) == 1
        extra = sum(h * w // 16 for h, w in sizes.pop())
        assert len(batch) == 1 or len(batch) * (settings.tokens + extra) <= settings.batch_tokens
    assert [c.prompt for c in grouped[0]] == ["a red fox"] * 3


def test_request_round_trip(files):
    experiment = made([[files["a"]], [files["b"], files["c"]]])
    assert from_request(json.loads(json.dumps(experiment.request()))) == experiment
    lora = made(lora={"path": "x.safetensors", "scale": 0.5})
    assert from_request(json.loads(json.dumps(lora.request()))) == lora


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "references=3: expected a list of image files"),
        ([3], "references[0]=3: expected the path of an image"),
        (["no.png"], "no.png: image not found"),
        ([["no.png"], []], "references[0][0]: "),
        ([["no.png"], "no.png"], "references[1]='no.png': expected a list, as each prompt has one; [] for none"),
        ([[], [], []], "references: 3 lists for 2 prompts; expected one per prompt"),
    ],
)
def test_refused(value, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        made(value)
    assert "\n" not in str(error.value)


def test_run(files, tmp_path):
    """Each image is the one that `generate` makes; the same command computes nothing; a changed file is refused."""
    a, b = files["a"], files["b"]
    program = {"a": {"op": "place", "arrangement": "left", "index": 0, "tokens": "reference[0]"}}
    experiment = fluxlab.make_experiment(
        PROMPTS,
        {"left": program},
        references=[[a], [b, a]],
        sampling=SMALL,
        capture={"quadrants": {"kind": "quadrants"}},
    )
    planned = plan(experiment, tmp_path / "run")
    assert "references 16 × 16 px: 16 tokens more" in planned
    assert "tiny was not trained with reference images" in planned
    run = fluxlab.run_experiment(experiment, tmp_path / "run", threads=1, batch_tokens=4480)
    pipe = fluxlab.load_pipeline("tiny")
    options = {"steps": 1, "height": 16, "width": 16}
    for prompt, given in zip(PROMPTS, ([[a]], [[b, a]]), strict=True):
        images = [[Image.open(file) for file in sample] for sample in given]
        alone = pipe.generate(prompt, 0, [None, program], references=images, **options)
        for variant, image in zip(("baseline", "left"), alone, strict=True):
            assert np.array_equal(run.open(variant, prompt, 0), image)
    found = run.captured("left", PROMPTS[1], 0)["quadrants"]
    assert found.labels("to") == ["text", "image", "reference 0", "reference 1"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/cells").iterdir()}
    fluxlab.run_experiment(experiment, tmp_path / "run", threads=1)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run/cells").iterdir()}
    assert read_store(tmp_path / "run").record["request"]["references"][0][0]["size"] == [16, 16]
    Image.new("RGB", (16, 16), "white").save(a)
    with pytest.raises(UserError, match=r"a\.png: this reference image has changed"):
        fluxlab.run_experiment(experiment, tmp_path / "other", threads=1)


def test_sizes_and_missing_references(files, tmp_path):
    Image.new("RGB", (18, 16)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"references\[0\]\[0\]: width=18: must be a multiple of 4.*resize or crop"):
        plan(made([tmp_path / "odd.png"]), tmp_path / "run")
    with pytest.raises(UserError, match="there are no reference images; give some with references="):
        plan(made(variants={"uno": {"a": {"op": "place"}}}), tmp_path / "run")
