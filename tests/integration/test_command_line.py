"""`python -m fluxlab.run` as a user types it, from the checkout and from an installed wheel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny

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
    return ["+exp=hello", "model=local", f"model.path={folder}", "height=16", "width=24", "steps=2"]


def test_one_picture_a_prompt_and_seed(folder, tmp_path):
    done = fluxlab_run(*small(folder), "seeds=[3,5]", "prompts=['a cat','a red dog']", "out=pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == ["0-3.png", "0-5.png", "1-3.png", "1-5.png"]
    images = [np.asarray(Image.open(file)) for file in files]
    assert all(image.shape == (16, 24, 3) and image.std() > 5 for image in images)
    assert len({image.tobytes() for image in images}) == 4


def test_without_an_experiment_it_explains_itself(tmp_path):
    done = fluxlab_run(cwd=tmp_path)
    assert done.returncode == 0
    assert "hello" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exp=hello", "model=dev"], "exp=hello model=dev: no experiment named"),
        (["+exp=helo"], "exp=helo: there is none; available: hello"),
        (["+exp=hello", "model=dve"], "model=dve: there is none; available: "),
        (["+exp=hello", "model=dev", "stepz=3"], "stepz: there is no such key"),
        (["+exp=hello", "model=dev", "+stepz=3"], "stepz: there is no such key"),
        (["+exp=hello", "model=dev", "steps=many"], "steps: Value 'many'"),
        (["+exp=hello", "model=dev", "seeds=0"], "seeds=0: expected a count"),
        (["+exp=hello", "model=dev", "seeds=[a]"], "seeds="),
        (["+exp=hello", "model=dev", "prompts=[]"], "prompts=[]: at least one"),
        (["+exp=hello", "model=dev", "dtype=int8"], "dtype=int8: expected float32"),
        (["+exp=hello", "model=local"], "model.path"),
        (["+exp=hello", "model=local", "model.path=/nowhere/at/all"], "/nowhere/at/all"),
        (["+exp=hello", "model=dev", "device=gpu9"], "gpu9"),
        (["+exp=hello", "model=dev", "prompts=[a"], "prompts"),
    ],
)
def test_misuse_ends_in_three_lines(arguments, message, tmp_path):
    done = fluxlab_run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_wrong_size_for_the_model(folder, tmp_path):
    done = fluxlab_run(*small(folder), "height=18", cwd=tmp_path)
    assert done.returncode == 2
    assert "height=18: must be a multiple of 4" in done.stderr


def test_wheel_runs_elsewhere_with_its_configs(folder, tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.glob("*.whl")], check=True)
    done = fluxlab_run(*small(folder), "out=pictures", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures" / "0-0.png").is_file()
    assert (site / "fluxlab" / "configs" / "model" / "dev.yaml").is_file()


def test_importing_fluxlab_loads_nothing_heavy():
    code = "import sys, fluxlab; print([m for m in ('torch', 'transformers', 'wandb', 'hydra') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
