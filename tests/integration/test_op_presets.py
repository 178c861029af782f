"""Every file of `configs/op` runs on the embedded model, in one batch, and changes the image if it should."""

import pytest
import torch
from omegaconf import OmegaConf

import fluxlab
from fluxlab.config import config_folder
from fluxlab.positions import Program, region_prompts, split_resample

PROMPT = "A cat holding a sign that says hello world"
OPEN = {"to": [4, 4]}
"""Values for arguments that a preset leaves open."""
SAME = {"place", "quantize"}
"""References have these ids already, and whole numbers are exact."""


def presets() -> dict[str, Program]:
    found = {}
    for file in sorted((config_folder() / "op").glob("*.yaml")):
        edit = OmegaConf.to_container(OmegaConf.load(file))
        edit = {key: OPEN[key] if value == "???" else value for key, value in edit.items()}
        if isinstance(edit.get("blocks"), list):  # of FLUX.1, of which this model has the first six
            edit["blocks"] = [block for block in edit["blocks"] if block < 6]
        if "source" in edit:
            edit["source"] = {"sample": 1}  # the name of a variant means something in an experiment only
        found[file.stem] = Program.from_config({file.stem: edit})
    return found


def test_every_op_preset_runs_and_changes_the_image():
    """At 1.5 times the model's size and with two reference images, so that every method acts."""
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    chosen = {name: program for name, program in presets().items() if split_resample(program)[1] is None}
    noise = torch.Generator().manual_seed(0)
    references = [[torch.rand(1, 3, *size, generator=noise) for size in ((32, 32), (32, 48))]]
    more = {"references": references, "height": 96, "width": 96, "steps": 2, "output": "latent"}
    same = set()
    for regions in (0, 2):  # numbers of texts: what takes from another sample needs one layout
        some = {name: program for name, program in chosen.items() if len(region_prompts(program)) == regions}
        programs = [Program(), Program(), *some.values()]
        seeds = [0, 1] + [0] * len(some)  # the second sample is the source of those that inject
        latents = pipe.generate([PROMPT] * len(programs), seeds, programs, **more)
        assert latents.isfinite().all()
        change = (latents - latents[0]).abs().amax((1, 2)) / latents[0].std()
        same |= {name for name, c in zip(some, change[2:].tolist(), strict=True) if c < 1e-3}
    assert same == SAME


@pytest.mark.parametrize("name", ["resample"])
def test_presets_of_another_size(name):
    pipe = fluxlab.load_pipeline("tiny", dtype=torch.float32, device="cpu")
    small, large = pipe.generate(PROMPT, 0, [presets()[name], None], height=96, width=96, steps=1)
    own = pipe.generate(PROMPT, 0, steps=1)[0]
    assert small.size == large.size == (96, 96)
    assert small.tobytes() == own.resize((96, 96), 3).tobytes()  # 3: bicubic
    assert small.tobytes() != large.tobytes()
