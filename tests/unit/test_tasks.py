"""Runs whose images are made from given ones: tasks of variants, their inputs, keys, errors, and what is measured."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fluxlab
from fluxlab.compose import compose
from fluxlab.errors import NonFiniteError, UserError
from fluxlab.experiment import task_images
from fluxlab.experiment.cells import batches, cells, step_rows
from fluxlab.experiment.plan import plan
from fluxlab.experiment.spec import from_request
from fluxlab.experiment.tasks import Task, read_task, split_tasks
from fluxlab.measure.registry import METRICS, Sample, evaluate
from fluxlab.positions import Program
from fluxlab.run import RunConfig
from fluxlab.scenes import cases, parse
from tests.unit.test_experiment import SETTINGS

HOLE = np.zeros((16, 16), bool)
HOLE[4:12, 8:] = True
PROMPTS = ["a red fox", "a blue cat"]
SMALL = fluxlab.Sampling(steps=2)
VARIANTS = {
    "baseline": {},
    "inverted": {"task": {"path": "inverted", "iterations": 1}},
    "half": {"a": {"op": "scale", "factor": 0.5}},
    "prompt": {"task": "generate"},
    "filled": {"task": {"name": "decode", "of": "filled"}},
}


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    for name in "abt":
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(HOLE).save(tmp_path / "mask.png")
    return tmp_path


def made(files, variants=VARIANTS, task="inpaint", image="a.png", mask="mask.png", prompts=PROMPTS, **more):
    given = {"image": image, "mask": mask, **{key: more.pop(key) for key in ("target",) if key in more}}
    given = {key: str(files / value) if isinstance(value, str) else value for key, value in given.items() if value}
    more = {"sampling": SMALL, "identify": False, **more}
    return fluxlab.make_experiment(prompts, variants, task=task, **given, **more)


def keys(experiment):
    return {(cell.variant, cell.prompt): cell.key for cell in cells(experiment, SETTINGS)}


# ---- what is asked for


def test_a_variant_changes_the_common_task_or_replaces_it():
    programs, found = split_tasks(
        {
            "baseline": {},
            "inverted": {"task": {"path": "inverted"}, "a": {"op": "zero"}},
            "decode": {"task": {"name": "decode"}},
            "prompt": {"task": "generate"},
        },
        {"name": "inpaint", "attention": "both_ways"},
    )
    both = ("attention", "both_ways")
    assert found == {
        "baseline": Task("inpaint", (both,)),
        "inverted": Task("inpaint", (both, ("path", "inverted"))),
        "decode": Task("decode"),
    }
    assert programs == {"baseline": {}, "inverted": {"a": {"op": "zero"}}, "decode": {}, "prompt": {}}
    assert split_tasks({"a": {}}, "generate") == ({"a": {}}, {})
    assert split_tasks({"a": Program()}, None) == ({"a": Program()}, {})


def test_lists_of_values_and_blocks_are_variants_with_a_task():
    variants = {
        "iterations": {"task": {"path": "inverted", "iterations": {"each": [1, 4]}}},
        "block": {"task": {"attention": "both_ways"}, "a": {"op": "zero", "blocks": "each"}},
    }
    scenes = {"kind": "exchange", "count": 1}
    made = fluxlab.make_experiment(task="inpaint", scenes=scenes, variants=variants, identify=False)
    assert made.describe("iterations_1") == "inpaint(iterations=4, path=inverted)"
    assert made.describe("block_5") == "inpaint(attention=both_ways); zero on image, blocks 5"
    assert len(made.variants) == 1 + 2 + 6


def test_a_task_reads_what_it_writes():
    asked = {
        "name": "upscale",
        "method": "spacing",
        "until": 0.5,
        "source_programs": {"a": {"op": "yarn", "factor": 2}},
    }
    task = read_task(asked, "task")
    assert read_task(json.loads(json.dumps(task.values())), "task") == task
    assert task.describe().startswith("upscale(method=spacing, source_programs=yarn factor 2 on all")
    assert read_task("inpaint", "task").describe() == "inpaint"
    assert (task.factor, task.inverts, task.parts) == (2, True, ("image",))
    assert not read_task({"name": "upscale", "method": "resized"}, "task").inverts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "inpant"}, "task.name='inpant': expected generate, inpaint, upscale, decode, resize; did you"),
        ({"task": 3}, "task=3: expected a task"),
        (
            {"task": {"name": "inpaint", "pth": 1}},
            "task.pth: inpaint takes path, attention, iterations; did you",
        ),
        ({"task": {"name": "inpaint", "path": "x"}}, "task: path='x': expected inverted or noised"),
        ({"task": {"name": "inpaint", "iterations": 2}}, "task: iterations has no effect with path='noised'"),
        ({"variants": {"baseline": {"task": {"factor": 2}}}}, "variants.baseline.task.factor: inpaint takes path, "),
        (
            {"variants": {"baseline": {"task": 2}}},
            "variants.baseline.task=2: expected arguments of a task",
        ),
        (
            {"variants": {"x": {"task": {"name": "decode", "of": "y"}}}},
            "variants.x.task: of='y': expected image, ",
        ),
        ({"variants": {"x": {"task": {"name": "generate", "of": "y"}}}}, "of: generate takes no arguments"),
        ({"mask": None}, "variants.baseline: inpaint needs mask=<file>, or scenes that have one"),
        ({"image": None}, "mask=.*mask.png': needs an image too, image=<file>"),
        ({"task": "generate", "variants": {}}, "image: no variant has a task that works on it; add task=inpaint"),
        ({"image": "nowhere.png"}, "image: .*nowhere.png: image not found"),
        ({"image": ["a.png"]}, "image: 1 files for 2 prompts; expected one per prompt, or one path"),
        ({"sampling": fluxlab.Sampling(height=32)}, "height=32: the given images make results of 16 × 16 pixels"),
        ({"sampling": fluxlab.Sampling(enlarge=2)}, "enlarge=2: the given images make the size; leave it out"),
        ({"capture": "words"}, "capture: has no effect on a task"),
        ({"references": ["a.png"]}, "references"),
        ({"variants": {"x": {"a": {"op": "resample"}}}}, "variants.x: resample does not work in a run with tasks"),
        (
            {"variants": {"x": {"a": {"op": "inject", "source": {"prompt": {"next": 1}}, "what": "keys"}}}},
            "variants.x.a.source: inject takes from cells of its batch, which a task does not have",
        ),
        (
            {"task": "upscale", "variants": {"x": {"task": {"factor": 3}}}},
            "task: results that are larger than the image by 2, 3; all images of a run have one size",
        ),
        (
            {"variants": {"x": {"task": "upscale"}}},
            "task: results that are larger than the image by 1, 2; all images of a run have one size",
        ),
    ],
)
def test_wrong_requests(files, change, message):
    if "references" in change:
        change = {"references": [str(files / "a.png")]}
    with pytest.raises(UserError, match=message):
        made(files, **change)


def test_images_of_several_sizes_are_refused(files):
    Image.new("RGB", (16, 32)).save(files / "tall.png")
    with pytest.raises(UserError, match="image: files of 16 × 16, 32 × 16; all images of a run have one size"):
        made(files, image=[str(files / name) for name in ("a.png", "tall.png")])


@pytest.mark.parametrize(
    ("scenes", "message"),
    [
        ({"kind": "exchang", "count": 2}, "scenes.kind='exchang': expected exchange, halved, doubled; did you mean"),
        ({"kind": "halved", "count": 0}, "scenes.count=0: expected a whole number from 1 to 10000"),
        ({"kind": "halved", "count": 2, "sise": 1}, "scenes.sise: unknown, expected kind, count, scale"),
        ("halved", "scenes='halved': expected a mapping"),
    ],
)
def test_wrong_scenes(scenes, message):
    with pytest.raises(UserError, match=message):
        fluxlab.make_experiment(task="upscale", scenes=scenes, identify=False)


def test_scenes_have_the_prompts_and_the_images(files):
    scenes = {"kind": "exchange", "count": 3}
    for more, name in (({"prompts": PROMPTS}, r"prompts=\[\]"), ({"prompts": (), "mask": "m.png"}, "mask=null")):
        with pytest.raises(UserError, match=f"scenes: has the prompts and the images; write {name}, or scenes=null"):
            fluxlab.make_experiment(task="inpaint", scenes=scenes, identify=False, **more)
    with pytest.raises(UserError, match=r"scenes.scale=null: the model's own size is not known"):
        fluxlab.make_experiment(task="inpaint", scenes=scenes, identify=False, model=replace(TINY, size=None))
    large = fluxlab.make_experiment(
        task="inpaint", scenes={**scenes, "scale": 2}, identify=False, model=replace(TINY, size=None)
    )
    assert (large.height, large.width) == (128, 128)


TINY = fluxlab.make_experiment("a", identify=False).model


# ---- keys, batches, records


def test_keys_follow_the_task_and_the_content_of_its_files(files):
    plain = fluxlab.make_experiment(PROMPTS, {"half": VARIANTS["half"]}, sampling=SMALL, identify=False)
    assert "tasks" not in plain.request()
    assert "inputs" not in plain.request()
    one = made(files)
    assert len({*keys(one).values()}) == len(VARIANTS) * 2
    sized = replace(plain, height=16, width=16)
    assert {key: keys(one)["prompt", key] for key in PROMPTS} == {key: keys(sized)["baseline", key] for key in PROMPTS}
    assert keys(one)["half", PROMPTS[0]] != keys(sized)["half", PROMPTS[0]]
    (files / "copy.png").write_bytes((files / "a.png").read_bytes())
    assert keys(made(files, image="copy.png")) == keys(one)
    assert made(files, image="copy.png").digest == one.digest
    other = made(files, image="b.png")
    changed = {variant for variant, prompt in keys(one) if keys(one)[variant, prompt] != keys(other)[variant, prompt]}
    assert changed == {"baseline", "inverted", "half", "filled"}
    assert other.digest != one.digest
    with_target = made(files, target="t.png")
    assert keys(with_target) == keys(one)  # a target is compared with only
    mixed = made(files, image=[str(files / "a.png"), str(files / "b.png")])
    assert keys(mixed)["baseline", PROMPTS[0]] == keys(one)["baseline", PROMPTS[0]]
    assert keys(mixed)["baseline", PROMPTS[1]] == keys(other)["baseline", PROMPTS[1]]


def test_request_round_trip(files):
    experiment = made(files, target="t.png")
    assert from_request(json.loads(json.dumps(experiment.request()))) == experiment
    drawn = fluxlab.make_experiment(task="inpaint", scenes={"kind": "exchange", "count": 2}, identify=False)
    assert from_request(json.loads(json.dumps(drawn.request()))) == drawn


def test_controls_have_the_task_of_the_baseline(files):
    from fluxlab.experiment.cells import references

    baseline = cells(made(files), SETTINGS)[0]
    assert {cell.task for cell in references(made(files), SETTINGS)} == {baseline.task} == {Task("inpaint")}


def test_decoding_takes_no_steps(files):
    settings = replace(SETTINGS, batch_tokens=100 * SETTINGS.tokens)
    (batch,) = batches(cells(made(files), settings), settings)
    assert step_rows(batch, settings) == [2 * (len(VARIANTS) - 1)] * settings.steps


def test_the_plan_has_tasks_and_inputs(files):
    text = plan(made(files), None, None, None)
    assert "inputs     1 image of 16 × 16 px" in text
    assert "not counted below: inversions, one for each image of inverted" in text
    assert "inverted  inpaint(iterations=1, path=inverted)" in text
    assert "half      inpaint; scale factor 0.5 on image" in text
    assert "variants share" not in text


# ---- images


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")


def test_images_are_those_of_the_pipeline(files, pipe, tmp_path):
    """Whatever else is in their batch; and each half of a stopped run."""
    images = [str(files / "a.png"), str(files / "b.png")]
    experiment = made(files, image=images, sampling=replace(SMALL, device="cpu"), identify=True)
    run = fluxlab.run_experiment(experiment, tmp_path / "run")
    for prompt, image in zip(PROMPTS, images, strict=True):
        pixels = np.asarray(Image.open(image))
        expected = {
            "baseline": pipe.inpaint(pixels, HOLE, prompt, 0, steps=2),
            "inverted": pipe.inpaint(pixels, HOLE, prompt, 0, steps=2, path="inverted", iterations=1),
            "half": pipe.inpaint(pixels, HOLE, prompt, 0, steps=2, programs=VARIANTS["half"]),
            "prompt": pipe.generate(prompt, 0, steps=2, height=16, width=16),
        }
        for name, (found,) in expected.items():
            near = np.abs(np.asarray(run.open(name, prompt, 0), int) - np.asarray(found, int))
            assert near.max() <= 1, name  # the autoencoder rounds by the size of its batch
        row = run.cell("baseline", prompt, 0)
        own = np.asarray(run.open("baseline", prompt, 0))
        error = ((own[~HOLE] / 255 - pixels[~HOLE] / 255) ** 2).mean()
        assert row["psnr_outside"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert {"psnr_target", "ssim_target"} & {*run.metrics[0]} == set()
    assert run.describe("half") == "inpaint; scale factor 0.5 on image"
    file = run.image("inverted", PROMPTS[1], 0)
    before = file.read_bytes()
    file.unlink()
    fluxlab.run_experiment(experiment, tmp_path / "run")
    assert file.read_bytes() == before


@pytest.mark.parametrize("own", [False, True], ids=["of the run", "of the model"])
def test_guidance_is_that_of_the_pipeline(files, pipe, tmp_path, own):
    """Of the run, or of a model that needs it, as klein 4B base does. The negative prompt is the run's."""
    words = {"true_cfg": 3.0, "negative_prompts": None if own else "a bird"}
    sampling = (
        replace(SMALL, device="cpu") if own else replace(SMALL, device="cpu", true_cfg=3, negative_prompt="a bird")
    )
    variants = {"inverted": {"task": {"path": "inverted", "iterations": 1}}}
    experiment = made(files, variants, sampling=sampling, identify=True)
    if own:
        experiment = replace(experiment, model=replace(experiment.model, true_cfg=3.0))
    run, pixels = fluxlab.run_experiment(experiment, tmp_path / "run"), np.asarray(Image.open(files / "a.png"))
    for name, more in (("baseline", {}), ("inverted", {"path": "inverted", "iterations": 1})):
        (expected,) = pipe.inpaint(pixels, HOLE, PROMPTS[0], 0, steps=2, **words, **more)
        (plain,) = pipe.inpaint(pixels, HOLE, PROMPTS[0], 0, steps=2, **more)
        found = np.asarray(run.open(name, PROMPTS[0], 0), int)
        assert np.abs(found - np.asarray(expected, int)).max() <= 1, name
        assert np.abs(found - np.asarray(plain, int)).max() > 1, name


def test_a_changed_file_stops_the_run(files, tmp_path):
    experiment = made(files, sampling=replace(SMALL, device="cpu"), identify=True)
    Image.new("RGB", (16, 16)).save(files / "a.png")
    with pytest.raises(UserError, match=r"a.png: this image has changed since the run started"):
        fluxlab.run_experiment(experiment, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": replace(SMALL, compile=True, device="cpu")}, "compile=True: the task inpaint does not have it"),
        ({"mask": "all.png"}, "mask covers every token"),
        (
            {
                "task": {"name": "upscale", "source_programs": {"a": {"op": "zero", "blocks": 99}}},
                "mask": None,
                "variants": {},
            },
            "source_programs.a.blocks: 99, expected a block below 6",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_image(files, tmp_path, change, message):
    Image.new("L", (16, 16), 255).save(files / "all.png")
    experiment = made(files, **{"sampling": replace(SMALL, device="cpu"), "identify": True, **change})
    with pytest.raises(UserError, match=message):
        fluxlab.run_experiment(experiment, tmp_path / "run")
    assert not list((tmp_path / "run").glob("cells/*.png"))


def test_upscaled_and_decoded_images(files, tmp_path, pipe):
    variants = {
        "baseline": {"task": {"method": "half_steps"}},
        "bicubic": {"task": {"name": "decode", "of": "enlarged"}},
        "resized": {"task": "resize"},
        "drawn": {"task": {"name": "decode", "of": "target"}},
        "prompt": {"task": "generate"},
    }
    Image.open(files / "a.png").resize((32, 32)).save(files / "large.png")
    sampling = replace(SMALL, device="cpu")
    experiment = made(files, variants, "upscale", mask=None, target="large.png", sampling=sampling, identify=True)
    assert (experiment.height, experiment.width) == (32, 32)
    run = fluxlab.run_experiment(experiment, tmp_path / "run")
    pixels, target = (np.asarray(Image.open(files / name)) for name in ("a.png", "large.png"))
    (found,) = pipe.upscale(pixels, PROMPTS[0], 0, method="half_steps", steps=2)
    (decoded,) = pipe.decode(*pipe.encode(target))
    resized = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    for name, expected in (("baseline", found), ("drawn", decoded), ("resized", resized)):
        near = np.abs(np.asarray(run.open(name, PROMPTS[0], 0), int) - np.asarray(expected, int))
        assert near.max() <= 1, name
    row = run.cell("drawn", PROMPTS[0], 0)
    own = np.asarray(run.open("drawn", PROMPTS[0], 0))
    assert row["psnr_target"] == pytest.approx(evaluate("psnr", Sample(own), Sample(target)), abs=1e-3)
    assert row["ssim_target"] == pytest.approx(evaluate("ssim", Sample(own), Sample(target)), abs=1e-3)
    assert np.isnan(run.cell("drawn", PROMPTS[0], 0).get("seam", np.nan))


def test_a_failed_image_does_not_take_the_others_of_its_batch_along(files, monkeypatch):
    """The second group fails as a whole, in the first one an image."""
    settings = replace(SETTINGS, height=16, width=16, steps=2)
    every = [cell for cell in cells(made(files), settings) if cell.variant in ("baseline", "inverted", "filled")]

    def failing(pipe, chosen, given, sampling):
        if given.get("path") == "inverted":
            raise NonFiniteError("x", {0: 1}, {0: "its latents are not finite"})
        raise NonFiniteError("x", {1: 1}, {1: "its latents are not finite"}, [Image.new("RGB", (16, 16)), None])

    monkeypatch.setitem(task_images.MAKE, "inpaint", failing)
    monkeypatch.setitem(task_images.MAKE, "decode", lambda pipe, chosen, given, sampling: ["decoded"] * len(chosen))
    with pytest.raises(NonFiniteError) as error:
        task_images.images_of(None, every, settings)
    assert [image is not None for image in error.value.results] == [True, False, False, False, True, True]
    assert set(error.value.reasons) == {1, 2, 3}
    assert error.value.reasons[3] == "an image that is computed with it is not finite"


# ---- what is measured


def test_psnr_outside_counts_no_pixel_of_the_mask():
    image = np.full((16, 16, 3), 100, np.uint8)
    shown = image.copy()
    shown[~HOLE] += 51
    given = {"image": image, "mask": HOLE}
    assert evaluate("psnr_outside", Sample(shown, given=given.get)) == pytest.approx(-20 * np.log10(0.2))
    shown = image.copy()
    shown[HOLE] = 0
    assert evaluate("psnr_outside", Sample(shown, given=given.get)) == 100


def test_the_seam_of_a_flat_hole():
    mask = np.zeros((8, 8), bool)
    mask[2:4, 4:] = True  # touches the edge of the image, where there is no border
    image = np.zeros((8, 8, 3), np.uint8)
    assert evaluate("seam", Sample(image, given={"mask": mask}.get)) == 0
    image[mask] = 51
    assert evaluate("seam", Sample(image, given={"mask": mask}.get)) == pytest.approx(0.2)
    image[3, 4:] = 0  # 4 + 1 of the 10 pairs of neighbours are equal now
    assert evaluate("seam", Sample(image, given={"mask": mask}.get)) == pytest.approx(0.1)


def test_the_needs_of_metrics():
    assert {name for name, entry in METRICS.items() if entry.needs == "mask"} == {"psnr_outside", "seam"}
    assert {name for name, entry in METRICS.items() if entry.needs == "target"} == {"psnr_target", "ssim_target"}


# ---- drawn scenes


@pytest.mark.parametrize("number", range(6))
def test_an_exchange_differs_in_the_mask_only_and_its_thing_is_the_one_asked_for(number):
    one = cases.case("exchange", number)
    changed = (one.image != one.target).any(-1)
    assert changed.any()
    assert not changed[~one.mask].any()
    tokens = one.mask.reshape(16, 4, 16, 4)
    assert (tokens.all((1, 3)) == tokens.any((1, 3))).all()
    before, after = parse(one.source_prompt), parse(one.prompt)
    assert (before.relation is None) == (number % 2 == 0)
    assert (one.asked.name, one.asked.colour) in ((after.thing, after.colour), (after.second, after.second_colour))
    assert one.asked.name not in (before.thing, before.second)
    assert one.asked.colour not in (before.colour, before.second_colour)


@pytest.mark.parametrize(("kind", "given", "side"), [("halved", 32, 64), ("doubled", 48, 48)])
def test_an_image_and_its_target_are_one_scene(kind, given, side):
    from fluxlab.scenes import held_out, sample_scene

    for number in range(6):
        one = cases.case(kind, number)
        assert one.image.shape == (given, given, 3)
        assert one.target.shape == (2 * given, 2 * given, 3)
        assert held_out(sample_scene(np.random.default_rng([side, number]), (side, side), "heldout"))
        reduced = one.target.reshape(given, 2, given, 2, 3).astype(float).mean((1, 3))
        same = (np.abs(reduced - one.image) <= 0.5).all(-1).mean()
        assert same == 1 if kind == "halved" else 0.9 < same < 1  # doubled: drawn anew, with finer outlines


@pytest.mark.parametrize("kind", cases.KINDS)
def test_names_of_parts(kind):
    one = cases.cases(kind, 3, 2)[-1]
    for part, name in cases.names_of(kind, one, 2).items():
        assert np.array_equal(cases.part_of(name), getattr(one, part))
    assert (kind == "exchange") == ("mask" in cases.names_of(kind, one, 2))
    assert len({one.prompt for one in cases.cases(kind, 20)}) == 20
    with pytest.raises(UserError, match=f"scene:{kind}/1/image: expected a name such as scene:exchange/12@1/image"):
        cases.part_of(f"scene:{kind}/1/image")


@pytest.mark.parametrize("name", ["inpaint", "upscale", "upscale_beyond"])
def test_the_published_experiments(name):
    config = compose("config", RunConfig, "schema", [f"+exp={name}", "model=tiny"])
    experiment = fluxlab.make_experiment(
        config.prompts, config.variants, config.seeds, task=config.task, scenes=config.scenes, identify=False
    )
    assert experiment.names[0] == "baseline"
    assert len(experiment.prompts) == 64
    described = [experiment.describe(variant) for variant in experiment.variants]
    assert len({*described}) == len(described)
    (line,) = (line for line in (ROOT / f"configs/exp/{name}.yaml").read_text().splitlines() if "images, about" in line)
    assert line.startswith(f"# {64 * len(described)} images, about ")


ROOT = fluxlab.config.PACKAGE.parent
