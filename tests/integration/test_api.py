"""Experiments from Python: the same runs as from the command line."""

import threading

import pytest

import fluxlab
from fluxlab.checkpoints.random import write_random
from fluxlab.errors import UserError
from fluxlab.positions import Program
from fluxlab.run import main

HALF = {"a": {"op": "scale", "factor": 0.5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("random") / "model")


def small(folder, **changes):
    sampling = fluxlab.Sampling(height=16, width=24, steps=1)
    values = {"variants": {"half": HALF}, "seeds": 2, "model": folder, "sampling": sampling, "name": "hello"}
    return fluxlab.make_experiment(**{"prompts": "a cat", **values, **changes})


def words(folder, out):
    fixed = ["+exp=hello", "model=local", "height=16", "width=24", "steps=1", "seeds=2", "tracking=none"]
    return [*fixed, f"model.path={folder}", f"out={out}", "prompts=[a cat]", f"+variants.half={HALF}".replace("'", "")]


def test_a_run_from_python_is_the_run_of_the_command_line(model, tmp_path):
    run = fluxlab.run_experiment(small(model), tmp_path / "python")
    assert run.variants == ["baseline", "half"]
    assert len(run.metrics) == 4
    assert main(words(model, tmp_path / "command")) == 0
    other = fluxlab.read_run(tmp_path / "command")
    assert other.metrics == run.metrics
    assert other.record["digest"] == run.record["digest"]
    for name in ("metrics.csv", "summary.csv", *(f"cells/{row['cell']}.png" for row in run.metrics)):
        assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "python" / name).read_bytes()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "python").rglob("*.png")}
    assert fluxlab.run_experiment(small(model), tmp_path / "python").metrics == run.metrics
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "python").rglob("*.png")}


def test_programs_captures_and_settings_are_taken_as_they_are(model):
    experiment = small(model, variants={"half": Program.from_config(HALF)}, capture="words", seeds=[7])
    assert experiment.variants["half"] == Program.from_config(HALF)
    assert list(experiment.variants) == ["baseline", "half"]
    assert experiment.capture.requests[0].name == "words"
    assert (experiment.seeds, experiment.steps, experiment.prompts) == ((7,), 1, ("a cat",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["a cat", False]}, r"prompts\[1\]=False: expected text; write it in quotes"),
        ({"prompts": 3}, "prompts=3: expected a string or a list"),
        ({"prompts": []}, r"prompts=\[\]: expected at least one"),
        ({"variants": {0.5: HALF}}, "0.5 is not text, expected a name in quotes, such as '0.5'"),
        ({"name": 1}, "name=1: expected text"),
        ({"baseline": "nothing"}, "baseline=nothing: no such variant"),
        ({"seeds": 0}, "seeds=0"),
        ({"model": "tinny"}, "tinny"),
        ({"sampling": fluxlab.Sampling(steps=0)}, "steps=0"),
        ({"capture": {"a": {"kind": "wrds"}}}, "kind"),
    ],
)
def test_what_cannot_be_run_is_refused(model, changes, message):
    with pytest.raises(UserError, match=message):
        small(model, **changes)


def test_two_threads_run_at_the_same_time(model, tmp_path):
    codes = {}

    def work(name):
        codes[name] = main(words(model, tmp_path / name))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {"a": 0, "b": 0}
    assert fluxlab.read_run(tmp_path / "a").metrics == fluxlab.read_run(tmp_path / "b").metrics


def test_the_public_names():
    assert {"UserError", "errors", "make_experiment", "read_run", "run_experiment", "Sampling"} <= set(fluxlab.__all__)
    for name in fluxlab.__all__:
        assert getattr(fluxlab, name) is not None
    assert fluxlab.errors.UserError is fluxlab.UserError
    for function in (fluxlab.make_experiment, fluxlab.run_experiment, fluxlab.read_run):
        assert "UserError" in function.__doc__
