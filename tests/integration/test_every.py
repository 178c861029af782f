"""`make figures` from runs to files, and the results that docs quote."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

import fluxlab
from experiments import every
from fluxlab import run as command_line
from fluxlab.config import config_folder
from fluxlab.experiment.each import expanded
from fluxlab.experiment.reading import read_store
from fluxlab.measure.oracle import inspect

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "docs" / "results.json").read_text())


def test_a_figure_is_made_from_its_runs_and_runs_are_continued(tmp_path):
    def written():
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/cells/*.png")}

    words = ["steps", "--runs", str(tmp_path / "runs"), "-o", str(tmp_path / "figures")]
    words += ["prompts=[a red fox]", "seeds=1", "steps=10"]
    assert every.main(words) == 0
    made = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert made == sorted(
        ["step_roles-roles.txt", *(f"step_roles-roles-{w}.{end}" for w in ("column", "page") for end in ("pdf", "png"))]
    )
    before = written()
    assert every.main(words) == 0
    assert written() == before != {}


def test_every_command_names_a_file_of_the_project():
    for name in every.FIGURES:
        for module, *_ in every.commands(name, Path("runs"), Path("figures")):
            path = ROOT / Path(*module.split("."))
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    runs = {key for lines in every.FIGURES.values() for line in lines for key in re.findall(r"{(\w+)}", line)}
    for name in runs - {"runs"} | set(every.MANY):
        assert (config_folder() / "exp" / f"{name}.yaml").is_file(), name


def test_words_go_to_runs_and_attributions():
    words = ["model=tiny2", "device=cpu"]
    for name in every.FIGURES:
        made = every.commands(name, Path("runs"), Path("figures"), () if every.refusal(name, words) else words)
        for module, *arguments in made:
            has = module in every.WITH_WORDS
            assert (words[0] in arguments) == has, (name, module)


def test_the_figures_of_another_model(capsys):
    shown = {}
    for words in ([], ["model=tiny2"], ["model=schnell", "device=cuda"], ["seeds=1"]):
        assert every.main(["--list", *words]) == 0
        shown[" ".join(words)] = capsys.readouterr().out
    assert "experiments.ids" not in shown["model=tiny2"]
    assert (
        "fluxlab.attribution +exp=atlas objective=place out=runs/figures/atlas_place model=tiny2"
        in shown["model=tiny2"]
    )
    assert (
        "+exp=attribution out=runs/figures/attribution model=schnell device=cuda" in shown["model=schnell device=cuda"]
    )
    assert "+exp=inpaint" in shown["model=schnell device=cuda"]
    assert "experiments.attribution" not in shown["seeds=1"]
    for name in ("trace", "atlas", "methods", "relocation", "words", "text_order"):
        assert name in shown[""]
        assert name not in shown["model=schnell device=cuda"]


def test_a_run_that_follows_from_a_script_comes_after_it():
    """The atlas: its run is of an experiment that `fluxlab.ablation` writes, so it is no task of its own."""
    made = every.tasks({name: every.commands(name, Path("runs"), Path("figures")) for name in ("atlas", "steps")})
    assert [(task.name, set(task.needs)) for task in made] == [
        ("atlas", set()),
        ("run step_roles", set()),
        ("steps", {"run step_roles"}),
    ]
    modules = [module for module, *_ in made[0].commands]
    assert modules == [*["fluxlab.attribution"] * 2, "fluxlab.ablation", "fluxlab.run", "experiments.atlas"]


def test_a_script_that_fails_ends_the_command(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(every.FIGURES, "steps", ("experiments.roles {runs}",))
    for jobs in ("1", "2"):
        assert every.main(["steps", "--runs", str(tmp_path), "-o", str(tmp_path), "--jobs", jobs]) == 2
        error = capfd.readouterr().err
        assert "steps: python -m experiments.roles ended with exit code 2" in error
        assert f"{tmp_path}: " in error  # what the script says itself, from its log file


def test_several_jobs(tmp_path, monkeypatch):
    """Two figures that need one run and a figure without a run: every command once, after what it needs."""
    order = tmp_path / "order.txt"
    (tmp_path / "note.py").write_text(
        "import os, pathlib, sys, time\n"
        "order = pathlib.Path(__file__).with_name('order.txt')\n"
        "for _ in range(600):\n"  # the run waits until the other job has written, 30 s at most
        "    time.sleep(0.05 * (sys.argv[1] == 'run' and not order.exists()))\n"
        "with open(order, 'a') as file:\n"
        "    print(sys.argv[1], os.environ['OMP_NUM_THREADS'], file=file)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(every.os, "cpu_count", lambda: 6)
    run = ["fluxlab.run", "+exp=x"]
    made = every.tasks({"a": [run, ["note", "a"]], "b": [run, ["note", "b"]], "c": [["note", "c"]]})
    assert [(task.name, set(task.needs)) for task in made] == [
        ("run x", set()),
        ("a", {"run x"}),
        ("b", {"run x"}),
        ("c", set()),
    ]
    made[0] = made[0]._replace(commands=[["note", "run"]])
    assert every.make(made, tmp_path / "runs", 2) == 0
    assert order.read_text().split("\n")[:2] == ["c 3", "run 3"]
    assert sorted(order.read_text().split()[::2]) == ["a", "b", "c", "run"]
    assert every.default_jobs([]) == 4
    assert every.default_jobs(["model=schnell"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing: no figure has this name; expected article"),
        (["ids", "steps=3"], "ids: makes no run, so steps=3 has no effect on it"),
        (
            ["atlas", "memory=streamed"],
            "atlas: has gradients with model, lora, device, dtype, cache, steps, so memory=s",
        ),
        (["attribution", "seeds=3"], "attribution: has gradients with model, lora, "),
        (["trace", "model=schnell"], "trace: needs the scene oracle, which does not read the images of model=schnell"),
        (["atlas", "model=schnel"], "model=schnel: there is none; did you mean schnell?"),
        (["--far"], "unrecognized arguments: --far; see --help"),
    ],
)
def test_wrong_words(words, message, capsys):
    assert every.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [pytest.param("step_roles", marks=pytest.mark.soak), "freeflux_probe"])
def test_what_docs_quote_is_what_the_runs_give(name, tmp_path):
    """The first prompt and seed of every variant again. Other processors round differently."""
    prompts, *others = every.overrides(name)
    first = json.dumps(json.loads(prompts.removeprefix("prompts="))[:1])
    words = [f"+exp={name}", "model=tiny", "device=cpu", "tracking=none", f"out={tmp_path / 'run'}"]
    assert command_line.main([*words, *others, f"prompts={first}", "seeds=[0]"]) == 0
    rows = {row["variant"]: row for row in read_store(tmp_path / "run").metrics}
    assert set(rows) == set(RESULTS[name]) - {"noise floor", "another seed"}
    for variant, row in rows.items():
        quoted = RESULTS[name][variant]["psnr"]
        assert quoted["n"] == 64
        assert row["psnr"] == pytest.approx(quoted["first"], abs=1.0) or math.isinf(row["psnr"])


@pytest.mark.parametrize("condition", ["mask", "early_move_mask"])
def test_where_docs_say_that_a_relocated_thing_is(condition):
    """One image again: the last box at the first prompt and seed of `+exp=relocation`."""
    config = yaml.safe_load((config_folder() / "exp" / "relocation.yaml").read_text())
    program = list(expanded({condition: config["variants"][condition]}, 0).values())[-1]
    prompt, pipe = config["prompts"][0], fluxlab.load_pipeline("tiny")
    (image,) = pipe.generate([prompt], seeds=[0], programs=[program], steps=config["steps"])
    (thing, *_) = inspect(image, prompt).things
    assert [thing.row, thing.col] == pytest.approx(RESULTS["relocation"][condition]["first"], abs=1.0)
