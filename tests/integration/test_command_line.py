"""`python -m fluxlab.run` as a user types it, from the checkout and from an installed wheel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fluxlab.experiment.reading import read_store
from tests import processes, tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("folder"), guidance=True)


def fluxlab_run(*arguments, cwd, path=ROOT):
    env = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "fluxlab.run", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def small(folder):
    return ["+exp=hello", "model=local", f"model.path={folder}", "tracking=none", "height=16", "width=24", "steps=2"]


def test_pictures_are_where_the_command_says(folder, tmp_path):
    done = fluxlab_run(*small(folder), "seeds=[3,5]", "prompts=['a cat','a red dog']", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (store,) = (tmp_path / "runs" / "hello").iterdir()
    assert str(store.relative_to(tmp_path)) in done.stdout
    images = [np.asarray(Image.open(file)) for file in (store / "cells").glob("*.png")]
    assert len(images) == 4
    assert all(image.shape == (16, 24, 3) and image.std() > 5 for image in images)
    assert len({image.tobytes() for image in images}) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("flags", [(), ("--help",), ("-h",)])
def test_without_an_experiment_it_explains_itself(flags, tmp_path):
    done = fluxlab_run(*flags, cwd=tmp_path)
    assert done.returncode == 0
    for name in ("article", "hello", "zero", "dose_response"):
        assert f"  {name} " in done.stdout
    assert "the article's five edits of img_ids" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_composed_config_can_be_seen(tmp_path):
    done = fluxlab_run("+exp=article", "variants.half.a.factor=0.7", "~variants.zero", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["variants"]["half"] == {"a": {"op": "scale", "factor": 0.7}}
    assert list(shown["variants"]) == ["baseline", "half", "double", "stretch", "axis0"]


def test_a_folder_of_one_s_own_configs(tmp_path):
    mine = tmp_path / "mine" / "exp"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("# @package _global_\nname: own\ncaption: something of mine\n")
    done = processes.run("fluxlab.run", "--config-dir", "mine", cwd=tmp_path)
    assert "own             something of mine" in done.stdout
    done = processes.run("fluxlab.run", "--config-dir", "mine", "+exp=own", "--cfg", "job", cwd=tmp_path)
    assert yaml.safe_load(done.stdout)["name"] == "own"
    done = processes.run("fluxlab.run", "--config-dir", "nowhere", "+exp=own", cwd=tmp_path)
    assert done.returncode == 2
    assert "--config-dir nowhere: there is no such folder" in done.stderr


def test_a_preset_makes_a_variant(folder, tmp_path):
    preset = ["+op@variants.mine.a=scale", "variants.mine.a.factor=0.8"]
    done = processes.run("fluxlab.run", *small(folder), *preset, "seeds=1", "out=s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "factor 0.8" in read_store(tmp_path / "s").describe("mine")


def test_every_combination(folder, tmp_path):
    done = processes.run("fluxlab.run", "-m", *small(folder), "steps=1,2", "seeds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "hello").iterdir())) == 2
    done = processes.run("fluxlab.run", "-m", *small(folder), "steps=0,1", "seeds=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "steps=0" in done.stderr
    assert "1 of the 2 combinations failed" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_shell_completes(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "fluxlab +exp=art"}
    command = [sys.executable, "-m", "fluxlab.run", "-sc", "query=bash"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["+exp=article"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exp=hello", "model=dev"], "exp=hello model=dev: no experiment named"),
        (["+exp=helo"], "exp=helo: there is none; did you mean hello?; available: article"),
        (["+exp=hello", "model=dve"], "model=dve: there is none; did you mean dev?; available: "),
        (["+exp=hello", "model=5"], "model=5: expected one of dev, flux2dev, "),
        (["+exp=hello", "capture={a: 1}"], "capture={a: 1}: expected one of concepts, distance, full, none, words;"),
        (["+exp=hello", "model=dev", "stepz=3"], "stepz: there is no such key"),
        (["+exp=hello", "model=dev", "+stepz=3"], "stepz: there is no such key"),
        (["+exp=hello", "model=dev", "steps=many"], "steps: 'many', expected a whole number"),
        (["+exp=hello", "model=dev", "seeds=0"], "seeds=0: expected a count"),
        (["+exp=hello", "model=dev", "seeds=[a]"], "seeds="),
        (["+exp=hello", "model=dev", "prompts=[]"], "prompts=[]: expected at least one"),
        (["+exp=hello", "model=dev", "device=gpu9"], "device 'gpu9'"),
        (["+exp=hello", "--verbose"], "--verbose: there is no such flag"),
        (["+exp=hello", "model=dev", "dtype=int8"], "dtype='int8': expected float32"),
        (["+exp=hello", "model=local"], "model.path"),
        (["+exp=hello", "model=local", "model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["+exp=hello", "model=dev", "prompts=[a"], "prompts"),
    ],
)
def test_misuse_ends_in_three_lines(arguments, message, tmp_path):
    done = processes.run("fluxlab.run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_wrong_size_for_the_model(folder, tmp_path):
    done = processes.run("fluxlab.run", *small(folder), "height=18", cwd=tmp_path)
    assert done.returncode == 2
    assert "height=18: must be a multiple of 4" in done.stderr


def test_wheel_runs_elsewhere_with_its_configs(folder, tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True)
    done = fluxlab_run(*small(folder), "out=pictures", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "pictures" / "cells").glob("*.png"))) == 2
    assert (site / "fluxlab" / "configs" / "model" / "dev.yaml").is_file()


def test_importing_fluxlab_loads_nothing_heavy():
    code = "import sys, fluxlab; print([m for m in ('torch', 'transformers', 'wandb', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
