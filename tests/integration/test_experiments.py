"""Every experiment of `configs/exp` runs on the embedded model, with few steps, few prompts and one seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxlab import run as command_line
from fluxlab.compose import compose
from fluxlab.experiment.reading import read_store

NAMES = sorted(
    file.stem
    for file in (Path(__file__).parents[2] / "configs" / "exp").glob("*.yaml")
    if not file.stem.startswith("learn_") and file.stem not in ("atlas", "attribution")  # of fluxlab.attribution
)

STEPS = {
    "step_roles": 10,  # fewer have no step below σ = 0.375
    "step_window": 4,  # a quarter of the steps each
    "trace": 4,
}
"""The least in which every edit acts; 2 where nothing is said."""

TWO = ["a red fox on the left holding a sign that says open", "a blue heart on the right holding a sign that says rain"]


def composed(name: str) -> command_line.RunConfig:
    return compose("config", command_line.RunConfig, "schema", [f"+exp={name}"])


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs(name, tmp_path):
    out = tmp_path / "run"
    config = composed(name)
    prompts, size = TWO if name == "trace" else config.prompts[:1], round(64 * (config.enlarge or 1))
    asked = ["scenes.count=1"] if config.scenes else [f"prompts={json.dumps(prompts)}"]
    if name == "upscale_beyond":
        size = 96
    words = [*asked, "seeds=1", f"steps={STEPS.get(name, 2)}", "tracking=none", f"out={out}"]
    assert command_line.main([f"+exp={name}", *words]) == 0
    run = read_store(out)
    baseline_rows = [row for row in run.metrics if row["variant"] == run.baseline]
    assert len(run.metrics) == len(run.variants) * len(baseline_rows)
    controls = {"text", "x1", "all_1", "all_16"}  # these change nothing but rounding
    controls |= {"text_to_text_5", "image_to_text_5"}  # nothing reads the text of the last block
    for row in run.metrics:
        image = np.asarray(Image.open(run.image(row["variant"], row["prompt"], row["seed"])))
        assert image.shape == (size, size, 3)
        assert image.std() > 5
        if row["variant"] not in {run.baseline, *controls}:
            assert row["rmse"] > 0, (row["variant"], row["prompt"])
    with Image.open(out / "grid.png") as grid:
        assert max(grid.size) > 250
