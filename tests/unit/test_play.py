"""The playground without its page: controls from the registry, programs and YAML, what is drawn."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxlab
from fluxlab.compose import compose
from fluxlab.drawing.attention import overlay
from fluxlab.experiment.spec import read_variants
from fluxlab.play.controls import Slider, accepts, argument_controls, slider_of, where_controls
from fluxlab.play.session import draw
from fluxlab.play.writing import EditState, experiment_yaml, program_of, read_value
from fluxlab.positions import OPS, Program
from fluxlab.positions.edit import PARSE
from fluxlab.probes import Probe
from fluxlab.run import RunConfig
from fluxlab.select import arguments as types

PROMPT = "A cat holding a sign that says hello world"
HALF = {"factor": "0.5"}


@pytest.mark.parametrize("name", OPS)
def test_controls_start_at_a_program_and_sliders_end_at_values_that_the_op_takes(name):
    op = OPS[name]
    arguments, where = argument_controls(op), where_controls(op)
    assert [one.key for one in arguments] == list(op.types)
    assert {one.key for one in where} | {"steps", "blocks"} >= set(op.where)
    for one in (*arguments, *where):
        parse = op.types.get(one.key) or PARSE[one.key]
        assert one.start or not one.required or name == "relocate", "a required argument without a preset"
        for word in (*one.words, *one.suggestions):
            assert accepts(parse, {"true": True, "false": False}.get(word, word)), word
        if one.slider:
            assert one.slider.low < one.slider.high
            assert accepts(parse, one.slider.low)
            assert accepts(parse, one.slider.high)
    if name != "relocate":  # the user says where to
        state = EditState(name, {one.key: one.start for one in (*arguments, *where)})
        assert [edit.op for edit in program_of([state], 20, 6).edits] == [name]


@pytest.mark.parametrize(
    ("parse", "start", "slider"),
    [
        (types.number, 30.0, Slider(-180, 180, 1)),
        (types.per_axis, [1.2] * 3, Slider(-4, 4, 0.05)),
        (types.not_negative, None, Slider(0, 4, 0.05)),
        (types.positive, 0.5, Slider(0.025, 2, 0.025)),
        (types.above_one, 2000.0, Slider(2, 6000, 1)),
        (types.positive_integer, 2, Slider(1, 8, 1)),
        (types.seed, 0, Slider(0, 4, 1)),
        (PARSE["strength"], 1.0, Slider(0, 1, 1 / 80)),
        (types.axis, "row", None),
        (types.flag, False, None),
        (types.box, None, None),
        (PARSE["axes"], "all", None),
    ],
)
def test_the_range_of_a_slider(parse, start, slider):
    assert slider_of(parse, start) == slider


def test_windows_of_steps_and_blocks():
    edits = [EditState("scale", HALF, (0, 4), (2, 2)), EditState("scale", HALF, (0, 19), (0, 5))]
    assert program_of(edits, 20, 6) == Program.from_config(
        {
            "scale": {"op": "scale", "factor": 0.5, "steps": [0, 1, 2, 3, 4], "blocks": [2]},
            "scale_2": {"op": "scale", "factor": 0.5},
        }
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": ""}, r"scale\.factor: missing"),
        ({"factor": "x"}, r"scale\.factor: 'x', expected a number"),
        ({"factor": "[1"}, r"scale\.factor: '\[1', not YAML that can be read"),
        ({**HALF, "side": "left"}, r"scale\.side: 'left', expected both or queries"),
    ],
)
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(fluxlab.UserError, match=message):
        program_of([EditState("scale", values)], 20, 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])), max_size=3))
def test_every_text_survives_the_yaml(texts):
    text = experiment_yaml(Program(), {"prompts": texts}, "model=tiny")
    assert read_value(text, "")["prompts"] == texts


def test_the_yaml_is_an_experiment_of_the_same_program(tmp_path):
    prompts = ["1e3", "no", "1_000", "${steps}", "a: b, [c] # d", 'it\'s "so"', "März"]
    edits = [
        EditState("relocate", {"to": "[4, 4]", "tokens": "{words: ['1e3']}"}, (0, 2)),
        EditState("rotate", {"degrees": "30", "strength": "{from: 1, to: 0}"}, None, (1, 3)),
    ]
    program = program_of(edits, 8, 6)
    (tmp_path / "exp").mkdir()
    text = experiment_yaml(program, {"prompts": prompts, "seeds": [7], "steps": 8, "enlarge": 1.5}, "model=tiny")
    (tmp_path / "exp" / "mine.yaml").write_text(text, encoding="utf-8")
    config = compose("config", RunConfig, "schema", ["+exp=mine"], tmp_path)
    assert (config.prompts, config.seeds, config.steps, config.enlarge) == (prompts, [7], 8, 1.5)
    assert read_variants(config.variants) == {"baseline": Program(), "mine": program}


@pytest.fixture(scope="module")
def pipe():
    return fluxlab.load_pipeline("tiny")


@pytest.mark.parametrize("name", ["tiny", "tiny2"])
def test_what_is_drawn_is_what_generate_returns(name):
    pipe = fluxlab.load_pipeline(name)
    program = Program.from_config({"a": {"op": "scale", "factor": 0.5}})
    drawn = draw(pipe, PROMPT, 3, program, 2)
    probe = Probe("words")  # all steps and blocks apart
    before, after = pipe.generate([PROMPT] * 2, 3, programs=[None, program], steps=2, probe=probe)
    assert (drawn.before.tobytes(), drawn.after.tobytes()) == (before.tobytes(), after.tobytes())
    assert drawn.positions.startswith(b"\x89PNG")
    maps = probe.arrays["words"].mean("step", "block", "direction")
    assert [one.word for one in drawn.maps] == maps.labels("word")
    cat = maps.sel(word="cat").values
    shown = overlay(cat[1], after, highest=cat.max(), size=(128, 128))
    (drawn_cat,) = (one.after for one in drawn.maps if one.word == "cat")
    assert np.abs(np.int16(shown) - np.int16(drawn_cat)).max() <= 2  # means are taken in another order


def test_a_refused_capture_leaves_the_image(pipe):
    program = Program.from_config({"a": {"op": "windows", "size": 2}})
    drawn = draw(pipe, PROMPT, 0, program, 1)
    assert not drawn.maps
    assert "leave the capture of words out" in drawn.maps_note
    (alone,) = pipe.generate(PROMPT, 0, programs=program, steps=1)
    assert drawn.after.tobytes() == alone.tobytes() != drawn.before.tobytes()
    assert draw(pipe, " ", 0, Program(), 1).maps_note == "the prompt has no words"


def test_the_size_and_notes(pipe):
    drawn = draw(pipe, PROMPT, 0, Program.from_config({"a": {"op": "scale", "factor": 1}}), 1, 1.25)
    assert drawn.after.size == (80, 80)
    assert "a: changes nothing" in drawn.notes[0]


def test_inject_takes_from_the_image_before(pipe):
    edit = {"op": "inject", "source": "baseline", "what": "attention"}
    drawn = draw(pipe, PROMPT, 0, Program.from_config({"zero": {"op": "zero"}, "a": edit}), 1)
    without = draw(pipe, PROMPT, 0, Program.from_config({"zero": {"op": "zero"}}), 1)
    assert drawn.after.tobytes() == drawn.before.tobytes() != without.after.tobytes()
    other = Program.from_config({"a": {**edit, "source": {"prompt": "a fox"}}})
    with pytest.raises(fluxlab.UserError, match=r"a\.source: .*expected baseline here"):
        draw(pipe, PROMPT, 0, other, 1)


def test_what_a_run_refuses_is_refused(pipe):
    with pytest.raises(fluxlab.UserError, match="zebra"):  # a word that the text encoder does not know
        draw(pipe, "a zebra", 0, Program(), 1)
    with pytest.raises(fluxlab.UserError, match=r"heads: 9"):
        draw(pipe, PROMPT, 0, Program.from_config({"a": {"op": "zero", "heads": 9}}), 1)


def test_yaml_safe_reads_what_is_written():
    program = Program.from_config({"a": {"op": "scale", "factor": {"row": 2}, "tokens": {"words": ["cat", "on"]}}})
    read = yaml.safe_load(experiment_yaml(program, {"prompts": ["on"], "seeds": [0]}, "model=tiny"))
    assert Program.from_config(read["variants"]["mine"]) == program
