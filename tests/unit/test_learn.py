"""Arguments to learn: how they are written, that gradients reach them, and errors."""

import json
import re

import pytest
import torch
import yaml

from fluxlab.compose import compose
from fluxlab.config import config_folder
from fluxlab.errors import UserError
from fluxlab.gradients import checkpointed, compiled, denoising, frozen, prepare, stepping
from fluxlab.learn import LearnConfig, main, split
from fluxlab.learning import Fit, check_smooth, read_objective, read_template
from fluxlab.learning.fit import Row
from fluxlab.learning.objectives import Place, rendered
from fluxlab.learning.result import curve, intervals
from fluxlab.positions import Context, Layout, Program, Prompt, compile_programs
from fluxlab.run import main as run
from fluxlab.sampling import Sampling, image_ids, text_ids
from tests import families

SIGMAS = (1.0, 0.6, 0.0)


def context(rows=4, cols=6, text=5, trained=(4, 4), prompt=None):
    ids = torch.cat((text_ids(1, text), image_ids(1, rows, cols)), 1)
    prompts = prompt and [Prompt(prompt, tuple(word.span() for word in re.finditer(r"\w+", prompt)))]
    return Context(ids, Layout(text, (rows, cols)), (4, 6, 6), 10000, 1, 1, 2, SIGMAS, prompts, trained, text)


SMOOTH = {
    "scale": {"op": "scale", "factor": {"learn": 1.2}},
    "scale of a row": {"op": "scale", "factor": {"row": {"learn": 0.7, "min": 0.5, "max": 2}}, "origin": "centre"},
    "origin": {"op": "scale", "factor": 2, "origin": [0, {"learn": 1.5}]},
    "offset": {"op": "offset", "by": {"col": {"learn": 5.0}}, "tokens": "image", "blocks": 1, "heads": 0},
    "set": {"op": "set", "value": {"index": {"learn": 0}}, "tokens": "text"},
    "point": {"op": "relocate", "to": [{"learn": 1.0}, 2], "tokens": "text"},
    "box": {"op": "relocate", "to": {"box": [0, 0, {"learn": 2.5}, 3]}},
    "line": {"op": "relocate", "to": {"line": [[0, 0], [{"learn": 2.0}, 3]]}, "tokens": "text"},
    "rotate": {"op": "rotate", "degrees": {"learn": 30}},
    "warp": {"op": "warp", "field": [[[0, {"learn": 0.5}], [0, 0]], [[0, 0], [0, 0]]]},
    "text_line": {"op": "text_line", "axis": "index", "start": {"learn": 2}},
    "temperature": {"op": "temperature", "factor": {"learn": 1.0}},
    "jitter": {"op": "jitter", "std": {"learn": 0.5}},
    "pi": {"op": "pi", "factor": {"learn": 1.5}},
    "ntk": {"op": "ntk", "factor": {"row": {"learn": 1.5}}},
    "theta": {"op": "theta", "value": {"learn": 5000}},
    "gain": {"op": "gain", "factor": {"learn": 1.0}, "to": 0.5},
    "imax": {"op": "imax", "factor": {"learn": 1.3}},
    "dype": {"op": "dype", "method": "ntk", "exponent": {"learn": 1.5}, "factor": 2},
    "riflex": {"op": "riflex", "pair": 1, "length": {"learn": 9}},
    "strength": {"op": "zero", "strength": {"learn": 0.5}},
    "strength of a mask": {"op": "mask", "from": "text", "to": "image", "strength": {"learn": 0.5}},
    "strength of 1": {"op": "scale", "factor": 2, "strength": {"learn": 1.0}},
    "strength at the end": {"op": "scale", "factor": 2, "strength": {"from": 1, "to": {"learn": 0.2}}},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_reach_the_argument(name):
    template = read_template({"a": SMOOTH[name]}, "variants.x")
    (argument,) = template.learned
    check_smooth(template, context())  # against finite differences
    moved = argument.start * 0.9 + 0.01
    values = torch.tensor([moved], dtype=torch.float64, requires_grad=True)
    with_tensors = compile_programs([template.at(values)], context())
    plain = compile_programs([Program.from_config(template.config_at([moved]))], context())
    for t in SIGMAS[:-1]:
        for side in ("queries", "keys"):
            tables = [c.side_table(t, side, block=1) for c in (with_tensors, plain)]
            if name in ("pi", "ntk"):  # their factors are rounded to fp32 in an ordinary program
                torch.testing.assert_close(*tables, rtol=0, atol=1e-6)
            else:
                assert all(torch.equal(a, b) for a, b in zip(*tables, strict=True)), "the bits of the ordinary program"


def test_a_number_for_all_axes_is_one_argument():
    (argument,) = read_template({"a": {"op": "scale", "factor": {"learn": 2.0}}}, "x").learned
    assert argument.places == (("factor", 0), ("factor", 1), ("factor", 2))
    assert (argument.name, argument.unit) == ("a.factor", 2.0)


def test_limits_of_an_argument_are_its_bounds():
    def learned(edit):
        return read_template({"a": edit}, "x").learned[0]

    assert learned({"op": "pi", "factor": {"learn": 2}}).low == pytest.approx(1e-6)
    assert learned({"op": "gain", "factor": {"learn": 2}}).low == 0
    assert learned({"op": "offset", "by": {"learn": 2}}).low is None
    assert learned({"op": "theta", "value": {"learn": 100}}).low == pytest.approx(1 + 1e-6)
    strength = learned({"op": "zero", "strength": {"learn": 1}})
    assert (strength.low, strength.high) == (0, pytest.approx(1, abs=1e-5))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"op": "quantize", "to": {"learn": 0.5}}, r"variants\.x\.a\.to: the result of quantize is a step function"),
        ({"op": "shuffle", "seed": {"learn": 5}}, r"a\.seed: the result of shuffle is a step function"),
        ({"op": "riflex", "pair": {"learn": 1}}, r"a\.pair: pair of riflex is a whole number"),
        ({"op": "layout", "like": {"learn": 1}}, r"a\.like: learn 1 is not accepted, like of layout is flux"),
        ({"op": "scale", "factor": {"learn": 1, "min": 2}}, r"a\.factor: learn 1 is outside of its bounds"),
        ({"op": "scale", "factor": {"learn": 1, "max": 0.5}}, r"expected start ≤ 0\.5"),
        ({"op": "scale", "factor": {"learn": 1, "min": 2, "max": 0}}, r"min 2, max 0, expected min < max"),
        ({"op": "scale", "factor": {"learn": "much"}}, r"factor\.learn: 'much', expected the number to start from"),
        ({"op": "scale", "factor": {"learn": 1, "low": 0}}, r"factor\.low: 0, unknown key of learn"),
        ({"op": "pi", "factor": {"learn": 1, "min": -1}}, r"factor\.min: -1 is not accepted, factor of pi is a number"),
        ({"op": "scale", "factor": 2, "steps": [{"learn": 1}]}, r"steps selects where the edit acts"),
        ({"op": "ablate", "what": "mlp", "strength": {"learn": 0.5}}, r"edits of activations do not have"),
        ({"op": "scale", "size": {"learn": 1}}, r"a\.size: .*unknown key of scale"),
        ({"op": {"learn": 1}}, r"learn stands for a number of an edit"),
        ({"op": "scale", "factor": 2}, r"variants\.x: nothing to learn"),
    ],
)
def test_what_cannot_be_learned(edit, message):
    with pytest.raises(UserError, match=message) as error:
        read_template({"a": edit}, "variants.x")
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    "program",
    [
        {"a": {"op": "offset", "by": {"row": {"learn": 1}}}, "b": {"op": "quantize", "to": 1}},
        {"a": {"op": "offset", "by": {"row": {"learn": 1}}}, "b": {"op": "zero"}},
    ],
)
def test_what_changes_in_jumps_or_not_at_all(program):
    with pytest.raises(UserError, match=r"variants\.x\.a\.by\.row: changes nothing at its start"):
        check_smooth(read_template(program, "variants.x"), context())


@pytest.mark.parametrize("family", families.NAMES)
def test_the_gradient_of_a_loss_is_that_of_finite_differences(family):
    from functools import partial

    from tests.numerics.test_probes import sharpen

    pipe = families.load(family)
    sharpen(pipe.transformer)
    pipe.transformer.double()
    template = read_template(
        {"a": {"op": "scale", "factor": {"learn": 1.3}}, "b": {"op": "offset", "by": {"row": {"learn": 2}}}}, "x"
    )
    images = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = Sampling(steps=2, height=16, width=24, max_sequence_length=24)

    def loss(values, keep):
        prepared = prepare(pipe, ["a red cat"], [1], settings, keep=keep)
        edits = compiled(prepared, template.at(values))
        return denoising(images)(prepared, partial(stepping, prepared, edits)).sum()

    gradients = []
    for keep in (True, False):
        values = torch.tensor(template.starts, dtype=torch.float64, requires_grad=True)
        with frozen(pipe):
            if keep:
                loss(values, keep).backward()
            else:
                with checkpointed(pipe):
                    loss(values, keep).backward()
        gradients.append(values.grad)
    assert torch.equal(*gradients), "activations that are computed again give the same bits"
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-5
        start = torch.tensor(template.starts, dtype=torch.float64)
        with torch.no_grad():
            expected = (loss(start + step, True) - loss(start - step, True)) / 2e-5
        assert gradients[0][i] == pytest.approx(float(expected), rel=1e-3)


def test_the_best_is_of_the_last_phase():
    found = Fit(
        [Row("scan", 5.0, [1.0]), Row("coarse", 9.0, [2.0]), Row("update", 1.0, [3.0]), Row("update", 2.0, [4.0])]
    )
    assert found.best.values == [4.0]
    template = read_template({"a": {"op": "theta", "value": {"learn": 100}}}, "x")
    assert curve(found, template).splitlines()[:2] == ["evaluation,phase,score,a.value", "0,scan,5.0,1.0"]


def test_intervals_are_paired_differences():
    rows = [
        {"variant": v, "prompt": "p", "seed": s, "score": 10 * s + add}
        for v, add in (("baseline", 0), ("start", 1), ("learned", 3))
        for s in range(5)
    ]
    assert intervals(rows, "start")["learned - start"] == [2, 2, 2]
    assert intervals(rows, "baseline")["learned"][0] == 23


def test_cells_are_held_out():
    assert split(["a", "b", "c"], [], (0,)) == ((Place("a", 0), Place("b", 0)), (Place("c", 0),))
    assert split(["a"], [], (3, 4, 5)) == ((Place("a", 3), Place("a", 4)), (Place("a", 5),))
    assert split(["a"], ["b"], (3, 4)) == ((Place("a", 3), Place("a", 4)), (Place("b", 3), Place("b", 4)))
    with pytest.raises(UserError, match="held_out"):
        split(["a"], [], (0,))


def test_scenes_are_what_the_prompt_says():
    from fluxlab.measure.oracle import inspect

    for prompt in (
        "a red fox on the left holding a sign that says open cafe",
        "a blue ring above a green square",
        "a yellow heart",
    ):
        images = [rendered(Place(prompt, seed), (64, 64)) for seed in (0, 0, 1, 2, 3)]
        assert images[0].tobytes() == images[1].tobytes()
        assert len({image.tobytes() for image in images}) == 4
        for image in images:  # a pair with these things and colours is one of 100,000 scenes, and is always found
            assert inspect(image, prompt).wrong == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "likenes"}, "objective=likenes: expected one of .*did you mean likeness"),
        ({"name": "likeness"}, r"objective\.images: missing, likeness needs scenes, sampled, a run folder"),
        ({"name": "attention", "word": {"words": ["cat"]}}, r"objective\.box: missing"),
        ({"name": "sharpness", "images": "scenes"}, r"objective\.images: 'scenes', unknown key of sharpness"),
        ({"name": "likeness", "images": "a.png", "coarse": 2}, r"objective\.coarse=2: expected a share"),
        ({"name": "denoising", "images": "scenes", "variant": "half"}, "belongs to the images of a run folder"),
    ],
)
def test_wrong_objectives(config, message):
    with pytest.raises(UserError, match=message):
        read_objective(config)


LEARN = "+variants.mine={a: {op: offset, by: {row: {learn: 1, min: -4, max: 4}}}}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+exp=hello"], "variants: none has an argument to learn"),
        ([LEARN], "no experiment named; add \\+exp"),
        (["+exp=hello", LEARN, "objective=foo"], "objective=foo: there is none; available: attention, denoising"),
        (["+exp=hello", LEARN, "updates=0"], "updates=0: expected a whole number of at least 1"),
        (["+exp=hello", LEARN, "rate=0"], "rate=0: expected a share"),
        (["+exp=hello", LEARN, "seeds=1"], "one prompt and one seed leave nothing to hold out"),
        (["+exp=hello", LEARN, LEARN.replace("mine", "other")], "mine, other have arguments to learn; choose one"),
        (["+exp=hello", LEARN, "variant=min"], "variant=min: not a variant with learn, which are mine; did you mean"),
        (["+exp=hello", LEARN, 'held_out=["A cat holding a sign that says hello world"]'], "is one of prompts too"),
        (["+exp=hello", LEARN, "capture=words"], "capture"),
    ],
)
def test_errors_of_the_command_line(words, message, capsys):
    import re

    assert main(words) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") <= 3


def test_a_run_refuses_what_is_to_be_learned(capsys):
    assert run(["+exp=hello", LEARN, "tracking=none"]) == 2
    assert "variants.mine.a.by: learn, expected a number; python -m fluxlab.learn finds one" in capsys.readouterr().err
    assert run(["+exp=learn_offset"]) == 2
    assert "objective: a key of python -m fluxlab.learn" in capsys.readouterr().err


def test_the_plan_of_a_large_model(capsys):
    assert main(["+exp=hello", LEARN, "model=schnell", "plan=true", "objective=denoising"]) == 0
    printed = capsys.readouterr().out
    assert "activations computed again" in printed
    assert "4,352 tokens" in printed


def test_a_factor_that_starts_at_1_is_learned_with_others():
    keys = {"op": "temperature", "tokens": "text", "side": "keys", "factor": {"learn": 1}}
    program = {"a": SMOOTH["point"], "b": SMOOTH["strength of a mask"], "c": keys}
    check_smooth(read_template(program, "variants.mine"), context())


@pytest.mark.parametrize("name", ["learn_offset", "learn_sharpest", "learn_relocation"])
def test_published_searches(name):
    config = compose("learn", LearnConfig, "learn_schema", [f"+exp={name}"])
    header = (config_folder() / "exp" / f"{name}.yaml").read_text().splitlines()
    assert header[1] == f"# python -m fluxlab.learn +exp={name} model=tiny"
    assert config.name == name
    assert header[2].startswith(
        f"# {len(config.prompts) * config.seeds} cells to learn from, {len(config.held_out) * config.seeds} held out"
    )
    (variant,) = (value for key, value in config.variants.items() if key != "baseline")
    check_smooth(read_template(variant, "x"), context(prompt=config.prompts[0]))
    assert yaml.safe_load(json.dumps(config.objective))["name"] in ("denoising", "sharpness", "attention")
